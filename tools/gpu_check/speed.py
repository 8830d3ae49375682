"""The speed of explanations in comparison with plain forwards, and the documentation's aims."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from captum_reflected import (
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.cli.main import main as captum_reflected
from captum_reflected.cli.measuring import Measurement, matmul_peak, measure
from captum_reflected.cli.speed_tasks import (
    attribution,
    batch_sizes_to_try,
    fast_batch_sizes,
    layout_of,
)
from gpu_check.precision import tf32
from gpu_check.registry import Context, Report, Skipped, check

_BATCH = 64
_REPEATS = 3
_BASE = "vit_base_patch16_224"
# Seconds an explanation of ViT-B/16 in bfloat16, by a part of the GPU's name.
_MOST_SECONDS = {"H200": 0.025, "H100": 0.040}
_LEAST_SHARE = 0.5
_MOST_FORWARDS = 3.5
_MOST_SECONDS_OF_MASK_REGRESSION = 0.004


@check("speed", "explanations take as many plain forwards as the documentation says", 150)
def speed(context: Context, report: Report) -> None:
    """Each attributor against J plain forwards, in float32 with TF32 and in bfloat16."""
    if context.device.type not in ("cuda", "cpu"):
        raise Skipped("the simulated device has the speed of a CPU")
    with tf32(context.device, enabled=context.on_gpu):
        peaks = {
            dtype: matmul_peak(dtype, context.device) for dtype in (torch.float32, torch.bfloat16)
        }
        for dtype, peak in peaks.items():
            name = str(dtype).removeprefix("torch.")
            report.measured(f"peak of a matrix product in {name}, TFLOP/s", peak / 1e12)
        for name in context.speed_models:
            if context.seconds_left < 30:
                report.problems.append(f"no time was left for {name}")
                continue
            try:
                _of_model(context, report, name, peaks)
            except torch.OutOfMemoryError as error:
                report.problems.append(f"{name}: {error}")
            if context.on_gpu:
                torch.cuda.empty_cache()


def _of_model(context: Context, report: Report, name: str, peaks: dict[torch.dtype, float]) -> None:
    device = context.device
    with device:
        model = timm.create_model(name).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    most = max(batch_sizes_to_try(device))
    images = torch.randn(most, *size, generator=torch.Generator().manual_seed(0)).to(device)
    batch = _batch_that_fits(model, images[: _BATCH if context.on_gpu else 2])
    layout = layout_of(model, images[:1])
    tokens = layout.num_image_tokens
    (best, *_) = fast_batch_sizes(model, images)
    works = _works(model, images, tokens, best, batch)
    costs = measure(works, device, _REPEATS if context.on_gpu else 1)
    report.measured(f"{name}: J", tokens)
    report.measured(f"{name}: best batch of plain forwards", best)
    report.measured(f"{name}: batch of the other attributors", batch)
    aims = name == _BASE and context.on_gpu
    for title, cost in costs.items():
        _add(report, context, name, title, cost, costs, peaks, batch=batch, has_aims=aims)


def _batch_that_fits(model: nn.Module, images: Tensor) -> int:
    """How many images a one-pass attributor explains at once; half of them if memory runs out."""
    while True:
        try:
            for one_pass in (TransformerAttribution, BalancedRelevance):
                one_pass(model).attribute(images, 0)
            return len(images)
        except torch.OutOfMemoryError:
            images = images[: len(images) // 2]
        torch.cuda.empty_cache()


def _works(
    model: nn.Module, images: Tensor, tokens: int, best: int, batch: int
) -> dict[str, Callable[[], object]]:
    one, many = images[:1], images[:batch]

    def plain(count: int, rows: int, *, bf16: bool = False) -> Callable[[], None]:
        def run() -> None:
            with (
                torch.inference_mode(),
                torch.autocast(images.device.type, torch.bfloat16, enabled=bf16),
            ):
                for start in range(0, count, rows):
                    model(images[: min(rows, count - start)])

        return run

    return {
        "J forwards": plain(tokens, best),
        "J forwards, bf16": plain(tokens, best, bf16=True),
        "ReflectedRelevance": attribution(ReflectedRelevance(model), one),
        "ReflectedRelevance, bf16": attribution(ReflectedRelevance(model, precision="bf16"), one),
        "forward of the batch": plain(batch, batch),
        "TransformerAttribution": attribution(TransformerAttribution(model), many),
        "BalancedRelevance": attribution(BalancedRelevance(model), many),
        "MaskRegression": attribution(MaskRegression(model), many),
        "MaskRegression, bf16": attribution(MaskRegression(model, precision="bf16"), many),
    }


def _add(
    report: Report,
    context: Context,
    name: str,
    title: str,
    cost: Measurement,
    costs: dict[str, Measurement],
    peaks: dict[torch.dtype, float],
    *,
    batch: int,
    has_aims: bool,
) -> None:
    of_one = title.startswith(("J forwards", "ReflectedRelevance"))
    is_bf16 = title.endswith("bf16")
    one_pass = title in ("TransformerAttribution", "BalancedRelevance")
    number = 1 if of_one else batch
    label = f"{name}, {title}"
    aimed_seconds: float | None = None
    if has_aims and title == "ReflectedRelevance, bf16":
        gpu = torch.cuda.get_device_name(context.device)
        aimed_seconds = next((s for part, s in _MOST_SECONDS.items() if part in gpu), None)
    if has_aims and title.startswith("MaskRegression"):
        aimed_seconds = _MOST_SECONDS_OF_MASK_REGRESSION if is_bf16 else None
    per = "" if title.startswith("J forwards") else " an image"
    report.measured(f"{label}: seconds{per}", cost.seconds / number, most=aimed_seconds)
    against = costs["J forwards" if of_one else "forward of the batch"]
    unit = "J forwards in float32" if of_one else f"forwards of {batch} in float32"
    report.measured(
        f"{label}: {unit}",
        cost.seconds / against.seconds,
        most=_MOST_FORWARDS if one_pass and context.on_gpu else None,
    )
    share = cost.flops / cost.seconds / peaks[torch.bfloat16 if is_bf16 else torch.float32]
    aimed_share = _LEAST_SHARE if has_aims and title == "ReflectedRelevance, bf16" else None
    report.measured(f"{label}: share of the matmul peak", share, least=aimed_share)
    if cost.peak_bytes is not None and context.on_gpu:
        report.measured(f"{label}: memory, MB", cost.peak_bytes / 2**20)


@check("speed-command", "the command captum-reflected speed runs on the device", 40)
def speed_command(context: Context, report: Report) -> None:
    """Its table is kept as a note."""
    if context.device.type not in ("cuda", "cpu"):
        raise Skipped("the simulated device has the speed of a CPU")
    name = _BASE if context.on_gpu else "demo"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "speed.md"
        arguments = ["speed", "--model", name, "--device", str(context.device), "--repeats", "1"]
        arguments += ["--no-others", "--batch-size", "64" if context.on_gpu else "8"]
        arguments += ["--random-weights"] if context.on_gpu else []
        with contextlib.redirect_stdout(io.StringIO()):
            status = captum_reflected([*arguments, "--output", str(output)])
        report.measured("exit status", status, most=0)
        report.notes.append(output.read_text(encoding="utf-8"))
