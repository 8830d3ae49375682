"""Attention Rollout (Abnar & Zuidema, ACL 2020)."""

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
    first_layer,
    recorded_attention,
)
from captum_reflected.inputs.request import Images, check_option, make_batch, preserving_state
from captum_reflected.relevance.rollout import attention_step, pooling_weights, roll_out_row


class AttentionRollout(Attribution):
    r"""How much of each image token reaches the answer through the attention of every layer.

    A baseline that knows no target: one forward, no backward. With :math:`A_l` the
    attention probabilities averaged over the heads, and
    :math:`\hat A_l = \mathrm{norm}(A_l + I)` with rows normalised to sum to one, the map is
    the class token's row of :math:`\hat A_L \cdots \hat A_1`.

    A model that reads its answer from other tokens, with weights w, has the map
    :math:`w \hat A_L \cdots \hat A_1`. Attention after the last layer gives w
    (:func:`captum_reflected.relevance.rollout.pooling_weights`); else it is found by forwards in
    which tokens are changed after the last layer, see ``captum_reflected.attention.verification``.

    References:
        Abnar & Zuidema, *Quantifying Attention Flow in Transformers*, ACL 2020, section 3.
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

            forward_func (Callable): The model, or any function of the images that runs
                        it. It need not be differentiable.
            start_layer (int, optional): As in :class:`TransformerAttribution`.
                        Default: None
            token_layout (TokenLayout, optional): Where the image tokens are, and where
                        the answer is read, as in :class:`TransformerAttribution`.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, ``start_layer`` not an int, or
                        ``token_layout`` not a :class:`TokenLayout`.
            ValueError: ``start_layer`` is negative.
        """
        check_constructor(forward_func, start_layer, token_layout)
        Attribution.__init__(self, forward_func)
        self.start_layer = start_layer
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
                        channel. The shares of all tokens, prefix tokens included, sum to 1.

        Raises:
            TypeError: inputs or target are of a type that is not taken.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model has no usable self-attention.

        Examples::

            >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
            >>> attributor = AttentionRollout(model)
            >>> attributions = attributor.attribute(images)
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch = make_batch(inputs, target, additional_forward_args)
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            layers, pooling, layout = recorded_attention(
                self.forward_func,
                call,
                self.token_layout,
                first_layer(self.start_layer, self.forward_func),
            )
            steps = [attention_step(attention) for attention in layers]
            if layout.readout == "attention":
                # Class attention passes its queries on, as the layers do their tokens.
                pooling = [
                    attention_step(attention)
                    if attention.shape[-1] > layout.num_tokens
                    else attention
                    for attention in pooling
                ]
                readout = pooling_weights(pooling, layout.num_tokens)
            else:
                readout = layout.readout_weights(layers[0].dtype)
            saliency = roll_out_row(steps, readout)[:, layout.num_prefix_tokens :]
            # Not negative but for rounding.
            attributions: Images = enlarge(saliency.clamp(min=0), layout, call, interpolate_mode)
        return attributions

    def attribute_future(self) -> None:
        """Not available; use :meth:`attribute`."""
        raise NotImplementedError("attribute_future is not available; use attribute")
