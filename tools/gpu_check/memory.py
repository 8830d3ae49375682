"""The memory of an explanation, and what happens where it does not suffice."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from captum_reflected import ReflectedRelevance, score_masks
from captum_reflected.cli.measuring import measure
from captum_reflected.inputs.chunks import default_rows_per_forward
from gpu_check.accuracy import deviation
from gpu_check.precision import tf32
from gpu_check.registry import Context, Report, Skipped, check
from gpu_check.state import small_model

_FEW, _MANY = 256, 1024


def _model(context: Context) -> tuple[nn.Module, Tensor]:
    name = "vit_base_patch16_224" if context.on_gpu else "test_vit"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    return model.eval().to(context.device), images.to(context.device)


def _peaks(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Peak memory of each function, beyond what was allocated before."""
    for work in works.values():
        work()  # what is allocated once stays
    found = {name: cost.peak_bytes for name, cost in measure(works, device, repeats=1).items()}
    peaks = {name: peak for name, peak in found.items() if peak is not None}
    if len(peaks) < len(works):
        raise Skipped(f"the memory of a {device.type} device cannot be measured")
    return peaks


@check("memory", "an explanation takes the memory of one chunk of forwards, whatever J is", 15)
def memory(context: Context, report: Report) -> None:
    """Against a plain forward of one chunk, and with four times as many masks."""
    device = context.device
    if device.type not in ("cuda", "cpu"):
        raise Skipped(f"the memory of a {device.type} device cannot be measured")
    model, image = _model(context)
    chunk = default_rows_per_forward(device)
    side = image.shape[-1] // 16
    masks = torch.rand(_MANY, side, side, device=device)

    def plain() -> None:
        with torch.inference_mode():
            model(image.expand(chunk, -1, -1, -1).contiguous())

    peaks = _peaks(
        {
            "plain": plain,
            "float32": lambda: ReflectedRelevance(model).attribute(image, 0),
            "bf16": lambda: ReflectedRelevance(model, precision="bf16").attribute(image, 0),
            "few": lambda: score_masks(model, image, masks[:_FEW], 0),
            "many": lambda: score_masks(model, image, masks, 0),
        },
        device,
    )
    report.measured(f"plain forward of {chunk}, MB", peaks["plain"] / 2**20)
    for name in ("float32", "bf16"):
        title = f"ReflectedRelevance of one image, {name}"
        report.measured(f"{title}, MB", peaks[name] / 2**20)
        # A CPU's peak is that of the process, which grows by whatever the allocator keeps.
        report.measured(
            f"{title}: share of the plain forward",
            peaks[name] / peaks["plain"],
            most=1.25 if context.on_gpu else None,
        )
    growth = (peaks["many"] - peaks["few"]) / peaks["plain"]
    report.measured(f"{_FEW} masks, MB", peaks["few"] / 2**20)
    report.measured(f"{_MANY} masks, MB", peaks["many"] / 2**20)
    report.measured(
        "growth from few to many masks, share of the plain forward",
        growth,
        most=0.05 if context.on_gpu else 0.5,
    )


@check("out-of-memory", "where memory runs out, chunks are halved and the map is the same", 10)
def out_of_memory(context: Context, report: Report) -> None:
    """On a GPU by a limit on the process; elsewhere by a model that fails on many images."""
    if context.on_gpu:
        _limited(context, report)
        return
    model, images = small_model(context.device)
    expected = ReflectedRelevance(model).attribute(images, 1)
    sizes: list[int] = []

    def limited(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        if len(batch) > 7 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("more than 7 images")
        output: Tensor = model(batch)
        return output

    _explain_with_little_memory(
        report, lambda: ReflectedRelevance(limited).attribute(images, 1), expected
    )
    report.measured("largest forward that fitted, images", max(n for n in sizes if n <= 7))


def _limited(context: Context, report: Report) -> None:
    device = context.device
    model, image = _model(context)
    attributor = ReflectedRelevance(model)
    with tf32(device, enabled=False):
        expected = attributor.attribute(image, 0, perturbations_per_eval=16)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        attributor.attribute(image, 0, perturbations_per_eval=16)
        needed = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.5 * needed / total, 1.0), device)
        report.measured("memory of the process, MB", 1.5 * needed / 2**20)
        try:
            _explain_with_little_memory(
                report,
                lambda: attributor.attribute(image, 0, perturbations_per_eval=512),
                expected,
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()


def _explain_with_little_memory(
    report: Report, explain: Callable[[], Tensor], expected: Tensor
) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = explain()
    said = [str(one.message) for one in heard if "out of memory" in str(one.message)]
    report.notes += said
    report.measured("warnings of it", len(said), least=1)
    report.measured("map off by", deviation(found, expected), most=1e-3)
