"""Copies small tensors to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

# Devices that read memory that is not pinned before a copy that is not waited for returns.
READING_FIRST = {"cuda"}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where it is safe, the program does not wait for the copy.

    The values have been read when this returns, so that the caller may change the tensor.
    """
    is_safe = device.type in READING_FIRST and tensor.device.type == "cpu"
    return tensor.to(device, non_blocking=is_safe and not tensor.is_pinned())
