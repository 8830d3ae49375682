"""Measures time, FLOPs and peak memory of several functions in one run."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from captum_reflected.masking.onednn import linear_operation

_PEAK_SECONDS = 5.0


@dataclass(frozen=True)
class Measurement:
    """The cost of a function call.

    Attributes:
        seconds: the time of the fastest repetition.
        flops: multiplications and additions of its matrix products and convolutions.
        peak_bytes: peak memory beyond what was allocated before; ``None`` if the system does not
            report it.
    """

    seconds: float
    flops: int
    peak_bytes: int | None


def measure(
    works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Measurement]:
    """Measures functions alternately, so that a slow period of the machine affects all of them.

    Args:
        works: the functions by name. Each runs once for FLOPs and memory, and then ``repeats``
            times.
        device: the device that they use.
        repeats: how often each is timed.

    Returns:
        dict[str, Measurement]: in the order of ``works``.
    """
    costs: dict[str, tuple[int, int | None]] = {}
    seconds = dict.fromkeys(works, math.inf)
    with tqdm(total=len(works) * (1 + repeats), desc="measuring", unit="run", disable=None) as bar:
        for name, work in works.items():
            bar.set_postfix_str(name)
            costs[name] = _flops_and_memory(work, device)
            bar.update()
        for _ in range(repeats):
            for name, work in works.items():
                bar.set_postfix_str(name)
                seconds[name] = min(seconds[name], time_of(work, device))
                bar.update()
    return {name: Measurement(seconds[name], *costs[name]) for name in works}


def time_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the function has finished on its device."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def flops_of(work: Callable[[], object]) -> int:
    """FLOPs of the function's matrix products and convolutions."""
    with _Flops() as counter:
        work()
    return int(counter.total)


class _Flops(TorchDispatchMode):
    """Adds up torch's FLOP formulas; torch's own counter fails with autograd.grad."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        # torch has no formulas for fused attention on a CPU and for oneDNN's linear layer.
        aten = torch.ops.aten
        self._same = {
            aten._scaled_dot_product_flash_attention_for_cpu: (
                aten._scaled_dot_product_flash_attention
            ),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                aten._scaled_dot_product_flash_attention_backward
            ),
        }
        self._linear = linear_operation()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Counts the operation, or the operations that it decomposes into."""
        kwargs = kwargs or {}
        operation = func._overloadpacket
        formula = flop_registry.get(self._same.get(operation, operation))
        if formula is None and operation is not torch.ops.prim.device:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        elif self._linear is not None and operation is self._linear:
            self.total += 2 * args[0].numel() * len(args[1])
        return output


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest product of two square matrices in a few seconds of trials."""
    best, spent = 0.0, 0.0
    for side in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        left, right = torch.randn(2, side, side, device=device, dtype=dtype)
        for _ in range(8):
            if spent > _PEAK_SECONDS:  # a CPU that only emulates bfloat16 would take minutes
                return best
            seconds = time_of(lambda: left @ right, device)  # noqa: B023
            best, spent = max(best, 2.0 * side**3 / seconds), spent + seconds
    return best


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of y = c * x ** k, fitted to the logarithms by least squares."""
    logs: list[list[float]] = [[math.log(value) for value in values] for values in (x, y)]
    means = [sum(values) / len(values) for values in logs]
    pairs = [(a - means[0], b - means[1]) for a, b in zip(*logs, strict=True)]
    return float(sum(a * b for a, b in pairs) / sum(a * a for a, _ in pairs))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _flops_and_memory(work: Callable[[], object], device: torch.device) -> tuple[int, int | None]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        flops = flops_of(work)
        return flops, torch.cuda.max_memory_allocated(device) - held
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return flops_of(work), None
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    held = _resident("VmRSS")
    flops = flops_of(work)
    return flops, _resident("VmHWM") - held


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024
