"""The texts, the table and the plot of ``captum-reflected speed``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from captum_reflected._writing import write_whole
from captum_reflected.attr import ReflectedRelevance, TransformerAttribution
from captum_reflected.cli.measuring import (
    Measurement,
    flops_of,
    matmul_peak,
    measure,
    slope,
    time_of,
)
from captum_reflected.cli.speed_tasks import (
    IN_BATCHES_OF,
    Task,
    attribution,
    batch_sizes_to_try,
    fast_batch_sizes,
    layout_of,
    other_tasks,
    own_tasks,
)
from captum_reflected.metrics import rank_correlation
from captum_reflected.models import ModelLoadError
from captum_reflected.models.pictures import read_picture
from captum_reflected.visualization.notebook_figure import figure_bytes


def random_model(name: str, device: torch.device, **options: Any) -> nn.Module:
    """A model of timm with random weights, in eval mode; ``options`` go to its constructor."""
    if not timm.is_model(name):
        raise ModelLoadError(f"unknown model {name!r}; wanted: a name that timm knows")
    model: nn.Module = timm.create_model(name, **options)
    return model.eval().to(device)


def speed_table(
    model: nn.Module,
    size: torch.Size,
    device: torch.device,
    *,
    name: str,
    batch_size: int | None,
    precision: str,
    repeats: int,
    others: bool,
) -> str:
    """Measures all tasks alternately; returns a table with a description above it.

    Args:
        model: the model to explain.
        size: (C, H, W) of its images.
        device: the device of the model.
        name: the name of the model.
        batch_size: of the plain forwards; None: the fastest ones in a trial.
        precision: of the reflected forwards, ``"float32"``, ``"bf16"`` or ``"both"``.
        repeats: how often each row is timed; the fastest counts.
        others: whether to measure other methods, too.
    """
    generator = torch.Generator().manual_seed(0)
    most = max(batch_size or 0, *batch_sizes_to_try(device))
    images = torch.randn(most, *size, generator=generator).to(device)
    layout = layout_of(model, images[:1])
    sizes = [batch_size] if batch_size else fast_batch_sizes(model, images)
    tasks = list(own_tasks(model, images, layout, sizes, precision))
    if others:
        tasks += other_tasks(model, images, layout, sizes[0])
    # Measured before and after, in case another program uses the cores at one of these times.
    peaks = {dtype: matmul_peak(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a random model, the relevance may be zero
        measured = measure({task.title: task.run for task in tasks}, device, repeats)
    peaks = {dtype: max(peak, matmul_peak(dtype, device)) for dtype, peak in peaks.items()}
    tokens = layout.num_image_tokens
    peak = {dtype: f"{flops / 1e9:.0f} GFLOP/s" for dtype, flops in peaks.items()}
    return (
        f"{name}, {size[-2]} x {size[-1]} pixels, J = {tokens}. Fastest of "
        f"{repeats} alternating run(s); ratios are to the fastest row of that name. Peak "
        f"of a matrix product: {peak[torch.float32]} in float32, {peak[torch.bfloat16]} in "
        f"bfloat16. {_float32_products(device)}Memory is the peak of a row beyond the model.\n\n"
    ) + table(tasks, measured, peaks)


def _float32_products(device: torch.device) -> str:
    """Which unit of a GPU the float32 products ran on; empty for a CPU."""
    if device.type != "cuda":
        return ""
    is_tf32 = torch.get_float32_matmul_precision() != "highest"
    return f"Products in float32 were in {'TF32' if is_tf32 else 'float32 itself'}. "


def table(
    tasks: list[Task], measured: dict[str, Measurement], peaks: dict[torch.dtype, float]
) -> str:
    """The measured tasks as a Markdown table.

    Args:
        tasks: the rows.
        measured: what each costs, by title.
        peaks: FLOP/s of a matrix product, by dtype.
    """
    lines = [
        "| | images | time (s) | ms/image | GFLOP/s | of the peak | memory (MB) | ratio | to |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for task in tasks:
        cost = measured[task.title]
        rate = cost.flops / cost.seconds
        against = task.against or task.title
        ratio = cost.seconds / min(
            other.seconds
            for title, other in measured.items()
            if title == against or title.startswith(f"{against}{IN_BATCHES_OF}")
        )
        memory = "" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f}"
        lines.append(
            f"| {task.title} | {task.images} | {cost.seconds:.4f} | "
            f"{1e3 * cost.seconds / task.images:.3g} | {rate / 1e9:.0f} | "
            f"{rate / peaks[task.dtype]:.0%} | {memory} | {ratio:.3f} | {task.against} |"
        )
    return "\n".join(lines)


def bf16_agreement(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    photos: list[Path],
    device: torch.device,
) -> str:
    """The correlation of maps in bfloat16 with those in float32, on photos."""
    full, half = ReflectedRelevance(model), ReflectedRelevance(model, precision="bf16")
    correlations = []
    for path in tqdm(photos, desc="bf16 maps", unit="photo", disable=None):
        image = transform(read_picture(path))[None].to(device)
        with torch.no_grad():
            target = int(model(image).argmax())
        maps = [method.attribute(image, target)[:, 0] for method in (full, half)]
        correlations.append(float(rank_correlation(*maps)))
    return (
        f'Maps with precision="bf16" against float32 on {len(photos)} photos, Spearman '
        f"correlation over pixels: mean {sum(correlations) / len(correlations):.4f}, least "
        f"{min(correlations):.4f}."
    )


def large_image(name: str, side: int, device: torch.device) -> str:
    """The cost of TransformerAttribution for one image of ``side`` x ``side`` pixels."""
    model = random_model(name, device, img_size=side)
    channels = resolve_model_data_config(model)["input_size"][0]
    image = torch.randn(1, channels, side, side, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a random model, the relevance may be zero
        tasks = {"": attribution(TransformerAttribution(model), image)}
        cost = measure(tasks, device, repeats=1)[""]
        tokens = layout_of(model, image).num_tokens
    memory = "" if cost.peak_bytes is None else f", {cost.peak_bytes / 2**30:.2f} GiB at most"
    return (
        f"TransformerAttribution of one image of {side} x {side} pixels ({name}, random weights, "
        f"N = {tokens}): {cost.seconds:.1f} s{memory}."
    )


def scaling(name: str, device: torch.device, plot: Path) -> str:
    """Measures how the cost scales with image size, batch size and depth; writes a plot."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    lines = ["| cost with | measured at | expected exponent | fitted |", "|---|---|---:|---:|"]
    for axes, (title, points) in zip(
        figure.subplots(1, 3), _scaling_points(name, device).items(), strict=True
    ):
        x = [float(value) for value, _, _ in points]
        seconds, flops = [point[1] for point in points], [point[2] for point in points]
        expected, fitted = slope(x, flops), slope(x, seconds)
        values = ", ".join(f"{value:g}" for value in x)
        lines.append(f"| {title} | {values} | {expected:.2f} | {fitted:.2f} |")
        axes.loglog(x, seconds, "o-", label=f"measured, exponent {fitted:.2f}")
        line = [seconds[0] * value / flops[0] for value in flops]
        axes.loglog(x, line, "--", label=f"by its FLOPs, {expected:.2f}")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_xlabel(title)
        axes.set_ylabel("seconds")
        axes.legend()
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_whole(plot, figure_bytes(figure, "png", dpi=120))
    return (
        f"How the cost of ReflectedRelevance grows ({name}, random weights; the expected "
        "exponent is that of the FLOPs of J plain forwards):\n\n" + "\n".join(lines)
    )


