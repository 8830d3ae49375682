"""Converts attributions of any method to maps of one format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_maps(attributions: Any, shape: tuple[int, int, int], channels: int) -> Tensor:
    """Checks attributions and sums their channels.

    Args:
        attributions: (B, C, H, W), (B, 1, H, W) or (B, H, W), or a 1-tuple of it.
        shape: (B, H, W).
        channels: C.

    Returns:
        Tensor: (B, H, W), detached; half types and whole numbers become float32.

    Raises:
        TypeError: the attributions are not a tensor of real numbers.
        ValueError: the shape does not fit, or a value is not finite.
    """
    if isinstance(attributions, tuple) and len(attributions) == 1:
        attributions = attributions[0]
    if not isinstance(attributions, Tensor):
        raise TypeError(
            f"attributions is a {type(attributions).__name__}; wanted: a tensor shaped like inputs"
        )
    size, *image = shape
    wanted = [(size, channels, *image), (size, 1, *image), shape]
    if tuple(attributions.shape) not in wanted:
        raise ValueError(
            f"attributions has shape {tuple(attributions.shape)}; wanted: {wanted[0]}, "
            f"{wanted[1]} or {wanted[2]}"
        )
    if attributions.is_complex():
        raise TypeError(f"attributions has dtype {attributions.dtype}; wanted: real numbers")
    maps = attributions.detach()
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("attributions holds NaN or infinite values; wanted: finite numbers")
    if maps.dim() == 4:
        maps = maps.sum(dim=1)
        if not bool(torch.isfinite(maps).all()):
            raise ValueError(
                "attributions is so large that its sum over channels is infinite; wanted: "
                "smaller numbers"
            )
    return maps
