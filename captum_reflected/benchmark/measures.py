"""The metrics of a benchmark by name, and all of them at once for a batch of maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_reflected._inputs import make_batch
from captum_reflected.metrics import (
    pointing_game,
    rank_pixels,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)
from captum_reflected.metrics.faithfulness import drop, pixel_counts, score_curves
from captum_reflected.metrics.perturbation import Baselines, Point


@dataclass(frozen=True)
class Measure:
    """One column of the table.

    Attributes:
        title: its name in tables and figures.
        high_is_good: or low.
        definition: one line, with its source.
        curve: (whether the highest pixels are kept, what stands for a pixel that is not
            shown) of a metric that is the area under a curve.
        mask_metric: maps and masks to one number an image, of a metric that wants masks.
    """

    title: str
    high_is_good: bool
    definition: str
    curve: tuple[bool, float | str] | None = None
    mask_metric: Callable[..., Tensor] | None = None


MEASURES = {
    "deletion": Measure(
        "Deletion",
        False,
        "Area under the probability of the class while pixels become 0 in order of decreasing "
        "attribution (Petsiuk et al., RISE, BMVC 2018)",
        curve=(False, 0.0),
    ),
    "insertion": Measure(
        "Insertion",
        True,
        "The same while pixels are put back, most relevant first, into the blurred image (RISE)",
        curve=(True, "blur"),
    ),
    "insertion_zero": Measure(
        "Insertion from zero",
        True,
        "Insertion into an image of zeros in place of the blurred one",
        curve=(True, 0.0),
    ),
    "average_drop": Measure(
        "Average Drop",
        False,
        "Mean of max(0, Y - O), Y the probability of the image and O that of its most relevant "
        "half, the rest being 0 (Sago & Hotta, ICPRAM 2024, equation 5)",
    ),
    "average_drop_normalized": Measure(
        "Average Drop / Y",
        False,
        "Mean of max(0, Y - O) / Y (Chattopadhay et al., Grad-CAM++, WACV 2018)",
    ),
    "average_increase": Measure(
        "Average Increase",
        True,
        "Share of images with O > Y (Chattopadhay et al.; Sago & Hotta, equation 6)",
    ),
    "relevance_mass_accuracy": Measure(
        "Mass on the object",
        True,
        "Share of the positive attribution inside the object's mask (Arras et al., CLEVR-XAI, "
        "Information Fusion 2022)",
        mask_metric=relevance_mass_accuracy,
    ),
    "relevance_rank_accuracy": Measure(
        "Rank on the object",
        True,
        "Share of the K most relevant pixels inside the mask of K pixels (CLEVR-XAI)",
        mask_metric=relevance_rank_accuracy,
    ),
    "pointing_game": Measure(
        "Pointing game",
        True,
        "Share of images whose most relevant pixel lies inside the mask (Zhang et al., IJCV 2018)",
        mask_metric=pointing_game,
    ),
}

_FRACTION_KEPT = 0.5


def measure(
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
        metrics: names out of :data:`MEASURES`.
        masks: (B, H, W), wanted by those with a mask metric.

    Returns:
        dict[str, Tensor]: for each metric (B,), and for those with a curve under
        ``NAME_curve`` the curve (B, S + 1).
    """
    result: dict[str, Tensor] = {}
    chosen = {name: MEASURES[name] for name in metrics}
    of_model = {name: wanted for name, wanted in chosen.items() if wanted.mask_metric is None}
    if of_model:
        result = _faithfulness(forward_func, images, maps, target, of_model)
    for name, wanted in chosen.items():
        if wanted.mask_metric is not None and masks is not None:
            result[name] = wanted.mask_metric(maps, masks.to(maps.device))
    return result


def _faithfulness(
    forward_func: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    chosen: dict[str, Measure],
) -> dict[str, Tensor]:
    batch = make_batch(images, target, None)
    counts = pixel_counts(batch)
    fills: list[tuple[Baselines, float | str]] = [(None, 0.0), (None, "blur")]
    places = {default: place for place, (_, default) in enumerate(fills)}
    areas = {name: wanted.curve for name, wanted in chosen.items() if wanted.curve is not None}
    curves = {
        name: [Point(count, keep, places[fill]) for count in counts]
        for name, (keep, fill) in areas.items()
    }
    if len(areas) < len(chosen):  # average drop or increase is among them
        half = round(_FRACTION_KEPT * counts[-1])
        curves["halves"] = [Point(0, keep=False, baseline=0), Point(half, keep=True, baseline=0)]
    scores = score_curves(forward_func, batch, rank_pixels(maps), curves, fills)
    result: dict[str, Tensor] = {}
    if "halves" in scores:
        original, kept = scores["halves"].unbind(dim=1)
        result = {
            "average_drop": drop(original, kept, normalize=False),
            "average_drop_normalized": drop(original, kept, normalize=True),
            "average_increase": (kept > original).to(original),
        }
        result = {name: values for name, values in result.items() if name in chosen}
    fractions = torch.tensor(counts, device=maps.device) / counts[-1]
    for name in areas:
        result[name] = torch.trapezoid(scores[name], fractions.to(scores[name]))
        result[f"{name}_curve"] = scores[name]
    return result
