"""Why a Vision Transformer decided what it did, inside Captum."""

from captum_reflected.attention import UnsupportedModelError
from captum_reflected.attr import (
    AttentionGradCam,
    AttentionRollout,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.reflection import Reflection, reflected_images
from captum_reflected.tokens import TokenLayout

__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "RawAttention",
    "ReflectedRelevance",
    "Reflection",
    "TokenLayout",
    "TransformerAttribution",
    "UnsupportedModelError",
    "reflected_images",
]
__version__ = "0.1.0"
