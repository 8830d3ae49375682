"""The attention of the last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from captum.attr import Attribution

from captum_reflected._captum import log_usage
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import (
    InterpolateMode,
    check_constructor,
    enlarge,
    recorded_attention,
)
from captum_reflected.inputs.request import Images, check_option, make_batch, preserving_state


class RawAttention(Attribution):
    r"""The class token's attention to the image tokens in the last layer, mean of the heads.

    A baseline that knows no target: one forward, no backward. Of a model that reads its
    answer from other tokens, the mean of their rows, weighted as
    :class:`AttentionRollout` says; of one that reads it by attention (SigLIP, CaiT), the
    rows of the last such attention, mean of the queries.

    References:
        Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention
        Visualization*, CVPR 2021, section 4 ("raw attention").
    """

    def __init__(
        self, forward_func: Callable[..., Any], *, token_layout: TokenLayout | None = None
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it. It need not be differentiable.
            token_layout (TokenLayout, optional): Where the image tokens are, and where
                        the answer is read, as in :class:`TransformerAttribution`.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, or ``token_layout`` not a
                        :class:`TokenLayout`.
        """
        check_constructor(forward_func, token_layout=token_layout)
        Attribution.__init__(self, forward_func)
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
            target (int, tuple, Tensor or list, optional): Checked as in
                        :class:`TransformerAttribution` if given; the map does not depend
                        on it.
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
                        channel. The attention to all keys, prefix tokens included, sums
                        to 1.

        Raises:
            TypeError: inputs or target are of a type that is not taken.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model has no usable self-attention.

        Examples::

            >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
            >>> attributor = RawAttention(model)
            >>> attributions = attributor.attribute(images)
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch = make_batch(inputs, target, additional_forward_args)
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            layers, pooling, layout = recorded_attention(self.forward_func, call, self.token_layout)
            if layout.readout == "attention":
                row = pooling[-1].mean(dim=1)
            else:
                row = layout.readout_weights(layers[-1].dtype).to(layers[-1].device) @ layers[-1]
            # The image tokens are the last keys of either.
            attributions: Images = enlarge(
                row[:, -layout.num_image_tokens :], layout, call, interpolate_mode
            )
        return attributions

    def attribute_future(self) -> None:
        """Not available; use :meth:`attribute`."""
        raise NotImplementedError("attribute_future is not available; use attribute")
