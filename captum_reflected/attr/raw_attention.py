"""The attention of the last layer."""

from __future__ import annotations

from torch import Tensor

from captum_reflected.attention.layout import recorded_attention
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import TokenAttribution
from captum_reflected.inputs.batch import Batch


class RawAttention(TokenAttribution):
    r"""The class token's attention to the image tokens in the last layer, averaged over the heads.

    A baseline method that does not depend on the target: one forward, no backward, so
    ``forward_func`` need not be differentiable. If the model reads its output from other tokens,
    the map is the mean of their rows, weighted as in :class:`AttentionRollout`. If attention pools
    the tokens (SigLIP, CaiT), it is the rows of the last pooling attention, averaged over its
    queries.

    The map is non-negative.

    References:
        Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention Visualization*, CVPR
        2021, section 4 ("raw attention").

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = RawAttention(model)
        >>> attributions = attributor.attribute(images)
    """

    def _saliency(self, call: Batch) -> tuple[Tensor, TokenLayout]:
        recorded, layout = recorded_attention(self.forward_func, call, self.token_layout)
        if layout.readout == "attention":
            row = recorded.pooling[-1].mean(dim=1)
        else:
            last = recorded.layers[-1]
            row = layout.readout_weights(last.dtype).to(last.device) @ last
        # In both cases, the last keys are the image tokens.
        return row[:, -layout.num_image_tokens :], layout
