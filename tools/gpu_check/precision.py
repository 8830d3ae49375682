"""TF32: switched on and off on a GPU, emulated on every other device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# TF32 keeps 10 of the 23 bits of float32's mantissa.
_LOST = 13
_PRODUCTS = frozenset(
    """
    mm bmm addmm baddbmm convolution convolution_backward linear matmul
    """.split()  # noqa: SIM905
)


@contextmanager
def tf32(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Runs float32 products in TF32, or in float32 alone."""
    if device.type != "cuda":
        if enabled:
            with _EmulatedTf32():
                yield
        else:
            yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class _EmulatedTf32(TorchDispatchMode):
    """Rounds the operands of float32 products as the tensor cores do; sums stay in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation, on rounded operands if it is a product."""
        kwargs = kwargs or {}
        if func._schema.name.partition("::")[2] in _PRODUCTS:
            args = tree_map(_rounded, args)
        return func(*args, **kwargs)


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32) + (1 << (_LOST - 1))
    return (bits & ~((1 << _LOST) - 1)).view(torch.float32)
