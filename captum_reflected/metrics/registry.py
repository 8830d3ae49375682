"""The metrics of a benchmark by key, with their definitions, and scoring of a batch of maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_reflected.inputs.batch import make_batch
from captum_reflected.metrics.curves import Curve, Scores, score_perturbed
from captum_reflected.metrics.localization import (
    average_precision,
    pointing_game,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)
from captum_reflected.metrics.perturbation import rank_pixels

_RISE = "Petsiuk, Das & Saenko, RISE, BMVC 2018, section 4.2"
_GRAD_CAM_PP = "Chattopadhay et al., Grad-CAM++, WACV 2018, section 4.1"
_CLEVR = "Arras, Osman & Samek, CLEVR-XAI, Information Fusion 81, 2022, section 3.4"


@dataclass(frozen=True)
class Metric:
    """A metric.

    It is computed from a curve (``curve``), from the scores of an image and of its highest
    pixels (``of_kept``), or from masks of the object (``of_masks``).

    Attributes:
        key: its name in code, in the command and in files.
        title: its name in figures and tables.
        low_is_good: whether lower values are better; None if not known.
        meaning: a one-line definition.
        source: the publication that defines it.
        percent: whether it is a share from 0 to 1 that is shown in percent.
        curve: the metric is the area under this curve.
        axis: axis label of the curve: what happens to the pixels along it.
        of_kept: a function from the scores to the metric (B,).
        of_masks: a function from maps (B, H, W), ``masks=`` and ``ignore=`` (B, H, W) to the
            metric (B,).
    """

    key: str
    title: str
    low_is_good: bool | None
    meaning: str
    source: str
    percent: bool = True
    curve: Curve | None = None
    axis: str = ""
    of_kept: Callable[[Scores], Tensor] | None = None
    of_masks: Callable[..., Tensor] | None = None

    @property
    def needs_masks(self) -> bool:
        """Whether it requires masks of the object."""
        return self.of_masks is not None

    @property
    def curve_key(self) -> str:
        """The name of its curve in files."""
        return f"{self.key}_curve"

    @property
    def arrow(self) -> str:
        """An arrow in the direction of better values."""
        return {True: "↓", False: "↑", None: ""}[self.low_is_good]

    @property
    def hint(self) -> str:
        """The direction of better values, in words."""
        return {True: "low is better", False: "high is better", None: ""}[self.low_is_good]

    def format(self, value: float, *, signed: bool = False) -> str:
        """Formats a value for tables: in percent, or with four digits if it is not a share."""
        text = f"{100 * value:.2f}" if self.percent else f"{value:.4g}"
        if float(text) == 0:
            return text.lstrip("-")
        sign = "−" if value < 0 else "+" if signed else ""
        return sign + text.lstrip("-")


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "deletion",
            "Deletion",
            True,
            "Area under the probability of the explained class while pixels are removed, "
            "highest first.",
            _RISE,
            curve=Curve(keep=False, fill=0.0),
            axis="pixels removed",
        ),
        Metric(
            "insertion",
            "Insertion",
            False,
            "Area under that probability while pixels are inserted into the blurred image, "
            "highest first.",
            _RISE,
            curve=Curve(keep=True, fill="blur"),
            axis="pixels inserted, from blur",
        ),
        Metric(
            "insertion_zero",
            "Insertion from zero",
            False,
            "The same, inserted into an image of zeros as the model receives it.",
            f"{_RISE}, with another start",
            curve=Curve(keep=True, fill=0.0),
            axis="pixels inserted, from zero",
        ),
        Metric(
            "average_drop",
            "Average drop",
            True,
            "max(0, Y − O): Y is the probability for the whole image, O with only the highest "
            "half of its pixels kept.",
            "Sago & Hotta, ICPRAM 2024, equation 5",
            of_kept=lambda scores: scores.drop(normalize=False),
        ),
        Metric(
            "average_drop_normalized",
            "Average drop / Y",
            True,
            "max(0, Y − O) / Y: the drop as a share of the probability for the whole image.",
            _GRAD_CAM_PP,
            of_kept=lambda scores: scores.drop(normalize=True),
        ),
        Metric(
            "average_increase",
            "Average increase",
            False,
            "Share of images with O > Y.",
            "Sago & Hotta, ICPRAM 2024, equation 6",
            of_kept=Scores.increase,
        ),
        Metric(
            "relevance_mass_accuracy",
            "Relevance mass",
            False,
            "Share of the positive attribution that lies on the object.",
            _CLEVR,
            of_masks=relevance_mass_accuracy,
        ),
        Metric(
            "relevance_rank_accuracy",
            "Relevance rank",
            False,
            "Share of the K highest pixels that lie on the object of K pixels.",
            _CLEVR,
            of_masks=relevance_rank_accuracy,
        ),
        Metric(
            "pointing_game",
            "Pointing game",
            False,
            "Whether the highest pixel lies on the object.",
            "Zhang et al., Excitation Backprop, IJCV 126, 2018, section 4.2",
            of_masks=pointing_game,
        ),
        Metric(
            "average_precision",
            "Average precision",
            False,
            "Area under the precision-recall curve of the map's pixels as a detector of the "
            "object.",
            "Sum over steps as in scikit-learn's average_precision_score; for maps: Chefer, Gur & "
            "Wolf, CVPR 2021 (mAP)",
            of_masks=average_precision,
        ),
    )
}
"""By key, in the order of the paper's tables."""


def find_metric(key: str) -> Metric:
    """The metric of that name; for an unknown name, a metric without a direction."""
    unknown = Metric(key, key, None, "A metric of this run.", "not known here", percent=False)
    return METRICS.get(key, unknown)


def score_maps(
    forward_func: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    metrics: Sequence[str],
    masks: Tensor | None = None,
    ignore: Tensor | None = None,
    *,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Computes several metrics of a batch; every version of an image is run once.

    Args:
        forward_func: a function from images (R, C, H, W) to logits (R, K).
        images: (B, C, H, W).
        maps: (B, H, W), or (M, B, H, W) for M maps of each image.
        target: (B,), the class that is scored.
        metrics: keys of :data:`METRICS`.
        masks: (B, H, W), true on the object; if None, metrics that need masks are left out.
        ignore: (B, H, W), true where a pixel is neither object nor background; None: nowhere.
        show_progress: whether to show a progress bar.

    Returns:
        dict[str, Tensor]: for each metric (B,), and for those with a curve the curve
        (B, S + 1) under its ``curve_key``; with a first dimension M for M maps.
    """
    chosen = [metric for metric in METRICS.values() if metric.key in metrics]
    curves = {metric.key: metric.curve for metric in chosen if metric.curve is not None}
    needs_kept = any(metric.of_kept is not None for metric in chosen)
    result: dict[str, Tensor] = {}
    if curves or needs_kept:
        scores = score_perturbed(
            forward_func,
            make_batch(images, target, None),
            rank_pixels(maps.flatten(0, 1) if maps.dim() == 4 else maps).view_as(maps),
            curves,
            kept_fill=0.0 if needs_kept else None,
            show_progress=show_progress,
        )
    for metric in chosen:
        if metric.curve is not None:
            result[metric.key] = scores.area(metric.key)
            result[metric.curve_key] = scores.curves[metric.key]
        elif metric.of_kept is not None:
            result[metric.key] = metric.of_kept(scores)
        elif metric.of_masks is not None and masks is not None:
            of_maps = [
                metric.of_masks(one, masks=masks, ignore=ignore)
                for one in (maps if maps.dim() == 4 else [maps])
            ]
            result[metric.key] = torch.stack(of_maps) if maps.dim() == 4 else of_maps[0]
    return result
