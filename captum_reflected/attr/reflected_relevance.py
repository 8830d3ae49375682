"""Reflected relevance among tokens (Sago & Hotta, ICPRAM 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor

from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._masked import MaskedAttribution, MaskedSaliency
from captum_reflected.attr.transformer_attribution import Rule, TransformerAttribution
from captum_reflected.inputs.batch import Batch, preserving_state
from captum_reflected.inputs.checks import (
    check_finite,
    check_not_negative,
    check_option,
    check_switch,
)
from captum_reflected.inputs.targets import Score
from captum_reflected.masking.precision import Precision
from captum_reflected.masking.reflection import (
    Aggregate,
    Combine,
    Reflect,
    Reflection,
    combine_terms,
    mask_weighted_scores,
    reflection_masks,
)
from captum_reflected.masking.scoring import Scoring, score_batch
from captum_reflected.relevance.rollout import roll_out, weighted_rows


class ReflectedRelevance(MaskedAttribution):
    r"""Scores image tokens by the model's output for images that reflect their relevance.

    The relevance matrix R of :class:`TransformerAttribution` contains how much each image
    token flows into each other token. For every image token j, a mask is computed from its
    column of R (equations 1-2, Figure 4) and applied to the image (equations 3-4), and the
    model scores the result. The map is the sum of these scores and the class token's
    relevance. The cost is one forward and backward, and J further forwards without gradients.

    The paper does not specify how two terms of very different size are added. Here each is
    min-max normalised to [0, 1] first (``combine="minmax"``), so the map ranges from 0 to
    ``1 + reflected_weight``. The plain sum is ``combine="sum"``.

    A faster forward that does not compute the reflected images is used if a comparison shows
    that its outputs equal the model's (see :func:`captum_reflected.score_masks`).

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
                        it and returns logits of shape (B, C), or an object with these as
                        its ``logits``, as Hugging Face's models do.
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
            score (str, optional): How the model scores a reflected image: by the target's
                        ``"logit"`` (section 3), or by its softmax ``"probability"``.
                        Default: ``"logit"``
            aggregate (str, optional): How the scores of the images become scores of the
                        tokens. ``"token"``: the score of reflected image j is that of token
                        j (section 3). ``"mask_weighted"``: every reflected image adds its
                        score to all the tokens that it shows, :math:`s = M^T w`, with w the
                        probability, or the positive part of the logit minus the median
                        logit.
                        Default: ``"token"``
            combine (str, optional): ``"minmax"`` normalises the scores and the class
                        token's relevance to [0, 1] before they are added (section 3's
                        sum); ``"sum"`` adds them unchanged.
                        Default: ``"minmax"``
            reflected_weight (float, optional): Weight of the scores' term in that sum.
                        Default: 1.0
            precision (str or torch.dtype, optional): ``"bf16"``, ``"bfloat16"`` or
                        ``torch.bfloat16`` runs the forwards of the reflected images,
                        and nothing else, in bfloat16. The ranking of the tokens hardly
                        changes.
                        Default: None, which means the model's own precision

        Raises:

            TypeError: an argument has an unsupported type.
            ValueError: an option is unknown or out of range.
        """
        super().__init__(forward_func, token_layout=token_layout, precision=precision)
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
        check_switch("scale_by_maxima", scale_by_maxima)
        check_not_negative("reflected_weight", reflected_weight)
        self._along = reflect  # the option's name is taken by the method of the same name
        self.scale_by_maxima = scale_by_maxima
        self.score = score
        self.aggregate = aggregate
        self.combine = combine
        self.reflected_weight = reflected_weight

    def _option(self, name: str, default: Any) -> Any:
        if name == "reflect":
            return self._along
        if name in ("rule", "start_layer"):
            return getattr(self._transformer, name)
        return super()._option(name, default)

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
        Computes the components of the map: relevance, masks and scores (Figure 5).

        Args:

            inputs (Tensor or tuple[Tensor]): As in :meth:`attribute`.
            target (int, tuple, Tensor or list, optional): As in :meth:`attribute`.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
            baselines (float or Tensor, optional): As in :meth:`attribute`.
            perturbations_per_eval (int, optional): As in :meth:`attribute`.
            show_progress (bool, optional): As in :meth:`attribute`.

        Returns:
            *Reflection*: ``relevance`` (B, N, N), ``masks`` (B, J, gh, gw), ``scores`` (B, J),
            ``class_relevance`` (B, J); float32 (float64 for float64 inputs). To get the
            reflected images, call ``reflected_images(inputs, reflection.masks)``.
        """
        batch, scoring = self._checked(
            inputs,
            target,
            additional_forward_args,
            baselines=baselines,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
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
                class_relevance=weighted_rows(readout, relevance)[:, image_tokens],
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
        """Token scores (B, J) from the scores of the reflected images."""
        scores = reflection.scores
        if self.aggregate == "token":
            return scores
        if self.score == "logit":
            scores = (scores - scores.median(dim=-1, keepdim=True).values).clamp(min=0)
        return mask_weighted_scores(reflection.masks, scores)
