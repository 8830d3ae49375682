"""Checks the values that replace masked pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_baselines(baselines: Any, images: Tensor) -> float | Tensor:
    """Checks ``baselines`` and converts them to one format.

    Args:
        baselines: ``None``, which means 0; a number; a tensor shaped like ``images``, or with
            first dimension 1; a 1-tuple of one of these.
        images: (B, C, H, W).

    Returns:
        float or Tensor: a number, or (B, C, H, W) of the images' dtype and device.

    Raises:
        TypeError: ``baselines`` has another type.
        ValueError: its shape is another, or a value is not finite.
    """
    if isinstance(baselines, tuple) and len(baselines) == 1:
        baselines = baselines[0]
    if baselines is None:
        return 0.0
    if isinstance(baselines, bool) or not isinstance(baselines, (int, float, Tensor)):
        raise TypeError(
            f"baselines is a {type(baselines).__name__}; wanted: a number or a tensor shaped "
            "like inputs"
        )
    if not isinstance(baselines, Tensor):
        if not math.isfinite(baselines):
            raise ValueError(f"baselines is {baselines}; wanted: a finite number")
        return float(baselines)
    shape = tuple(images.shape)
    if tuple(baselines.shape) not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"baselines has shape {tuple(baselines.shape)}; wanted: a number, or a tensor of "
            f"shape {shape} or {(1, *shape[1:])}"
        )
    if not bool(torch.isfinite(baselines).all()):
        raise ValueError("baselines holds NaN or infinite values; wanted: finite numbers")
    return baselines.detach().to(images).expand_as(images)
