"""The mean and standard deviation that a model's preprocessing applied to an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_reflected.inputs.modules import modules_of

Statistics = Sequence[float] | Tensor | None


def picture_statistics(
    forward_func: Callable[..., Any], images: Tensor, mean: Statistics, std: Statistics
) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation with which ``images * std + mean`` is a picture from 0 to 1.

    Args:
        forward_func: the model; a timm model states both in its ``pretrained_cfg``.
        images: (B, C, H, W), as the model takes them.
        mean: one number per channel; None if it is to be found.
        std: one number per channel; None if it is to be found.

    Returns:
        tuple[Tensor, Tensor]: mean and std, each (C,), float32, on the CPU. If neither is given
        and the model states none, images from 0 to 1 are taken as they are: 0 and 1.

    Raises:
        ValueError: only one of them is given, their number is not C, a value is not finite or a
            deviation not positive; or neither is known and the images are not from 0 to 1.
    """
    if (mean is None) != (std is None):
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise ValueError(f"{given} is given and {missing} is not; wanted: both, or neither")
    channels = images.shape[1]
    if mean is None or std is None:
        for module in modules_of(forward_func):
            stated = getattr(module, "pretrained_cfg", None)
            if isinstance(stated, dict) and {"mean", "std"} <= stated.keys():
                mean, std = stated["mean"], stated["std"]
                break
        else:
            low, high = float(images.min()), float(images.max())
            if low < 0 or high > 1:
                raise ValueError(
                    f"images has values from {low:.3g} to {high:.3g}, and the model states no "
                    "preprocessing; wanted: mean and std of the preprocessing, one number per "
                    "channel"
                )
            mean, std = [0.0] * channels, [1.0] * channels
    return _per_channel("mean", mean, channels), _per_channel("std", std, channels)


def _per_channel(name: str, values: Any, channels: int) -> Tensor:
    found = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    if tuple(found.shape) != (channels,) or not bool(found.isfinite().all()):
        raise ValueError(
            f"{name} is {values!r}; wanted: {channels} finite numbers, one for each channel"
        )
    if name == "std" and not bool((found > 0).all()):
        raise ValueError(f"std is {values!r}; wanted: numbers greater than 0")
    return found
