"""Transformer Attribution (Chefer, Gur & Wolf, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from captum.attr import GradientAttribution
from torch import Tensor

from captum_reflected.attention.layout import find_layout
from captum_reflected.attention.recording import attention_relevances
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import (
    TokenAttribution,
    check_start_layer,
    first_layer,
    warn_if_zero,
)
from captum_reflected.inputs.batch import Batch, make_batch, preserving_state
from captum_reflected.inputs.checks import check_option
from captum_reflected.inputs.devices import to_device
from captum_reflected.relevance.balanced import balanced_relevances
from captum_reflected.relevance.lrp import lrp_relevances
from captum_reflected.relevance.rollout import (
    gradient_relevance,
    pooling_weights,
    roll_out,
    roll_out_row,
)

Rule = Literal["gradient", "lrp", "balanced"]


@dataclass(frozen=True)
class LayerRelevance:
    """The relevance of every layer, and the weights of the tokens in the output.

    Attributes:
        layers: E_1 ... E_L, each (B, N, N), from the first layer of the roll-out on.
        readout: weights of the tokens in the model's output, (N,) or (B, N).
        layout: the token layout.
    """

    layers: list[Tensor]
    readout: Tensor
    layout: TokenLayout


class TransformerAttribution(TokenAttribution, GradientAttribution):
    r"""Relevance of image tokens for a target, propagated through the attention of every layer.

    One forward and one backward. Each layer gives
    :math:`E_l = \mathrm{mean}_h\,(A_l \odot \nabla A_l)^+`, where :math:`A_l` are the
    attention probabilities and :math:`\nabla A_l` the gradient of the target logit with
    respect to them. The layers are rolled out to
    :math:`R = (I + E_L) \cdots (I + E_1)`, and the map is the class token's row of R. If the
    model reads its output from other tokens, with weights w, the map is :math:`w R`; see
    :class:`TokenLayout`.

    Any forward that runs ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` or softmax
    attention can be explained without changes. The model's parameters, gradients, hooks and
    train or eval mode are not modified. Attention that does not depend on the images is
    ignored, such as that of a text encoder in the same forward.

    The map is non-negative. Its unit is that of R: the class token's own share is 1.

    References:
        Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention
        Visualization*, CVPR 2021, section 3; in the form of Sago & Hotta, ICPRAM 2024,
        section 2.2 (attention in place of its LRP relevance).

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = TransformerAttribution(model)
        >>> attributions = attributor.attribute(images, target=281)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        rule: Rule = "gradient",
        start_layer: int | None = None,
        token_layout: TokenLayout | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it and returns logits of shape (B, C), or an object with these as
                        its ``logits``, as Hugging Face's models do.
            rule (str, optional): The factor that the gradient is multiplied with in
                        :math:`E_l`. ``"gradient"``: the attention. ``"lrp"``: the LRP
                        relevance of the attention, as first published, three to four
                        times as slow; see :mod:`captum_reflected.relevance.lrp_rules`. LRP
                        may be covered by patents in some countries. ``"balanced"``: the
                        attention, and the gradient is balanced; see :func:`balanced`.
                        Default: ``"gradient"``
            start_layer (int, optional): First layer of the roll-out; earlier ones are
                        left out.
                        Default: None, which means the layer that the model recommends (as a
                        zero-shot classifier does), else 0
            token_layout (TokenLayout, optional): The positions of the image tokens. If
                        None, they are read from the model's attributes, or else inferred
                        from the number of tokens and the image size. If the forward runs
                        several models on the images, the number of tokens of the layout
                        selects the one to explain.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, ``start_layer`` is not an int, or
                        ``token_layout`` not a :class:`TokenLayout`.
            ValueError: ``rule`` is unknown or ``start_layer`` negative.
        """
        super().__init__(forward_func, token_layout=token_layout)
        check_start_layer(start_layer)
        check_option("rule", rule, get_args(Rule))
        self.rule = rule
        self.start_layer = start_layer

    def _saliency(self, call: Batch) -> tuple[Tensor, TokenLayout]:
        found = self._layer_relevance(call)
        class_relevance = roll_out_row(found.layers, found.readout)
        class_relevance = class_relevance[:, found.layout.num_prefix_tokens :]
        warn_if_zero((class_relevance == 0).all(dim=-1))
        return class_relevance, found.layout

    def relevance(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        r"""
        The relevance matrix among all tokens, prefix tokens first.

        Args:

            inputs (Tensor or tuple[Tensor]): Images (B, C, H, W).
            target (int, tuple, Tensor or list, optional): As in :meth:`attribute`.
            additional_forward_args (Any, optional): As in :meth:`attribute`.

        Returns:
            *Tensor* **relevance** (B, N, N), float32 (float64 for float64 inputs):
            R[:, i, j] is how much token j flows into token i.
        """
        batch = make_batch(inputs, target, additional_forward_args)
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            return roll_out(self._layer_relevance(call).layers)

    def layer_relevance(self, batch: Batch) -> LayerRelevance:
        """The factors of the roll-out, for a checked call."""
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            return self._layer_relevance(call)

    def _layer_relevance(self, call: Batch) -> LayerRelevance:
        given = self.token_layout
        num_tokens = None if given is None else given.num_tokens
        start = first_layer(self.start_layer, self.forward_func)
        if self.rule == "lrp":
            recorded = lrp_relevances(self.forward_func, call, start, num_tokens)
        elif self.rule == "balanced":
            recorded = balanced_relevances(self.forward_func, call, start, num_tokens)
        else:
            recorded = attention_relevances(
                self.forward_func, call, gradient_relevance, start, num_tokens
            )
        layers = recorded.layers
        layout = find_layout(self.forward_func, call, given, recorded)
        if layout.readout == "attention":
            readout = pooling_weights(recorded.pooling, layout.num_tokens)
        else:
            readout = to_device(layout.readout_weights(layers[0].dtype), layers[0].device)
        return LayerRelevance(layers, readout, layout)
