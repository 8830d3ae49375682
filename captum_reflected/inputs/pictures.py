"""Undoes a model's preprocessing, so that its inputs can be shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_reflected.inputs.modules import modules_of

# How far rounding takes pictures beyond the range from 0 to 1.
_ROUNDING = 0.01


def as_pictures(
    forward_func: Callable[..., Any],
    images: Tensor,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Converts model inputs to pictures.

    Args:
        forward_func: the model that takes the images.
        images: (B, 3, H, W) or (B, 1, H, W), as the model takes them.
        mean: the mean that the preprocessing subtracts, one number per channel. If ``mean`` and
            ``std`` are None, they are those of timm's ``pretrained_cfg`` of the model or of a
            :class:`~captum_reflected.models.ZeroShotClassifier`. If the model has neither, images
            from 0 to 1 are shown as they are, and others are scaled to that range, with a warning.
        std: the standard deviation that it divides by.

    Returns:
        Tensor: (B, H, W, 3), from 0 to 1, float32, on the CPU.

    Raises:
        ValueError: the images have another number of channels; mean and std do not fit; or the
            result is not in the range from 0 to 1.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images has shape {tuple(images.shape)}; wanted: (B, 3, H, W) or (B, 1, H, W), so "
            "that they can be shown as pictures"
        )
    if (mean is None) != (std is None):
        given, missing = ("std", "mean") if mean is None else ("mean", "std")
        raise ValueError(f"{given} is given and {missing} is not; wanted: both, or neither")
    source, is_known = "with mean and std undone", True
    if mean is None or std is None:
        found = _statistics_of(forward_func)
        is_known = found is not None
        source = "with the model's own mean and std undone" if is_known else "as they are"
        mean, std = found or ([0.0], [1.0])
    shape = (-1, 1, 1)
    means, stds = (
        torch.as_tensor(values, dtype=torch.float32, device="cpu").reshape(shape)
        for values in (mean, std)
    )
    for name, values in (("mean", means), ("std", stds)):
        if len(values) not in (1, images.shape[1]) or not bool(values.isfinite().all()):
            raise ValueError(
                f"{name} is {values.flatten().tolist()}; wanted: {images.shape[1]} finite numbers, "
                "one per channel"
            )
    pictures = images.detach().float().cpu() * stds + means
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        given = f"images, {source}, have values from {low:.3g} to {high:.3g}"
        wanted = "the mean= and std= that the preprocessing of these images used"
        if is_known:
            raise ValueError(f"{given}; wanted: from 0 to 1. Pass {wanted}")
        warnings.warn(
            f"{given}, so their colours are stretched to be shown; pass {wanted} for the true ones",
            stacklevel=3,
        )
        pictures = (pictures - low) / max(high - low, 1e-12)
    return pictures.clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def _statistics_of(forward_func: Callable[..., Any]) -> tuple[Any, Any] | None:
    """Mean and standard deviation that a model says it was trained with."""
    for module in modules_of(forward_func):
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, dict) and config.get("mean") and config.get("std"):
            return config["mean"], config["std"]
        preprocessing = getattr(module, "preprocessing", None)
        if preprocessing is not None and hasattr(preprocessing, "mean"):
            return preprocessing.mean, preprocessing.std
    return None
