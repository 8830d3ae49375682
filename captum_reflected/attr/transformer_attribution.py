"""Transformer Attribution (Chefer, Gur & Wolf, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

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
    first_layer,
    warn_if_zero,
)
from captum_reflected.inputs.request import (
    Batch,
    Images,
    check_option,
    make_batch,
    preserving_state,
)
from captum_reflected.relevance.lrp import lrp_relevances
from captum_reflected.relevance.rollout import (
    gradient_relevance,
    pooling_weights,
    roll_out,
    roll_out_row,
)

Rule = Literal["gradient", "lrp"]


class TransformerAttribution(GradientAttribution):
    r"""Relevance of image tokens for a target, through the attention of every layer.

    One forward and one backward. Each layer gives
    :math:`E_l = \mathrm{mean}_h\,(A_l \odot \nabla A_l)^+`, where :math:`A_l` are the
    attention probabilities and :math:`\nabla A_l` the gradient of the target logit with
    respect to them; the layers are rolled out to
    :math:`R = (I + E_L) \cdots (I + E_1)`, and the map is the class token's row of R. A
    model that reads its answer from other tokens, with weights w, has the map
    :math:`w R`; see :class:`TokenLayout`.

    The model is used as it is: any forward that runs
    ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` or softmax attention. Its
    parameters, gradients, hooks and mode are left alone. Attention that does not depend
    on the images, as of a text encoder in the same forward, does not count.

    References:
        Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention
        Visualization*, CVPR 2021, section 3; in the form of Sago & Hotta, ICPRAM 2024,
        section 2.2 (attention in place of its LRP relevance).
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
                        it and returns logits of shape (B, C).
            rule (str, optional): What stands for the attention in :math:`E_l`.
                        ``"gradient"``: attention times gradient. ``"lrp"``: its LRP
                        relevance times gradient, as first published, three to four
                        times as slow; see :mod:`captum_reflected.relevance.lrp_rules`. LRP is
                        reported to be patented technology in places, and
                        ``rule="gradient"`` is the default.
                        Default: ``"gradient"``
            start_layer (int, optional): First layer of the roll-out; earlier ones are
                        left out.
                        Default: None, which is the layer that the model recommends (as a
                        zero-shot classifier does), else 0
            token_layout (TokenLayout, optional): Where the image tokens are. If None,
                        the model is asked, and where it does not say, the layout is
                        inferred from the number of tokens and the image size. Of a
                        forward that runs several models on the images, it says by its
                        number of tokens which one to explain.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, ``start_layer`` no int, or
                        ``token_layout`` not a :class:`TokenLayout`.
            ValueError: ``rule`` is unknown or ``start_layer`` negative.
        """
        check_constructor(forward_func, start_layer, token_layout)
        check_option("rule", rule, get_args(Rule))
        GradientAttribution.__init__(self, forward_func)
        self.rule = rule
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

            inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them. The
                        map is that of these pixels: a ``forward_func`` that crops, flips or
                        zooms them would have a map of another place.
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
                        channel. Its unit is that of R: the class token's own share is 1.

        Raises:
            TypeError: inputs or target are of a type that is not taken.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model has no usable self-attention, or ``rule`` is
                        ``"lrp"`` and an operation has no rule; its name and module are told.

        Examples::

            >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
            >>> attributor = TransformerAttribution(model)
            >>> attributions = attributor.attribute(images, target=281)
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch = make_batch(inputs, target, additional_forward_args)
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            layers, readout, layout = self._layers(call)
            class_relevance = roll_out_row(layers, readout)[:, layout.num_prefix_tokens :]
            warn_if_zero((class_relevance == 0).all(dim=-1))
            attributions: Images = enlarge(class_relevance, layout, call, interpolate_mode)
        return attributions

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
            return roll_out(self._layers(call)[0])

    def layers_and_readout(self, batch: Batch) -> tuple[list[Tensor], Tensor, TokenLayout]:
        """Each layer's E (B, N, N), the readout's weights (N,) or (B, N), and the layout."""
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            return self._layers(call)

    def _layers(self, call: Batch) -> tuple[list[Tensor], Tensor, TokenLayout]:
        told = self.token_layout
        told_tokens = None if told is None else told.num_tokens
        start = first_layer(self.start_layer, self.forward_func)
        if self.rule == "lrp":
            recorded = lrp_relevances(self.forward_func, call, start, told_tokens)
        else:
            recorded = attention_relevances(
                self.forward_func, call, gradient_relevance, start, told_tokens
            )
        layers, pooling = recorded.layers, recorded.pooling
        num_tokens = layers[0].shape[-1]
        layout = find_layout(
            self.forward_func,
            call,
            told,
            recorded,
            num_tokens=num_tokens,
            pooled_keys={e.shape[-1] for e in pooling},
        )
        if layout.readout == "attention":
            return layers, pooling_weights(pooling, num_tokens), layout
        return layers, layout.readout_weights(layers[0].dtype).to(layers[0].device), layout

    def attribute_future(self) -> None:
        """Not available; use :meth:`attribute`."""
        raise NotImplementedError("attribute_future is not available; use attribute")
