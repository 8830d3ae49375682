"""What the attributors that mask the images have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_reflected._captum import log_usage
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import (
    InterpolateMode,
    TokenAttribution,
    enlarge,
    warn_if_zero,
)
from captum_reflected.attr._captum_options import explain_captum_options
from captum_reflected.inputs.batch import Batch, Images, make_batch, preserving_state
from captum_reflected.inputs.checks import check_option
from captum_reflected.inputs.targets import Score
from captum_reflected.masking.precision import Precision, bf16_or_none
from captum_reflected.masking.scoring import Scoring, check_scoring


@dataclass(frozen=True)
class MaskedSaliency:
    """Token scores from masked versions of the images.

    Attributes:
        saliency: (B, J), the scores of the image tokens.
        masks: (B, K, gh, gw), the masks that were applied to the images.
        relevance: (B, J), relevance of the image tokens for the model's output.
        layout: the token layout.
    """

    saliency: Tensor
    masks: Tensor
    relevance: Tensor
    layout: TokenLayout


class MaskedAttribution(TokenAttribution, PerturbationAttribution):
    """Base of the attributors that run the model on masked versions of the images."""

    # How masked images are scored; subclasses may override it.
    score: Score = "logit"

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        token_layout: TokenLayout | None,
        precision: Precision | None,
    ) -> None:
        super().__init__(forward_func, token_layout=token_layout)
        self.precision = bf16_or_none(precision)

    @property
    def multiplies_by_inputs(self) -> bool:
        """False: the map contains scores of image regions, not a product with the image."""
        return False

    @log_usage
    @explain_captum_options
    def attribute(
        self,
        inputs: Images,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: float | Tensor | tuple[float | Tensor] | None = None,
        perturbations_per_eval: int | None = None,
        interpolate_mode: InterpolateMode = "bilinear",
        show_progress: bool = False,
    ) -> Images:
        r"""
        Computes the attribution map of each image.

        Args:

            inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them. The
                        map is aligned with these pixels, so ``forward_func`` must not crop, flip
                        or shift them.
            target (int, tuple, Tensor or list, optional): Output to explain: one index for all
                        images, or one for each, as a (B,) integer tensor, a list of ints or a
                        list of tuples. May be None only if the output has one number per image.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``, a
                        tuple if more than one. Tensors whose first dimension is B are repeated
                        along with the images.
                        Default: None
            baselines (float or Tensor, optional): What a masked pixel shows: a number, or a
                        tensor of the inputs' shape (or with first dimension 1).
                        Default: None, which means 0; :class:`MaskRegression` then leaves hidden
                        tokens out of models that are known to allow it
            perturbations_per_eval (int, optional): One forward runs at most this many masked
                        images times B, or fewer if memory runs out. The result does not depend
                        on it.
                        Default: None, which means a number suitable for the device
            interpolate_mode (str, optional): How the token map is enlarged to (H, W).
                        Default: ``"bilinear"``
            show_progress (bool, optional): Whether to show a progress bar.
                        Default: False

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor]*):
                        Shape and dtype of the inputs, the same in every channel. The class
                        documents the range of the values.

        Raises:
            TypeError: an argument has an unsupported type.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model cannot be explained this way; the message says
                        what was found and what is wanted.
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch, scoring = self._checked(
            inputs,
            target,
            additional_forward_args,
            baselines=baselines,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        found = self._masked_saliency(batch, scoring)
        with preserving_state(batch, gradients=False) as call:
            # Without relevance, all masked images are equal and their scores carry no information.
            has_relevance = found.masks.flatten(1).any(dim=-1) | found.relevance.any(dim=-1)
            warn_if_zero(~has_relevance)
            saliency = torch.where(has_relevance.unsqueeze(-1), found.saliency, 0)
            attributions: Images = enlarge(saliency, found.layout, call, interpolate_mode)
        return attributions

    def _masked_saliency(self, batch: Batch, scoring: Scoring) -> MaskedSaliency:
        """Computes token scores from masked versions of the images."""
        raise NotImplementedError

    def _checked(
        self, inputs: Any, target: Any, additional_forward_args: Any, **options: Any
    ) -> tuple[Batch, Scoring]:
        """The arguments of a call, checked; ``options`` are those of ``check_scoring``."""
        batch = make_batch(inputs, target, additional_forward_args)
        scoring = check_scoring(
            self.forward_func,
            batch,
            score=self.score,
            precision=self.precision,
            description=type(self).__name__,
            **options,
        )
        return batch, scoring
