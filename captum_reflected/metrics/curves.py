"""Computes scores of perturbed images, the basis of all faithfulness metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from captum_reflected.inputs.batch import Batch, preserving_state
from captum_reflected.inputs.checks import check_option, check_positive
from captum_reflected.inputs.chunks import rows_per_forward
from captum_reflected.inputs.targets import Score
from captum_reflected.metrics.perturbation import (
    Fill,
    Point,
    resolve_baseline,
    score_points,
)

# RISE removes 1792 of 224 x 224 pixels at a time: 28 steps.
_RISE_STEPS = 28

# Key in place of a curve's name: the whole image, and the image with only its highest pixels.
_WHOLE_AND_KEPT = ""


@dataclass(frozen=True)
class Curve:
    """How an image changes along a curve.

    Attributes:
        keep: True to insert the highest pixels, False to remove them.
        fill: the values of the pixels that are not shown.
    """

    keep: bool
    fill: Fill


@dataclass(frozen=True)
class Scores:
    """The model's scores of B images and of perturbed versions of them.

    All but ``fractions`` have a first dimension more, M, where M maps of each image were scored.

    Attributes:
        curves: (B, S + 1) by name, from nothing to everything removed or inserted.
        fractions: (S + 1,), the share of pixels removed or inserted at each point.
        whole_and_kept: (B, 2), Y and O: the score of the whole image, and the score with only
            its highest pixels kept; None if not requested.
    """

    curves: Mapping[str, Tensor]
    fractions: Tensor
    whole_and_kept: Tensor | None

    def area(self, name: str) -> Tensor:
        """(B,), the area under a curve."""
        return torch.trapezoid(self.curves[name], self.fractions)

    def drop(self, *, normalize: bool) -> Tensor:
        """(B,), max(0, Y - O), divided by Y if ``normalize``; NaN if the ratio is undefined."""
        original, kept = self.original_and_kept()
        drop = (original - kept).clamp(min=0)
        if not normalize:
            return drop
        # No drop is 0 even if Y is 0. The ratio to a logit that is not positive is undefined.
        share = torch.where(original > 0, drop / original, torch.nan)
        return torch.where(drop == 0, drop, share)

    def increase(self) -> Tensor:
        """(B,), 1 where O > Y, else 0; NaN if one of them is NaN."""
        original, kept = self.original_and_kept()
        unknown = original.isnan() | kept.isnan()
        return torch.where(unknown, torch.nan, (kept > original).to(original))

    def original_and_kept(self) -> tuple[Tensor, Tensor]:
        """Y and O of Sago & Hotta's equations 5 and 6, each (B,)."""
        assert self.whole_and_kept is not None
        original, kept = self.whole_and_kept.unbind(dim=-1)
        return original, kept


def score_perturbed(
    forward_func: Callable[..., Any],
    batch: Batch,
    ranks: Tensor,
    curves: Mapping[str, Curve],
    *,
    kept_fill: Fill | None = None,
    fraction_kept: float = 0.5,
    pixels_per_step: int | None = None,
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> Scores:
    """Scores images along curves; versions that several curves or maps share run only once.

    Args:
        forward_func: a function from images (R, C, H, W) to (R, K).
        batch: B images.
        ranks: (B, H, W), from :func:`~captum_reflected.metrics.rank_pixels`, or (M, B, H, W) for
            M maps of each image.
        curves: the curves by name; names must not be empty.
        kept_fill: the values of the pixels that are not kept for average drop and increase;
            None to leave these two out.
        fraction_kept: share of pixels that are kept for them.
        pixels_per_step: as in :func:`~captum_reflected.metrics.evaluate`.
        score: as in :func:`~captum_reflected.metrics.evaluate`.
        max_examples_per_batch: as in :func:`~captum_reflected.metrics.evaluate`.
        show_progress: as in :func:`~captum_reflected.metrics.evaluate`.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit; the message says what was given.
    """
    counts = _pixel_counts(batch, pixels_per_step)
    points = {
        name: [Point(count, keep=curve.keep, baseline=place) for count in counts]
        for place, (name, curve) in enumerate(curves.items())
    }
    fills = [curve.fill for curve in curves.values()]
    if kept_fill is not None:
        kept = Point(_count_kept(counts[-1], fraction_kept), keep=True, baseline=len(fills))
        points[_WHOLE_AND_KEPT] = [Point(0, keep=False, baseline=0), kept]
        fills.append(kept_fill)
    rankings = ranks if ranks.dim() == 4 else ranks.unsqueeze(0)
    points = {
        name: [replace(point, ranking=number) for number in range(len(rankings)) for point in curve]
        for name, curve in points.items()
    }
    check_option("score", score, get_args(Score))
    rows = rows_per_forward(max_examples_per_batch, batch.images.device)
    # Numbers and names are compared by value, tensors and functions by identity.
    keys = [fill if isinstance(fill, (int, float, str)) else id(fill) for fill in fills]

    def canonical(point: Point) -> Point:
        """The canonical point of all points that give the same image, whatever the map."""
        if point.count == (counts[-1] if point.keep else 0):
            return Point(0, keep=False, baseline=0)
        baseline = keys.index(keys[point.baseline])
        if point.count in (0, counts[-1]):
            return Point(0, keep=True, baseline=baseline)
        return replace(point, baseline=baseline)

    versions = list(dict.fromkeys(canonical(point) for curve in points.values() for point in curve))
    with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
        scores = score_points(
            forward_func,
            call,
            rankings,
            versions,
            [resolve_baseline(fill, call.images) for fill in fills],
            score=score,
            rows_per_forward=rows,
            show_progress=show_progress,
        )
        indices = {version: index for index, version in enumerate(versions)}
        found = {
            name: scores[:, [indices[canonical(point)] for point in curve]]
            .unflatten(1, (len(rankings), -1))
            .transpose(0, 1)
            .reshape(*ranks.shape[:-2], -1)
            for name, curve in points.items()
        }
    fractions = torch.tensor(counts, device=scores.device).to(scores) / counts[-1]
    return Scores(found, fractions, found.pop(_WHOLE_AND_KEPT, None))


def _pixel_counts(batch: Batch, pixels_per_step: int | None) -> list[int]:
    """Pixels removed or inserted at each point of a curve, from 0 to all."""
    pixels = batch.images.shape[-2] * batch.images.shape[-1]
    if pixels_per_step is None:
        step = math.ceil(pixels / _RISE_STEPS)
    else:
        step = check_positive("pixels_per_step", pixels_per_step)
    return [*range(0, pixels, step), pixels]


def _count_kept(pixels: int, fraction_kept: float) -> int:
    if isinstance(fraction_kept, bool) or not isinstance(fraction_kept, (int, float)):
        raise TypeError(f"fraction_kept is {fraction_kept!r}; wanted: a number from 0 to 1")
    if not 0 < fraction_kept < 1:
        raise ValueError(f"fraction_kept is {fraction_kept}; wanted: a number between 0 and 1")
    return round(fraction_kept * pixels)
