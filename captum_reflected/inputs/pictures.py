"""Undoes a model's preprocessing, so that its inputs can be shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_reflected.inputs.modules import modules_of
from captum_reflected.inputs.unfit_images import channels_hint

# How far rounding takes pictures beyond the range from 0 to 1.
_ROUNDING = 0.01


@dataclass(frozen=True)
class PictureScale:
    """Converts model inputs to pictures.

    Attributes:
        mean: (C, 1, 1) or (1, 1, 1), the mean that the preprocessing subtracts.
        std: in the same format, the standard deviation that it divides by.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, H, W, 3), from 0 to 1, float32, on the CPU, of images (B, C, H, W)."""
        pictures = (images.detach().float().cpu() * self.std + self.mean).clamp(0, 1)
        return pictures.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def picture_scale(
    forward_func: Callable[..., Any],
    images: Tensor,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> PictureScale:
    """Finds how model inputs are converted to pictures.

    Args:
        forward_func: the model that takes the images.
        images: (B, 3, H, W) or (B, 1, H, W), as the model takes them.
        mean: the mean that the preprocessing subtracts, one number, or one per channel. If ``mean``
            and ``std`` are None, they are those of timm's ``pretrained_cfg`` of the model or of a
            :class:`~captum_reflected.models.ZeroShotClassifier`. Images from 0 to 1 are then shown
            as they are, with a warning if the model has such numbers; if it has none, other images
            are scaled to that range, with a warning.
        std: the standard deviation that it divides by.

    Raises:
        ValueError: the images have another number of channels; mean and std do not fit; or the
            pictures are not in the range from 0 to 1.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images has shape {tuple(images.shape)}; wanted: (B, 3, H, W) or (B, 1, H, W), so "
            f"that they can be shown as pictures{channels_hint('images', tuple(images.shape))}"
        )
    if (mean is None) != (std is None):
        given, missing = ("std", "mean") if mean is None else ("mean", "std")
        raise ValueError(f"{given} is given and {missing} is not; wanted: both, or neither")
    source, is_known = "with mean and std undone", True
    if mean is None or std is None:
        found = _statistics_of(forward_func, images.shape[1])
        if found is not None and _is_within_range(images):
            warnings.warn(
                "images are from 0 to 1, though the model states a preprocessing that leaves this "
                "range; they are shown as they are. Either they were not preprocessed, and the "
                "model sees something else than it was trained on, or it preprocesses them "
                "itself: then pass mean=0 and std=1",
                stacklevel=4,
            )
            found = None
        is_known = found is not None
        source = "with the model's own mean and std undone" if is_known else "as they are"
        mean, std = found or (0.0, 1.0)
    means, stds = (
        torch.as_tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
        for values in (mean, std)
    )
    for name, values in (("mean", means), ("std", stds)):
        if len(values) not in (1, images.shape[1]) or not bool(values.isfinite().all()):
            raise ValueError(
                f"{name} is {values.flatten().tolist()}; wanted: {images.shape[1]} finite numbers, "
                "one per channel"
            )
    if not bool((stds > 0).all()):
        raise ValueError(f"std is {stds.flatten().tolist()}; wanted: numbers greater than 0")
    pictures = images.detach().float().cpu() * stds + means
    low, high = float(pictures.min()), float(pictures.max())
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return PictureScale(means, stds)
    given = f"images, {source}, have values from {low:.3g} to {high:.3g}"
    wanted = "the mean= and std= that the preprocessing of these images used"
    if is_known:
        raise ValueError(
            f"{given}; wanted: from 0 to 1. Pass {wanted}; if they were not preprocessed, do so, "
            "since the model sees something else than it was trained on"
        )
    warnings.warn(
        f"{given}, so their colours are stretched to be shown; pass {wanted} for the true ones",
        stacklevel=4,
    )
    span = max(high - low, 1e-12)
    return PictureScale((means - low) / span, stds / span)


def _is_within_range(images: Tensor) -> bool:
    return float(images.min()) >= 0 and float(images.max()) <= 1


def _statistics_of(forward_func: Callable[..., Any], channels: int) -> tuple[Any, Any] | None:
    """Mean and standard deviation that a model says it was trained with."""
    for module in modules_of(forward_func):
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, dict) and config.get("mean") and config.get("std"):
            if not any(config["mean"]) and set(config["std"]) == {1.0}:
                return None  # images from 0 to 1
            # A model for grey images keeps the three numbers of its colour version.
            fits = len(config["mean"]) == len(config["std"]) == channels
            return (config["mean"], config["std"]) if fits else None
        preprocessing = getattr(module, "preprocessing", None)
        if preprocessing is not None and hasattr(preprocessing, "mean"):
            return preprocessing.mean, preprocessing.std
    return None
