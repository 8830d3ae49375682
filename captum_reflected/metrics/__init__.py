"""Metrics that score attributions made by any method, in the style of ``captum.metrics``."""

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
    average_precision,
    pointing_game,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)
from captum_reflected.metrics.minimal_deletion import minimal_deletion
from captum_reflected.metrics.perturbation import blur, rank_pixels
from captum_reflected.metrics.randomization import layer_names, parameter_randomization
from captum_reflected.metrics.statistics import MeanInterval, mean_interval

__all__ = [
    "Evaluation",
    "MeanInterval",
    "average_drop",
    "average_increase",
    "average_precision",
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
