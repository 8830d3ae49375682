"""Runs a model in a lower precision without changing its parameters."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from captum_reflected.inputs.outputs import logits_of

Precision: TypeAlias = Literal["bf16", "bfloat16"] | torch.dtype
"""What the forwards of masked images may be told to compute in: bfloat16, by any of its names."""

_CANONICAL: dict[Any, str] = {
    "float32": "float32",
    torch.float32: "float32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    torch.bfloat16: "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    torch.float16: "fp16",
}
PRECISION_NAMES = tuple(name for name in _CANONICAL if isinstance(name, str))
"""All names of precisions that are understood."""


def canonical_precision(precision: Any) -> str:
    """The one name of a precision that is stored and compared.

    Args:
        precision: one of :data:`PRECISION_NAMES`, or a dtype of torch.

    Returns:
        str: ``"float32"``, ``"bf16"`` or ``"fp16"``.

    Raises:
        ValueError: there is no such precision.
    """
    with suppress(KeyError, TypeError):  # not hashable
        return _CANONICAL[precision]
    raise ValueError(f"precision is {precision!r}; wanted: one of {', '.join(PRECISION_NAMES)}")


def bf16_or_none(precision: Any) -> Literal["bf16"] | None:
    """The checked ``precision`` of masked forwards; raises ValueError for one they do not have."""
    if precision is None:
        return None
    with suppress(ValueError):
        if canonical_precision(precision) == "bf16":
            return "bf16"
    raise ValueError(
        f'precision is {precision!r}; wanted: None or "bf16", also as "bfloat16" or torch.bfloat16'
    )


def may_use_tf32(device: torch.device) -> bool:
    """Whether products and convolutions of float32 may be rounded to TF32 on a device."""
    if device.type != "cuda":
        return device.type != "cpu"  # what other devices do is not known
    try:
        return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch's newer settings are in use, and refuse this question
        return True


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
