"""Metrics that score attributions made by any method, in the style of ``captum.metrics``."""

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
from captum_reflected.metrics.perturbation import blur, rank_pixels

__all__ = [
    "Evaluation",
    "average_drop",
    "average_increase",
    "blur",
    "deletion",
    "evaluate",
    "insertion",
    "pointing_game",
    "rank_pixels",
    "relevance_mass_accuracy",
    "relevance_rank_accuracy",
]
