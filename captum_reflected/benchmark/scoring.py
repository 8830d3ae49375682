"""All metrics of a batch of maps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_reflected.inputs.request import make_batch
from captum_reflected.metrics import (
    pointing_game,
    rank_pixels,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)
from captum_reflected.metrics.faithfulness import drop, increase, pixel_counts, score_curves
from captum_reflected.metrics.perturbation import Baselines, Point

# Metrics that are the area under a curve: whether the highest pixels are kept, and what stands
# for a pixel that is not shown.
_CURVES: dict[str, tuple[bool, float | str]] = {
    "deletion": (False, 0.0),
    "insertion": (True, "blur"),
    "insertion_zero": (True, 0.0),
}

MASK_METRICS: dict[str, Callable[..., Tensor]] = {
    "relevance_mass_accuracy": relevance_mass_accuracy,
    "relevance_rank_accuracy": relevance_rank_accuracy,
    "pointing_game": pointing_game,
}
"""Metrics that want masks of the object; they need no model."""

_FRACTION_KEPT = 0.5


def score_maps(
    forward_func: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    metrics: Sequence[str],
    masks: Tensor | None = None,
) -> dict[str, Tensor]:
    """The metrics of a batch, every version of an image seen by the model once.

    Args:
        forward_func: images (R, C, H, W) to logits (R, K).
        images: (B, C, H, W).
        maps: (B, H, W).
        target: (B,), the class that is scored.
        metrics: names out of :data:`~captum_reflected.report.measures.MEASURES`.
        masks: (B, H, W), wanted by :data:`MASK_METRICS`.

    Returns:
        dict[str, Tensor]: for each metric (B,), and for those with a curve under
        ``NAME_curve`` the curve (B, S + 1).
    """
    of_model = [name for name in metrics if name not in MASK_METRICS]
    result = _faithfulness(forward_func, images, maps, target, of_model) if of_model else {}
    for name in metrics:
        if name in MASK_METRICS and masks is not None:
            result[name] = MASK_METRICS[name](maps, masks=masks.to(maps.device))
    return result


def _faithfulness(
    forward_func: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    metrics: Sequence[str],
) -> dict[str, Tensor]:
    batch = make_batch(images, target, None)
    counts = pixel_counts(batch)
    fills: list[tuple[Baselines, float | str]] = [(None, 0.0), (None, "blur")]
    places = {default: place for place, (_, default) in enumerate(fills)}
    curves = {
        name: [Point(count, keep, places[fill]) for count in counts]
        for name, (keep, fill) in _CURVES.items()
        if name in metrics
    }
    areas = list(curves)
    if len(areas) < len(metrics):  # average drop or increase is among them
        half = round(_FRACTION_KEPT * counts[-1])
        curves["halves"] = [Point(0, keep=False, baseline=0), Point(half, keep=True, baseline=0)]
    scores = score_curves(forward_func, batch, rank_pixels(maps), curves, fills)
    result: dict[str, Tensor] = {}
    if "halves" in scores:
        original, kept = scores["halves"].unbind(dim=1)
        result = {
            "average_drop": drop(original, kept, normalize=False),
            "average_drop_normalized": drop(original, kept, normalize=True),
            "average_increase": increase(original, kept),
        }
        result = {name: values for name, values in result.items() if name in metrics}
    fractions = torch.tensor(counts, device=maps.device) / counts[-1]
    for name in areas:
        result[name] = torch.trapezoid(scores[name], fractions.to(scores[name]))
        result[f"{name}_curve"] = scores[name]
    return result
