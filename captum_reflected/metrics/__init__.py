"""Metrics that score attributions made by any method, in the style of ``captum.metrics``."""

from typing import TYPE_CHECKING, Any

from captum_reflected._extras import import_extra
from captum_reflected.metrics.correlation import rank_correlation
from captum_reflected.metrics.faithfulness import (
    Evaluation,
    average_drop,
    average_increase,
    deletion,
    evaluate,
    insertion,
)
from captum_reflected.metrics.localization import (
    pointing_game,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)
from captum_reflected.metrics.minimal_deletion import minimal_deletion
from captum_reflected.metrics.perturbation import blur, rank_pixels
from captum_reflected.metrics.randomization import layer_names, parameter_randomization
from captum_reflected.metrics.statistics import MeanInterval, mean_interval

if TYPE_CHECKING:
    from captum_reflected.metrics.accumulator import MeanAccumulator

__all__ = [
    "Evaluation",
    "MeanAccumulator",
    "MeanInterval",
    "average_drop",
    "average_increase",
    "blur",
    "deletion",
    "evaluate",
    "insertion",
    "layer_names",
    "mean_interval",
    "minimal_deletion",
    "parameter_randomization",
    "pointing_game",
    "rank_correlation",
    "rank_pixels",
    "relevance_mass_accuracy",
    "relevance_rank_accuracy",
]


def __getattr__(name: str) -> Any:
    # torchmetrics takes seconds to import, and only the accumulator needs it.
    if name == "MeanAccumulator":
        module = import_extra(
            "captum_reflected.metrics.accumulator", "torchmetrics", extra="torchmetrics"
        )
        return module.MeanAccumulator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
