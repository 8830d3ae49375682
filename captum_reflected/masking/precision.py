"""Runs a model in a lower precision without changing its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_reflected.inputs.outputs import logits_of


class Autocast(nn.Module):
    """Runs a model under ``torch.autocast`` and returns float32.

    Args:
        model: a module from images to logits.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.recommended_start_layer: int = getattr(model, "recommended_start_layer", 0)

    def forward(self, images: Tensor, *args: Any) -> Tensor:
        """Logits (B, K), float32."""
        with torch.autocast(images.device.type, self.dtype):
            logits: Tensor = logits_of(self.model(images, *args))
        return logits.float()
