"""Grad-CAM on the last attention of a Vision Transformer (Chefer, Gur & Wolf, CVPR 2021)."""

from __future__ import annotations

import torch
from captum.attr import GradientAttribution
from torch import Tensor

from captum_reflected.attention.layout import find_layout
from captum_reflected.attention.recording import attention_relevances
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import TokenAttribution, warn_if_zero
from captum_reflected.inputs.batch import Batch


class AttentionGradCam(TokenAttribution, GradientAttribution):
    r"""Grad-CAM with the heads of the last attention as its channels.

    A baseline method: one forward, and a backward that ends at the last attention. With
    :math:`a_h` the class token's attention to the image tokens in head h of the last layer,
    and :math:`g_h` the gradient of the target logit with respect to it, the map is
    :math:`(\mathrm{mean}_h\, \bar g_h\, a_h)^+`, where :math:`\bar g_h` is the mean of
    :math:`g_h` over the image tokens. It is non-negative.

    If the model reads its output from other tokens, :math:`a_h` and :math:`g_h` are the mean of
    their rows, weighted as in :class:`TransformerAttribution`. If attention pools the tokens
    (SigLIP, CaiT), they are the rows of the last pooling attention, averaged over its queries.

    References:
        Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention
        Visualization*, CVPR 2021, section 4 ("GradCAM"), after Selvaraju et al., *Grad-CAM*,
        ICCV 2017.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = AttentionGradCam(model)
        >>> attributions = attributor.attribute(images, target=281)
    """

    def _saliency(self, call: Batch) -> tuple[Tensor, TokenLayout]:
        attention, gradient, layout = self._rows(call)
        weights = gradient.mean(dim=-1, keepdim=True)
        saliency = (weights * attention).mean(dim=1).clamp(min=0)
        warn_if_zero(
            (saliency == 0).all(dim=-1), "the weighted mean of its attention heads is not positive"
        )
        return saliency, layout

    def _rows(self, call: Batch) -> tuple[Tensor, Tensor, TokenLayout]:
        """The readout's attention to the image tokens and its gradient, (B, h, J); the layout."""
        given = self.token_layout
        recorded = attention_relevances(
            self.forward_func,
            call,
            # The relevant rows are only known after the backward.
            lambda attention, gradient: torch.stack([attention, gradient], dim=-1),
            num_tokens=None if given is None else given.num_tokens,
            last_only=True,
        )
        layout = find_layout(self.forward_func, call, given, recorded)
        (layer,) = recorded.layers  # (B, h, Q, M, 2)
        if layout.readout == "attention":
            row = recorded.pooling[-1].mean(dim=2)
        else:
            readout = layout.readout_weights(layer.dtype).to(layer.device)
            row = torch.einsum("q,bhqmx->bhmx", readout, layer)
        attention, gradient = row[:, :, -layout.num_image_tokens :].unbind(dim=-1)
        return attention, gradient, layout