def _scaling_points(name: str, device: torch.device) -> dict[str, list[tuple[int, float, float]]]:
    """By the quantity that is varied: (its value, seconds, FLOPs of the plain forwards)."""
    model = random_model(name, device)
    size = resolve_model_data_config(model)["input_size"]
    depth = len(model.blocks) if isinstance(model.blocks, nn.Sequential) else 12
    points: dict[str, list[tuple[int, float, float]]] = {}

    def add(title: str, value: int | None, model: nn.Module, batch_size: int, side: int) -> None:
        images = torch.randn(batch_size, size[0], side, side, device=device)
        tokens = layout_of(model, images[:1]).num_image_tokens
        with torch.no_grad():
            flops = flops_of(lambda: model(images)) * tokens
        seconds = time_of(attribution(ReflectedRelevance(model), images), device)
        points.setdefault(title, []).append((value or tokens, seconds, flops))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = layout_of(model, torch.randn(1, *size, device=device)).grid_size[0]
        sides = [size[1] // rows * round(rows * factor) for factor in (1, 9 / 7, 12 / 7, 16 / 7)]
        for side in tqdm(sides, desc="image size", disable=None):
            add("J (image size)", None, random_model(name, device, img_size=side), 1, side)
        for batch_size in tqdm((1, 2, 4), desc="batch size", disable=None):
            add("B (images)", batch_size, model, batch_size, size[1])
        for blocks in tqdm((depth // 4, depth // 2, depth), desc="depth", disable=None):
            add("depth (blocks)", blocks, random_model(name, device, depth=blocks), 1, size[1])
    return points
