"""Why a Vision Transformer decided what it did, inside Captum."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from captum_reflected.explanations import Comparison, Explanation, compare, explain
    from captum_reflected.exploration import ExplorerPage, explorer
    from captum_reflected.masking.reflection import Reflection, reflected_images
    from captum_reflected.masking.scoring import score_masks
    from captum_reflected.relevance.balanced import balanced

__version__ = "0.1.0"
__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "BalancedRelevance",
    "Comparison",
    "Explanation",
    "ExplorerPage",
    "MaskFit",
    "MaskRegression",
    "RawAttention",
    "ReflectedRelevance",
    "Reflection",
    "TokenLayout",
    "TransformerAttribution",
    "UnsupportedModelError",
    "balanced",
    "compare",
    "explain",
    "explorer",
    "reflected_images",
    "score_masks",
]

# Imported when first used, since torch and captum take seconds: the command's help does not.
_MODULES = {
    "attention.tokens": ("TokenLayout",),
    "attr": (
        "AttentionGradCam",
        "AttentionRollout",
        "BalancedRelevance",
        "MaskFit",
        "MaskRegression",
        "RawAttention",
        "ReflectedRelevance",
        "TransformerAttribution",
    ),
    "errors": ("UnsupportedModelError",),
    "exploration": ("ExplorerPage", "explorer"),
    "explanations": ("Comparison", "Explanation", "compare", "explain"),
    "masking.reflection": ("Reflection", "reflected_images"),
    "masking.scoring": ("score_masks",),
    "relevance.balanced": ("balanced",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


_FOLDERS = ("attr", "metrics", "models", "visualization")


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
