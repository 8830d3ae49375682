"""What the speed depends on: rows in a forward, eigenvectors, and the kernels that run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from captum_reflected import (
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.cli.measuring import time_of
from captum_reflected.cli.speed_tasks import (
    TARGET,
    attribution,
    masked_forwards,
    plain_forwards,
)
from captum_reflected.masking.precision import Precision
from gpu_check.precision import tf32
from gpu_check.registry import Context, Report, Skipped, check

_ROWS, _ROWS_ON_CPU = (32, 64, 128, 256), (8, 16)
_REPEATS = 3
_MOST_KERNELS = 12


def _model(context: Context) -> tuple[nn.Module, Tensor]:
    """ViT-B/16 with random weights and 64 images; on a CPU, something smaller."""
    context.skip_if_simulated("has the speed of a CPU")
    name, batch = ("vit_base_patch16_224", 64) if context.on_gpu else ("test_vit", 2)
    with context.device:
        model = timm.create_model(name).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return model, images.to(context.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(time_of(work, device) for _ in range(_REPEATS))


@check("rows", "how the time of masked forwards depends on the rows in each", 20)
def rows_in_a_forward(context: Context, report: Report) -> None:
    """All masks of four images; the default for a GPU is one of these numbers."""
    model, images = _model(context)
    device, some = context.device, images[: 4 if context.on_gpu else 1]
    precisions: tuple[Precision | None, ...] = (None, "bf16") if context.on_gpu else (None,)
    with tf32(device, enabled=context.on_gpu):
        reflection = ReflectedRelevance(model).reflect(some, TARGET)
        for precision in precisions:
            attributor = ReflectedRelevance(model, precision=precision)
            for rows in _ROWS if context.on_gpu else _ROWS_ON_CPU:
                work = masked_forwards(attributor, some, reflection, max(rows // len(some), 1))
                spent = _seconds(work, device) / len(some)
                report.measured(f"{precision or 'float32'}, {rows} rows: seconds an image", spent)


@check("eigenvectors", "what the eigenvectors of MaskRegression take", 20)
def eigenvectors(context: Context, report: Report) -> None:
    """Of matrices as large as the number of image tokens, on the device and on its CPU."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (196, 576) if context.on_gpu else (16,):
        for batch in (1, 64):
            values = torch.randn(batch, tokens, 2 * tokens, generator=generator).to(context.device)
            gram = values @ values.mT
            title = f"{batch} of {tokens} x {tokens}"
            spent = _seconds(partial(torch.linalg.eigh, gram), context.device)
            report.measured(f"{title}: seconds", spent)
            if context.on_gpu and tokens < 500:
                on_cpu = _seconds(partial(torch.linalg.eigh, gram.cpu()), context.device)
                report.measured(f"{title}, on the CPU: seconds", on_cpu)


@check("kernels", "how much of its time the device computes, and in which kernels", 30)
def kernels(context: Context, report: Report) -> None:
    """Of each attributor, masked forwards in bfloat16; the rest of its time the program spends."""
    model, images = _model(context)
    one, many = images[:1], len(images)
    # Most CPUs only emulate bfloat16.
    precision: Precision | None = "bf16" if context.on_gpu else None
    reflected = ReflectedRelevance(model, precision=precision)
    regression = MaskRegression(model, precision=precision)
    works: dict[str, Callable[[], object]] = {
        "plain forward of 1": plain_forwards(model, images, 1, 1),
        f"plain forward of {many}": plain_forwards(model, images, many, many),
        "TransformerAttribution of 1": attribution(TransformerAttribution(model), one),
        f"TransformerAttribution of {many}": attribution(TransformerAttribution(model), images),
        "BalancedRelevance of 1": attribution(BalancedRelevance(model), one),
        f"BalancedRelevance of {many}": attribution(BalancedRelevance(model), images),
        "ReflectedRelevance of 1": attribution(reflected, one),
        "MaskRegression of 1": attribution(regression, one),
        f"MaskRegression of {many}": attribution(regression, images),
    }
    with tf32(context.device, enabled=context.on_gpu):
        for title, work in works.items():
            seconds = _seconds(work, context.device)
            found = _run_on_device(work, context)
            busy = sum(event.self_device_time_total for event in found) / 1e6
            report.measured(f"{title}: seconds", seconds)
            report.measured(f"{title}: kernels", sum(event.count for event in found))
            report.measured(f"{title}: share of the time in kernels", busy / seconds)
            found.sort(key=lambda event: -event.self_device_time_total)
            lines = [
                f"{event.self_device_time_total / 1e3:9.3f} ms {event.count:6} x {event.key[:90]}"
                for event in found[:_MOST_KERNELS]
            ]
            report.notes.append("\n".join([title, *lines]))


def _run_on_device(work: Callable[[], object], context: Context) -> list[Any]:
    """What ran on a GPU, with its time; on a CPU, the operations, which have no such time."""
    kind = ProfilerActivity.CUDA if context.on_gpu else ProfilerActivity.CPU
    with profile(activities={ProfilerActivity.CPU, kind}) as profiler:
        work()
        if context.on_gpu:
            torch.cuda.synchronize(context.device)
    wanted = kind.name
    found = [event for event in profiler.key_averages() if event.device_type.name == wanted]
    if not found:
        raise Skipped("the profiler saw no kernel; it may not be allowed here")
    return found
