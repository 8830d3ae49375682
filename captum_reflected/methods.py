"""Attribution methods by name, as maps ready to draw and to score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor

from captum_reflected.attr import (
    AttentionGradCam,
    AttentionRollout,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.floors import center_gaussian_maps, random_maps


@dataclass(frozen=True)
class Method:
    """One way to explain a model.

    Attributes:
        title: its name in figures and tables.
        explain: ``(forward_func, images, target)`` to (B, H, W) maps; methods that roll
            out attention also take ``start_layer``, by default the one that the model
            recommends (see :func:`recommended_start_layer`).
        rolls_out: whether it rolls out attention.
    """

    title: str
    explain: Callable[..., Tensor]
    rolls_out: bool = False


def recommended_start_layer(forward_func: Callable[..., Any]) -> int:
    """What :class:`~captum_reflected.models.ZeroShotClassifier` says of itself; 0 for others."""
    layer: int = getattr(forward_func, "recommended_start_layer", 0)
    return layer


def _rolled_out(
    attributor: Callable[..., ReflectedRelevance | TransformerAttribution | AttentionRollout],
) -> Callable[..., Tensor]:
    def explain(
        forward_func: Callable[..., Any],
        images: Tensor,
        target: Tensor,
        *,
        start_layer: int | None = None,
    ) -> Tensor:
        if start_layer is None:
            start_layer = recommended_start_layer(forward_func)
        return attributor(forward_func, start_layer=start_layer).attribute(images, target)[:, 0]

    return explain


def _last_attention(
    attributor: type[RawAttention | AttentionGradCam],
) -> Callable[..., Tensor]:
    def explain(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
        return attributor(forward_func).attribute(images, target)[:, 0]

    return explain


def _integrated(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    # Captum's default of 50 steps, in forwards of bounded size.
    attributions: Tensor = IntegratedGradients(forward_func).attribute(
        images, target=target, internal_batch_size=max(16, images.shape[0])
    )
    return attributions.sum(dim=1)


def _saliency(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    # The largest channel of the absolute gradient: Simonyan, Vedaldi & Zisserman, *Deep Inside
    # Convolutional Networks*, ICLR workshop 2014, section 3.1.
    attributions: Tensor = Saliency(forward_func).attribute(_leaf(images), target, abs=True)
    return attributions.amax(dim=1)


def _input_x_gradient(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    attributions: Tensor = InputXGradient(forward_func).attribute(_leaf(images), target)
    return attributions.detach().sum(dim=1)


def _leaf(images: Tensor) -> Tensor:
    """A tensor of its own, since Captum sets flags on what it differentiates by."""
    return images.detach().requires_grad_()


def _knows_nothing(maps: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def explain(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
        return maps(images)

    return explain


METHODS = {
    "reflected": Method("ReflectedRelevance", _rolled_out(ReflectedRelevance), rolls_out=True),
    "voting": Method(
        "ReflectedRelevance.voting", _rolled_out(ReflectedRelevance.voting), rolls_out=True
    ),
    "transformer_attribution": Method(
        "TransformerAttribution", _rolled_out(TransformerAttribution), rolls_out=True
    ),
    "integrated_gradients": Method("IntegratedGradients", _integrated),
    "saliency": Method("Saliency", _saliency),
    "input_x_gradient": Method("InputXGradient", _input_x_gradient),
    "rollout": Method("AttentionRollout", _rolled_out(AttentionRollout), rolls_out=True),
    "raw_attention": Method("RawAttention", _last_attention(RawAttention)),
    "grad_cam": Method("AttentionGradCam", _last_attention(AttentionGradCam)),
    "random": Method("Random", _knows_nothing(random_maps)),
    "center_gaussian": Method("CenterGaussian", _knows_nothing(center_gaussian_maps)),
}
