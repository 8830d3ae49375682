"""Why a Vision Transformer decided what it did, inside Captum."""

from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr import (
    AttentionGradCam,
    AttentionRollout,
    BalancedRelevance,
    MaskFit,
    MaskRegression,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.masking.reflection import Reflection, reflected_images
from captum_reflected.masking.scoring import score_masks
from captum_reflected.relevance.balanced import balanced

__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "BalancedRelevance",
    "MaskFit",
    "MaskRegression",
    "RawAttention",
    "ReflectedRelevance",
    "Reflection",
    "TokenLayout",
    "TransformerAttribution",
    "UnsupportedModelError",
    "balanced",
    "reflected_images",
    "score_masks",
]
__version__ = "0.1.0"
