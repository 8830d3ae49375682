"""Reflected relevance among tokens (Sago & Hotta, ICPRAM 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor

from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import MaskedAttribution, MaskedSaliency
from captum_reflected.attr.transformer_attribution import Rule, TransformerAttribution
from captum_reflected.inputs.batch import Batch, make_batch, preserving_state
from captum_reflected.inputs.checks import check_finite, check_not_negative, check_option
from captum_reflected.inputs.targets import Score
from captum_reflected.masking.reflection import (
    Aggregate,
    Combine,
    Reflect,
    Reflection,
    combine_terms,
    mask_weighted_scores,
    reflection_masks,
)
from captum_reflected.masking.scoring import Precision, Scoring, check_precision, score_batch
from captum_reflected.relevance.rollout import roll_out, weigh


class ReflectedRelevance(MaskedAttribution):
    r"""Image tokens scored by the model itself, on images that reflect their relevance.

    The relevance matrix R of :class:`TransformerAttribution` says how much each image
    token flows into each other. For every image token j, a mask is made from its column
    of R (equations 1-2, Figure 4), the image is seen through it (equations 3-4), and the
    model scores what it sees. The map is the sum of these scores and the class token's
    relevance: one forward and backward, and J further forwards without gradients.

    The paper leaves open how two terms of very different size are added. Here each is
    brought to the range from 0 to 1 first (``combine="minmax"``), so that the map is from 0 to
    ``1 + reflected_weight``; the plain sum is ``combine="sum"``.

    Where a faster forward, in which the reflected images are not made, is found to give the
    model's own answers (see :func:`captum_reflected.score_masks`), it is taken.

    References:
        Sago & Hotta, *Vision Transformer Interpretability via Prediction of Image
        Reflected Relevance Among Tokens*, ICPRAM 2024, section 3.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = ReflectedRelevance(model)
        >>> attributions = attributor.attribute(images, target=281)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        rule: Rule = "gradient",
        start_layer: int | None = None,
        token_layout: TokenLayout | None = None,
        reflect: Reflect = "columns",
        scale_by_maxima: bool = True,
        score: Score = "logit",
        aggregate: Aggregate = "token",
        combine: Combine = "minmax",
        reflected_weight: float = 1.0,
        precision: Precision | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it and returns logits of shape (B, C).
            rule (str, optional): As in :class:`TransformerAttribution` (section 2.2).
                        Default: ``"gradient"``
            start_layer (int, optional): As in :class:`TransformerAttribution`.
                        Default: None
            token_layout (TokenLayout, optional): As in :class:`TransformerAttribution`.
                        Default: None
            reflect (str, optional): ``"columns"`` takes mask j from column j of R, the
                        tokens that token j flows into (equations 1-3); ``"rows"`` from
                        row j, the tokens that flow into token j.
                        Default: ``"columns"``
            scale_by_maxima (bool, optional): Whether mask j is scaled by its column's
                        maximum, min-max normalised over the columns (Figure 4, green).
                        Default: True
            score (str, optional): What is read from the model for a reflected image: the
                        target's ``"logit"`` (section 3), or its softmax
                        ``"probability"``.
                        Default: ``"logit"``
            aggregate (str, optional): What the scores make of the tokens. ``"token"``: the
                        score of reflected image j is that of token j (section 3).
                        ``"mask_weighted"``: every reflected image adds its score to all the
                        tokens that it shows, :math:`s = M^T w`, with w the probability, or
                        what the logit has above the median of all.
                        Default: ``"token"``
            combine (str, optional): ``"minmax"`` brings the scores and the class token's
                        relevance to the range from 0 to 1 before they are added (section
                        3's sum); ``"sum"`` adds them as they are.
                        Default: ``"minmax"``
            reflected_weight (float, optional): Factor of the scores' term in that sum.
                        Default: 1.0
            precision (str, optional): ``"bf16"`` runs the forwards of the reflected
                        images, and nothing else, in bfloat16. The ranking of the
                        tokens is all but the same.
                        Default: None, the model's own

        Raises:

            TypeError: an argument is of a type that is not taken.
            ValueError: an option is unknown or out of range.
        """
        super().__init__(forward_func, token_layout=token_layout)
        self._transformer = TransformerAttribution(
            forward_func, rule=rule, start_layer=start_layer, token_layout=token_layout
        )
        for name, value, options in (
            ("reflect", reflect, get_args(Reflect)),
            ("score", score, get_args(Score)),
            ("aggregate", aggregate, get_args(Aggregate)),
            ("combine", combine, get_args(Combine)),
        ):
            check_option(name, value, options)
        if not isinstance(scale_by_maxima, bool):
            raise TypeError(f"scale_by_maxima is {scale_by_maxima!r}; wanted: True or False")
        check_not_negative("reflected_weight", reflected_weight)
        check_precision(precision)
        self._along = reflect  # the name of the option is that of a method
        self.scale_by_maxima = scale_by_maxima
        self.score = score
        self.aggregate = aggregate
        self.combine = combine
        self.reflected_weight = reflected_weight
        self.precision = precision

    def reflect(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: float | Tensor | tuple[float | Tensor] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Reflection:
        r"""
        What the map is made of: relevance, masks, scores (Figure 5).

        Args:

            inputs (Tensor or tuple[Tensor]): As in :meth:`attribute`, and so are all
                        further arguments.
            target (int, tuple, Tensor or list, optional): As in :meth:`attribute`.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
            baselines (float or Tensor, optional): As in :meth:`attribute`.
            perturbations_per_eval (int, optional): As in :meth:`attribute`.
            show_progress (bool, optional): As in :meth:`attribute`.

        Returns:
            *Reflection*: ``relevance`` (B, N, N), ``masks`` (B, J, gh, gw), ``scores`` (B, J),
            ``class_relevance`` (B, J); float32 (float64 for float64 inputs). The reflected
            images themselves: ``reflected_images(inputs, reflection.masks)``.
        """
        batch = make_batch(inputs, target, additional_forward_args)
        scoring = self._scoring(batch, baselines, perturbations_per_eval, show_progress)
        return self._reflect(batch, scoring)[0]

    def _reflect(self, batch: Batch, scoring: Scoring) -> tuple[Reflection, TokenLayout]:
        found = self._transformer.layer_relevance(batch)
        layout, readout = found.layout, found.readout
        with preserving_state(batch, gradients=False, forward_func=self.forward_func) as call:
            relevance = roll_out(found.layers)
            del found  # each layer is as large as R
            check_finite([relevance], "the relevance matrix")
            image_tokens = slice(layout.num_prefix_tokens, None)
            masks = reflection_masks(
                relevance[:, image_tokens, image_tokens],
                layout.grid_size,
                reflect=self._along,
                scale_by_maxima=self.scale_by_maxima,
            )
            reflection = Reflection(
                relevance=relevance,
                masks=masks,
                scores=score_batch(self.forward_func, call, masks, scoring),
                class_relevance=weigh(readout, relevance)[:, image_tokens],
            )
        return reflection, layout

    def _masked_saliency(self, batch: Batch, scoring: Scoring) -> MaskedSaliency:
        reflection, layout = self._reflect(batch, scoring)
        saliency = combine_terms(
            self._aggregated(reflection),
            reflection.class_relevance,
            combine=self.combine,
            reflected_weight=self.reflected_weight,
        )
        return MaskedSaliency(saliency, reflection.masks, reflection.class_relevance, layout)

    def _aggregated(self, reflection: Reflection) -> Tensor:
        """(B, J): what the reflected images say of each token."""
        scores = reflection.scores
        if self.aggregate == "token":
            return scores
        if self.score == "logit":
            scores = (scores - scores.median(dim=-1, keepdim=True).values).clamp(min=0)
        return mask_weighted_scores(reflection.masks, scores)
