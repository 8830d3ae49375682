"""A model that runs in a lower precision, its parameters left as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Autocast(nn.Module):
    """Runs a model under ``torch.autocast``; what it returns is float32.

    Args:
        model: images to logits.
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
            logits: Tensor = self.model(images, *args)
        return logits.float()
