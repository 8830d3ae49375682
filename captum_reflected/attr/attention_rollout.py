"""Attention Rollout (Abnar & Zuidema, ACL 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from captum_reflected.attention.layout import recorded_attention
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import TokenAttribution, check_start_layer, first_layer
from captum_reflected.inputs.batch import Batch
from captum_reflected.relevance.rollout import attention_step, pooling_weights, roll_out_row


class AttentionRollout(TokenAttribution):
    r"""How much of each image token reaches the answer through the attention of every layer.

    A baseline method that does not depend on the target: one forward, no backward. With
    :math:`A_l` the attention probabilities averaged over the heads, and
    :math:`\hat A_l = \mathrm{norm}(A_l + I)` with rows normalised to sum to one, the map is the
    class token's row of :math:`\hat A_L \cdots \hat A_1`. It is non-negative, and the shares of
    all tokens, prefix tokens included, sum to 1.

    If the model reads its output from other tokens, with weights w, the map is
    :math:`w \hat A_L \cdots \hat A_1`. If attention pools the tokens after the last layer, it
    gives w (:func:`captum_reflected.relevance.rollout.pooling_weights`). Otherwise w is found by
    forwards in which tokens are changed after the last layer, see
    ``captum_reflected.attention.verification``.

    References:
        Abnar & Zuidema, *Quantifying Attention Flow in Transformers*, ACL 2020, section 3.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = AttentionRollout(model)
        >>> attributions = attributor.attribute(images)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        start_layer: int | None = None,
        token_layout: TokenLayout | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs it. It
                        need not be differentiable.
            start_layer (int, optional): As in :class:`TransformerAttribution`.
                        Default: None
            token_layout (TokenLayout, optional): As in :class:`TransformerAttribution`.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, ``start_layer`` not an int, or
                        ``token_layout`` not a :class:`TokenLayout`.
            ValueError: ``start_layer`` is negative.
        """
        super().__init__(forward_func, token_layout=token_layout)
        check_start_layer(start_layer)
        self.start_layer = start_layer

    def _saliency(self, call: Batch) -> tuple[Tensor, TokenLayout]:
        recorded, layout = recorded_attention(
            self.forward_func,
            call,
            self.token_layout,
            first_layer(self.start_layer, self.forward_func),
        )
        steps = [attention_step(attention) for attention in recorded.layers]
        if layout.readout == "attention":
            # Class attention has a residual connection for its queries, like the other layers.
            pooling = [
                attention_step(attention) if attention.shape[-1] > layout.num_tokens else attention
                for attention in recorded.pooling
            ]
            readout = pooling_weights(pooling, layout.num_tokens)
        else:
            readout = layout.readout_weights(steps[0].dtype)
        saliency = roll_out_row(steps, readout)[:, layout.num_prefix_tokens :]
        return saliency.clamp(min=0), layout  # negative values are rounding errors
