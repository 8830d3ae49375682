"""A linear surrogate of the model on complementary halves of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._masked import MaskedAttribution, MaskedSaliency
from captum_reflected.inputs.batch import Batch, preserving_state
from captum_reflected.inputs.checks import check_not_negative, check_positive, check_switch
from captum_reflected.masking.components import (
    complementary_halves,
    component_masks,
    regression,
)
from captum_reflected.masking.reflection import combine_terms
from captum_reflected.masking.scoring import Precision, Scoring, score_batch
from captum_reflected.relevance.rollout import roll_out_row


@dataclass(frozen=True)
class MaskFit:
    """The result of :meth:`MaskRegression.fit`, for a batch of B images.

    Attributes:
        masks: (B, 2 K, gh, gw) of zeros and ones: K halves of the image, then the K other halves.
        scores: (B, 2 K), the probability of the target for each half; the model's output itself if
            it is one number per image.
        token_weights: (B, J), how much each image token adds to the probability; positive or
            negative.
        class_relevance: (B, J), relevance of the image tokens for the model's output, as in
            :class:`TransformerAttribution`.
    """

    masks: Tensor
    scores: Tensor
    token_weights: Tensor
    class_relevance: Tensor


class MaskRegression(MaskedAttribution):
    r"""Estimates what each image token adds to the target's probability, from few masked images.

    Extends the paper of :class:`ReflectedRelevance`: better maps from fewer forwards.

    1. The relevance that image tokens pass to and receive from each other, in every layer, is
       decomposed into principal components, which distinguish the tokens
       (:func:`captum_reflected.masking.components.component_masks`).
    2. Each component splits the image into two halves: the tokens with the highest values, and the
       rest. The model scores both.
    3. A linear surrogate is fitted to these scores, with a prior that neighbouring tokens are
       similar. It estimates how much each token adds
       (:func:`captum_reflected.masking.components.regression`).
    4. The map is the square of the weighted sum of these estimates and the class token's
       relevance, each min-max normalised to [0, 1]. The square keeps the order of the tokens, and
       prevents many small values from outweighing a few large ones. The map ranges from 0 to
       ``(1 + regression_weight) ** 2``.

    The cost is one forward and backward, and twice ``num_masks`` forwards without gradients, with
    half the tokens if ``drop_hidden=True``. The study in the documentation compares it with other
    methods and explains how its constants were chosen.

    References:
        Explaining a model by a regression on masked versions of its input is the idea of LIME
        (Ribeiro, Singh & Guestrin, KDD 2016). The regression is that of a Gaussian process
        (Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006, equation 2.12).

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = MaskRegression(model)
        >>> attributions = attributor.attribute(images, target=281)
    """

    score = "probability"

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        num_masks: int = 20,
        drop_hidden: bool = False,
        regression_weight: float = 0.5,
        precision: Precision | None = None,
        start_layer: int | None = None,
        token_layout: TokenLayout | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it and returns logits of shape (B, C), C of 2 or more; or one number per
                        image, which is then scored instead of a probability.
            num_masks (int, optional): Number of components, each of which splits the image into
                        two halves. An image of J tokens has at most J - 1.
                        Default: 20
            drop_hidden (bool, optional): Whether to leave the hidden half out of the model's
                        sequence instead of showing the baseline, which costs half as much.
                        Requires a model that is known to support shorter sequences (timm's or
                        torchvision's VisionTransformer) and is passed directly.
                        Default: False
            regression_weight (float, optional): Weight of the surrogate's term in the map. Larger
                        weights improve insertion, smaller weights improve deletion.
                        Default: 0.5
            precision (str, optional): ``"bf16"`` runs the forwards of the masked images, and
                        nothing else, in bfloat16.
                        Default: None, which means the model's own precision
            start_layer (int, optional): As in :class:`TransformerAttribution`.
                        Default: None
            token_layout (TokenLayout, optional): As in :class:`TransformerAttribution`.
                        Default: None

        Raises:

            TypeError: an argument has an unsupported type.
            ValueError: an option is unknown or out of range.
        """
        super().__init__(
            forward_func, start_layer=start_layer, token_layout=token_layout, precision=precision
        )
        check_positive("num_masks", num_masks)
        check_switch("drop_hidden", drop_hidden)
        check_not_negative("regression_weight", regression_weight)
        self.num_masks = num_masks
        self.drop_hidden = drop_hidden
        self.regression_weight = regression_weight

    def fit(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: float | Tensor | tuple[float | Tensor] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> MaskFit:
        r"""
        Computes the components of the map: masks of image halves, their scores, token weights.

        Args:

            inputs (Tensor or tuple[Tensor]): As in :meth:`attribute`.
            target (int, tuple, Tensor or list, optional): As in :meth:`attribute`.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
            baselines (float or Tensor, optional): As in :meth:`attribute`.
            perturbations_per_eval (int, optional): As in :meth:`attribute`.
            show_progress (bool, optional): As in :meth:`attribute`.

        Returns:
            *MaskFit*: ``masks`` (B, 2 K, gh, gw), ``scores`` (B, 2 K), ``token_weights`` (B, J),
            ``class_relevance`` (B, J); float32 (float64 for float64 inputs).
        """
        batch, scoring = self._checked(
            inputs,
            target,
            additional_forward_args,
            baselines=baselines,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._fit(batch, scoring)[0]

    def _fit(self, batch: Batch, scoring: Scoring) -> tuple[MaskFit, TokenLayout]:
        if batch.target is None:  # one number per image has no probability
            scoring = replace(scoring, score="logit")
        found = self._transformer.layer_relevance(batch)
        layers, layout = found.layers, found.layout
        if layout.num_image_tokens < 2:
            raise ValueError("the model has one image token; wanted: two or more to compare")
        with preserving_state(batch, gradients=False, forward_func=self.forward_func) as call:
            image_tokens = slice(layout.num_prefix_tokens, None)
            class_relevance = roll_out_row(layers, found.readout)[:, image_tokens]
            image_relevance = [layer[:, image_tokens, image_tokens] for layer in layers]
            masks = complementary_halves(
                component_masks(image_relevance, layout.grid_size, self.num_masks)
            )
            del found, layers, image_relevance
            scores = score_batch(self.forward_func, call, masks, scoring)
            weights = regression(masks, scores)
        return MaskFit(masks, scores, weights, class_relevance), layout

    def _masked_saliency(self, batch: Batch, scoring: Scoring) -> MaskedSaliency:
        fit, layout = self._fit(batch, scoring)
        saliency = combine_terms(
            fit.token_weights, fit.class_relevance, reflected_weight=self.regression_weight
        )
        return MaskedSaliency(saliency.square(), fit.masks, fit.class_relevance, layout)
