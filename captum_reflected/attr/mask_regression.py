"""Balanced relevance, corrected by the model's scores of complementary halves of the image."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from captum_reflected.attention.layout import find_positions
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._masked import MaskedAttribution, MaskedSaliency
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch, preserving_state
from captum_reflected.inputs.checks import check_at_least
from captum_reflected.masking.components import (
    complementary_halves,
    component_masks,
    regression,
)
from captum_reflected.masking.precision import Precision
from captum_reflected.masking.scoring import Scoring, score_batch
from captum_reflected.masking.token_dropping import can_drop_tokens, droppable_model
from captum_reflected.relevance.residual_stream import stream_relevances

_warned: WeakSet[nn.Module] = WeakSet()

# What the relevance costs, in plain forwards; a forward and two halves of one are the least beyond.
_COST_OF_RELEVANCE, _LEAST_FORWARDS = 3, 5


@dataclass(frozen=True)
class MaskFit:
    """The result of :meth:`MaskRegression.fit`, for a batch of B images.

    Attributes:
        masks: (B, 2 K, gh, gw) of zeros and ones: K halves of the image, then the K other halves.
        scores: (B, 2 K), the probability of the target for each half; the model's output itself if
            it is one number per image.
        token_weights: (B, J), how much each image token adds to the probability; positive or
            negative.
        prior_deviation: (B, 1), the standard deviation that such weights have before any half is
            scored.
        relevance: (B, J), balanced relevance of the image tokens, as in :class:`BalancedRelevance`.
    """

    masks: Tensor
    scores: Tensor
    token_weights: Tensor
    prior_deviation: Tensor
    relevance: Tensor


class MaskRegression(MaskedAttribution):
    r"""Balanced relevance, corrected by the model's scores of a few masked images.

    Extends the paper of :class:`ReflectedRelevance`: better maps from fewer forwards.

    1. One forward and one backward give the balanced relevance of the image tokens, as in
       :class:`BalancedRelevance`.
    2. The tokens that enter each block are decomposed into principal components, which distinguish
       them (:func:`captum_reflected.masking.components.component_masks`). Each component splits the
       image into two halves: the tokens with the highest values, and the rest. The model scores
       both, with the other half left out of the sequence if the model is known to allow it.
    3. A linear surrogate is fitted to these scores, with a prior that neighbouring tokens are
       similar. It estimates how much each token adds
       (:func:`captum_reflected.masking.components.regression`).
    4. The map is the sum of the relevance, in units of its standard deviation, and the estimates,
       in units of the standard deviation that the prior expects. The more halves are scored, the
       more the estimates count. Positive values speak for the target, negative ones against it.

    The study in the documentation compares the method with others at equal cost, and shows how its
    constants were chosen.

    References:
        Balanced relevance: see :class:`BalancedRelevance`. Explaining a model by a regression on
        masked versions of its input is the idea of LIME (Ribeiro, Singh & Guestrin, KDD 2016). The
        regression is that of a Gaussian process (Rasmussen & Williams, *Gaussian Processes for
        Machine Learning*, 2006, equation 2.12).

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
        forwards: int = 20,
        precision: Precision | None = None,
        token_layout: TokenLayout | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it and returns logits of shape (B, C), C of 2 or more, or an object with
                        these as its ``logits``, as Hugging Face's models do; or one number per
                        image, which is then scored instead of a probability.
            forwards (int, optional): What an explanation may cost, in forwards of one image: 3 are
                        for the relevance, each scored half costs 1, or 0.5 where its hidden tokens
                        are left out. Tokens are left out of unmodified Vision Transformers of
                        timm and torchvision, and ViT, DeiT and DINOv2 classifiers of
                        transformers, unless ``baselines`` are given. A function that does
                        nothing but call such a model is treated like the model.
                        Default: 20
            precision (str or torch.dtype, optional): ``"bf16"``, ``"bfloat16"`` or
                        ``torch.bfloat16`` runs the forwards of the masked images, and nothing
                        else, in bfloat16.
                        Default: None, which means the model's own precision
            token_layout (TokenLayout, optional): As in :class:`TransformerAttribution`.
                        Default: None

        Raises:

            TypeError: an argument has an unsupported type.
            ValueError: ``forwards`` is less than 5, or ``precision`` unknown.
        """
        super().__init__(forward_func, token_layout=token_layout, precision=precision)
        self.forwards = check_at_least("forwards", forwards, _LEAST_FORWARDS)

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
            ``prior_deviation`` (B, 1), ``relevance`` (B, J); float32 (float64 for float64 inputs).
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
        given, forward_func = self.token_layout, self.forward_func
        with preserving_state(batch, gradients=True, forward_func=forward_func) as call:
            found = stream_relevances(
                forward_func, call, None if given is None else given.num_tokens
            )
            layout = find_positions(forward_func, call, given, found.map_index)
        if layout.num_image_tokens < 2:
            raise ValueError("the model has one image token; wanted: two or more to compare")
        with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
            image_tokens = slice(layout.num_prefix_tokens, None)
            relevance = torch.stack(found.layers).mean(dim=0)[:, image_tokens]
            features = [_standardised(tokens[:, image_tokens]) for tokens in found.inputs]
            del found
            masks, scores = self._score_halves(call, features, layout, scoring)
            weights, deviation = regression(masks, scores)
        return MaskFit(masks, scores, weights, deviation, relevance), layout

    def _score_halves(
        self, call: Batch, features: list[Tensor], layout: TokenLayout, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        """Halves of the image, as many as the budget allows, and their scores."""
        budget = self.forwards - _COST_OF_RELEVANCE

        def run(pairs: int, *, drop_hidden: bool) -> tuple[Tensor, Tensor]:
            masks = complementary_halves(component_masks(features, layout.grid_size, pairs))
            options = replace(scoring, drop_hidden=drop_hidden)
            return masks, score_batch(self.forward_func, call, masks, options)

        model = None if scoring.has_baselines else droppable_model(self.forward_func)
        if model is not None:
            if can_drop_tokens(self.forward_func, call.images):
                try:
                    return run(budget, drop_hidden=True)
                except UnsupportedModelError:  # the function does more than call the model
                    pass
            _warn_of_fewer_halves(model)
        return run(max(budget // 2, 1), drop_hidden=False)

    def _masked_saliency(self, batch: Batch, scoring: Scoring) -> MaskedSaliency:
        fit, layout = self._fit(batch, scoring)
        deviation = fit.relevance.std(dim=-1, keepdim=True, correction=0)
        saliency = _in_units(fit.relevance, deviation)
        saliency += _in_units(fit.token_weights, fit.prior_deviation)
        return MaskedSaliency(saliency, fit.masks, fit.relevance, layout)


def _warn_of_fewer_halves(model: nn.Module) -> None:
    """Warns, once for each model, that what could be left out is shown as the baseline."""
    if model in _warned:
        return
    _warned.add(model)
    warnings.warn(
        f"tokens can be left out of this {type(model).__name__}, but not out of forward_func: "
        "hidden tokens are shown as 0 instead, and half as many halves are scored for the same "
        "cost. Wanted, to leave them out: the model itself, or a function that does nothing but "
        "call it; without hooks, such as those of another explanation library; in eval mode and "
        "float32, without compiled parts, autocast or additional_forward_args; and images of its "
        "native size. With baselines=0, this warning "
        "is not given",
        stacklevel=2,
    )


def _standardised(tokens: Tensor) -> Tensor:
    """The channels of (B, J, D) with mean 0 and standard deviation 1, as after a LayerNorm."""
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])


def _in_units(values: Tensor, deviation: Tensor) -> Tensor:
    """(B, J) divided by (B, 1), so that 0 stays 0; 0 if the deviation is."""
    return torch.where(deviation > 0, values / deviation, 0)
