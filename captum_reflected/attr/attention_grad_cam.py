"""Grad-CAM on the last attention of a Vision Transformer (Chefer, Gur & Wolf, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from captum.attr import GradientAttribution
from torch import Tensor

from captum_reflected._captum import log_usage
from captum_reflected.attention.recording import attention_relevances
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import (
    InterpolateMode,
    check_constructor,
    enlarge,
    find_layout,
    warn_if_zero,
)
from captum_reflected.inputs.request import (
    Batch,
    Images,
    check_option,
    make_batch,
    preserving_state,
)


class AttentionGradCam(GradientAttribution):
    r"""Grad-CAM with the heads of the last attention as its channels.

    A baseline: one forward, and a backward that ends at the last attention. With
    :math:`a_h` the class token's attention to the image tokens in head h of the last layer,
    and :math:`g_h` the gradient of the target logit with respect to it, the map is
    :math:`(\mathrm{mean}_h\, \bar g_h\, a_h)^+`, where :math:`\bar g_h` is the mean of
    :math:`g_h` over the image tokens.

    Of a model that reads its answer from other tokens, :math:`a_h` and :math:`g_h` are the
    mean of their rows, weighted as in :class:`TransformerAttribution`; of one that reads it
    by attention (SigLIP, CaiT), the rows of the last such attention, mean of the queries.

    References:
        Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention
        Visualization*, CVPR 2021, section 4 ("GradCAM"), after Selvaraju et al., *Grad-CAM*,
        ICCV 2017.
    """

    def __init__(
        self, forward_func: Callable[..., Any], *, token_layout: TokenLayout | None = None
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it and returns logits of shape (B, C).
            token_layout (TokenLayout, optional): Where the image tokens are, and where
                        the answer is read, as in :class:`TransformerAttribution`.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, or ``token_layout`` not a
                        :class:`TokenLayout`.
        """
        check_constructor(forward_func, token_layout=token_layout)
        GradientAttribution.__init__(self, forward_func)
        self.token_layout = token_layout

    @log_usage
    def attribute(
        self,
        inputs: Images,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        interpolate_mode: InterpolateMode = "bilinear",
    ) -> Images:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
            target (int, tuple, Tensor or list, optional): Output to explain: one index
                        for all images, or one for each, as a (B,) integer tensor, a list
                        of ints or a list of tuples. May be None only where the output
                        has one number per image.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of
                        ``forward_func``, a tuple if more than one.
                        Default: None
            interpolate_mode (str, optional): How the token map is enlarged to (H, W).
                        Default: ``"bilinear"``

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor]*):
                        Shape and dtype of the inputs, not negative, the same in every
                        channel.

        Raises:
            TypeError: inputs or target are of a type that is not taken.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model has no usable self-attention.

        Examples::

            >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
            >>> attributor = AttentionGradCam(model)
            >>> attributions = attributor.attribute(images, target=281)
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch = make_batch(inputs, target, additional_forward_args)
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            attention, gradient, layout = self._rows(call)
            weights = gradient.mean(dim=-1, keepdim=True)
            saliency = (weights * attention).mean(dim=1).clamp(min=0)
            warn_if_zero(
                (saliency == 0).all(dim=-1), "its weighted heads of attention are nowhere positive"
            )
            attributions: Images = enlarge(saliency, layout, call, interpolate_mode)
        return attributions

    def _rows(self, call: Batch) -> tuple[Tensor, Tensor, TokenLayout]:
        """Attention to the image tokens that the answer is read by, its gradient: (B, h, J)."""
        told = self.token_layout
        recorded = attention_relevances(
            self.forward_func,
            call,
            # Which rows count is known only when the backward is done.
            lambda attention, gradient: torch.stack([attention, gradient], dim=-1),
            num_tokens=None if told is None else told.num_tokens,
            last_only=True,
        )
        (layer,), pooling = recorded.layers, recorded.pooling  # (B, h, Q, M, 2) each
        layout = find_layout(
            self.forward_func,
            call,
            told,
            recorded,
            num_tokens=layer.shape[2],
            pooled_keys={pooled.shape[3] for pooled in pooling},
        )
        if layout.readout == "attention":
            row = pooling[-1].mean(dim=2)
        else:
            readout = layout.readout_weights(layer.dtype).to(layer.device)
            row = torch.einsum("q,bhqmx->bhmx", readout, layer)
        attention, gradient = row[:, :, -layout.num_image_tokens :].unbind(dim=-1)
        return attention, gradient, layout

    def attribute_future(self) -> None:
        """Not available; use :meth:`attribute`."""
        raise NotImplementedError("attribute_future is not available; use attribute")
