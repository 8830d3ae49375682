"""Attribution methods by name, as maps ready to draw and to score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from captum.attr import IntegratedGradients
from torch import Tensor

from captum_reflected.attr import ReflectedRelevance, TransformerAttribution


@dataclass(frozen=True)
class Method:
    """One way to explain a model.

    Attributes:
        title: its name in figures and tables.
        explain: ``(forward_func, images, target)`` to (B, H, W) maps.
    """

    title: str
    explain: Callable[[Callable[..., Any], Tensor, Tensor], Tensor]


def _reflected(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    return ReflectedRelevance(forward_func).attribute(images, target)[:, 0]


def _transformer(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    return TransformerAttribution(forward_func).attribute(images, target)[:, 0]


def _integrated(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    # Captum's default of 50 steps, in forwards of bounded size.
    attributions: Tensor = IntegratedGradients(forward_func).attribute(
        images, target=target, internal_batch_size=max(16, images.shape[0])
    )
    return attributions.sum(dim=1)


METHODS = {
    "reflected": Method("ReflectedRelevance", _reflected),
    "transformer_attribution": Method("TransformerAttribution", _transformer),
    "integrated_gradients": Method("IntegratedGradients", _integrated),
}
