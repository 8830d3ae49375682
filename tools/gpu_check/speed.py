"""The speed of explanations in comparison with plain forwards, and the documentation's aims."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn

from captum_reflected import (
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.cli.measuring import Measurement, matmul_peak, measure
from captum_reflected.cli.speed_tasks import (
    TARGET,
    attribution,
    batch_sizes_to_try,
    batch_that_fits,
    fast_batch_sizes,
    layout_of,
    masked_forwards,
    plain_forwards,
)
from captum_reflected.masking.precision import Precision
from gpu_check.precision import tf32
from gpu_check.registry import Context, Report, check

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
    context.skip_if_simulated("has the speed of a CPU")
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
    batch = batch_that_fits(model, images) if context.on_gpu else 2
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


def _works(
    model: nn.Module, images: Tensor, tokens: int, best: int, batch: int
) -> dict[str, Callable[[], object]]:
    one, many = images[:1], images[:batch]
    plain = partial(plain_forwards, model, images)
    half = copy.deepcopy(model).bfloat16()
    reflection = ReflectedRelevance(model).reflect(one, TARGET)
    works: dict[str, Callable[[], object]] = {
        "J forwards": plain(tokens, best),
        "J forwards, autocast to bf16": plain(tokens, best, bf16=True),
        "J forwards of the model in bf16": plain_forwards(half, images.bfloat16(), tokens, best),
        "forward of the batch": plain(batch, batch),
        "TransformerAttribution of 1": attribution(TransformerAttribution(model), one),
        "TransformerAttribution": attribution(TransformerAttribution(model), many),
        "BalancedRelevance of 1": attribution(BalancedRelevance(model), one),
        "BalancedRelevance": attribution(BalancedRelevance(model), many),
    }
    precisions: tuple[Precision | None, ...] = (None, "bf16")
    for precision in precisions:
        suffix = "" if precision is None else f", {precision}"
        reflected = ReflectedRelevance(model, precision=precision)
        regression = MaskRegression(model, precision=precision)
        works |= {
            f"ReflectedRelevance{suffix}": attribution(reflected, one),
            f"masked forwards alone{suffix}": masked_forwards(reflected, one, reflection),
            f"MaskRegression of 1{suffix}": attribution(regression, one),
            f"MaskRegression{suffix}": attribution(regression, many),
        }
    return works


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
    of_one = title.startswith(("J forwards", "Reflected", "masked")) or " of 1" in title
    is_bf16 = title.endswith("bf16")
    one_pass = title in ("TransformerAttribution", "BalancedRelevance")
    number = 1 if of_one else batch
    label = f"{name}, {title}"
    aimed_seconds: float | None = None
    if has_aims and title == "ReflectedRelevance, bf16":
        gpu = torch.cuda.get_device_name(context.device)
        aimed_seconds = next((s for part, s in _MOST_SECONDS.items() if part in gpu), None)
    if has_aims and title == "MaskRegression, bf16":
        aimed_seconds = _MOST_SECONDS_OF_MASK_REGRESSION
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
