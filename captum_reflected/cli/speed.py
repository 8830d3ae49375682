"""How fast the methods are, beside plain forwards and beside other methods, in one run."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from captum.attr import IntegratedGradients, Occlusion
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from captum_reflected._writing import write_whole
from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr import MaskRegression, ReflectedRelevance, TransformerAttribution
from captum_reflected.cli.measuring import (
    Measurement,
    flops_of,
    matmul_peak,
    measure,
    slope,
    time_of,
)
from captum_reflected.cli.options import resolve_device, whole_number
from captum_reflected.errors import UsageError
from captum_reflected.inputs.request import default_rows_per_forward, make_batch
from captum_reflected.masking.model_structure import can_drop_tokens
from captum_reflected.masking.reflection import Reflection, reflected_images
from captum_reflected.masking.scoring import score_masks
from captum_reflected.metrics import evaluate, rank_correlation
from captum_reflected.models import ModelLoadError, load_model
from captum_reflected.models.pictures import read_picture

_TARGET = 0
_ATTRIBUTION_BATCH = 16
_EVALUATED = 2
_BY = " in batches of "
_MASK_REGRESSION: tuple[dict[str, Any], ...] = (
    {},
    {"drop_hidden": True},
    {"drop_hidden": True, "precision": "bf16"},
    {"num_masks": 10, "drop_hidden": True, "precision": "bf16"},
)


@dataclass(frozen=True)
class _Work:
    """A row of the table.

    Attributes:
        title: its name.
        run: does it.
        images: how many images it explains, scores or forwards.
        against: title of the forwards that it is a multiple of; where there are several, "TITLE
            in batches of N", of the fastest. Empty for a row that others are compared with.
        dtype: whose peak its FLOP/s are a share of.
    """

    title: str
    run: Callable[[], object]
    images: int
    against: str = ""
    dtype: torch.dtype = torch.float32


def add_speed_command(commands: Any) -> None:
    """Adds the subcommand ``speed``."""
    parser = commands.add_parser(
        "speed",
        description="Measures ReflectedRelevance, TransformerAttribution and the metrics beside "
        "plain forwards of the model and beside other methods, in one run, and prints a table: "
        "time, images per second, FLOP/s and their share of the machine's own peak, peak memory.",
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", metavar="NAME",
                        help="as for explain (default: %(default)s)")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE.safetensors",
                        help="as for explain")  # fmt: skip
    source.add_argument("--random-weights", action="store_true",
                        help="no weights are loaded: speed does not depend on them")  # fmt: skip
    parser.add_argument("--device", default="auto", help="as for explain (default: %(default)s)")
    parser.add_argument("--batch-size", type=whole_number(1), metavar="N",
                        help="of the plain forwards (default: those that are fastest in a trial, "
                        "of which the fastest counts)")  # fmt: skip
    parser.add_argument("--precision", default="both", choices=("float32", "bf16", "both"),
                        help="of the reflected forwards (default: %(default)s)")  # fmt: skip
    parser.add_argument("--repeats", type=whole_number(1), default=3, metavar="N",
                        help="the fastest of N runs counts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no-others", dest="others", action="store_false",
                        help="leave out other methods")  # fmt: skip
    parser.add_argument("--no-table", dest="table", action="store_false",
                        help="only what the options below ask for")  # fmt: skip
    parser.add_argument("--photos", nargs="+", type=Path, default=[], metavar="IMAGE",
                        help="also compare the maps in bf16 with those in float32")  # fmt: skip
    parser.add_argument("--image-size", type=whole_number(1), metavar="PIXELS",
                        help="also run TransformerAttribution on one image of so many pixels a "
                        "side, with random weights")  # fmt: skip
    parser.add_argument("--scaling", type=Path, metavar="FILE.png",
                        help="also measure how the cost grows, and plot it")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.md",
                        help="a file for what is printed")  # fmt: skip
    parser.set_defaults(run=lambda arguments: _run(arguments, resolve_device(arguments.device)))


def _run(arguments: argparse.Namespace, device: torch.device) -> int:
    if not (arguments.table or arguments.photos or arguments.image_size or arguments.scaling):
        raise UsageError(
            "--no-table leaves nothing to measure; wanted: --photos, --image-size or --scaling"
        )
    if (arguments.scaling or arguments.image_size) and not timm.is_model(arguments.model):
        raise ModelLoadError(
            f"{arguments.model!r} cannot be made in other sizes; wanted: a name that timm knows"
        )
    model, transform = _load(arguments, device)
    size = transform(Image.new("RGB", (512, 512))).shape
    texts = [f"{_machine(device)}."]
    if arguments.table:
        texts.append(_speed(model, size, device, arguments))
    if arguments.photos:
        texts.append(_agreement(model, transform, arguments.photos, device))
    if arguments.image_size:
        texts.append(_large_image(arguments.model, arguments.image_size, device))
    if arguments.scaling:
        texts.append(_scaling(arguments.model, device, arguments.scaling))
    text = "\n\n".join(texts)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, f"{text}\n".encode())
    return 0


def _load(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    if not arguments.random_weights:
        loaded = load_model(arguments.model, weights=arguments.weights, device=device)
        return loaded.model, loaded.transform
    model = _random_model(arguments.model, device)
    return model, create_transform(**resolve_model_data_config(model), is_training=False)


def _random_model(name: str, device: torch.device, **options: Any) -> nn.Module:
    if not timm.is_model(name):
        raise ModelLoadError(f"unknown model {name!r}; wanted: a name that timm knows")
    model: nn.Module = timm.create_model(name, **options)
    return model.eval().to(device)


# -- the table ---------------------------------------------------------------------------


def _speed(
    model: nn.Module, size: torch.Size, device: torch.device, arguments: argparse.Namespace
) -> str:
    generator = torch.Generator().manual_seed(0)
    most = max(arguments.batch_size or 0, *_batch_sizes(device), _ATTRIBUTION_BATCH)
    images = torch.randn(most, *size, generator=generator).to(device)
    layout = _layout(model, images[:1])
    sizes = [arguments.batch_size] if arguments.batch_size else _fast_batch_sizes(model, images)
    works = list(_own_works(model, images, layout, sizes, arguments.precision))
    if arguments.others:
        works += _other_works(model, images, layout, sizes[0])
    # Before and after, should another program have taken the cores at one of them.
    peaks = {dtype: matmul_peak(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a random model, the relevance may be zero
        measured = measure({work.title: work.run for work in works}, device, arguments.repeats)
    peaks = {dtype: max(peak, matmul_peak(dtype, device)) for dtype, peak in peaks.items()}
    tokens = layout.num_image_tokens
    peak = {dtype: f"{flops / 1e9:.0f} GFLOP/s" for dtype, flops in peaks.items()}
    return (
        f"{arguments.model}, {size[-2]} x {size[-1]} pixels, J = {tokens}. Fastest of "
        f"{arguments.repeats} run(s), by turns; ratios are to the fastest row of that name. Peak "
        f"of a matrix product: {peak[torch.float32]} in float32, {peak[torch.bfloat16]} in "
        "bfloat16. Memory is what a row holds beyond the model.\n\n"
    ) + _table(works, measured, peaks)


def _table(
    works: list[_Work], measured: dict[str, Measurement], peaks: dict[torch.dtype, float]
) -> str:
    lines = [
        "| | images | time (s) | images/s | GFLOP/s | of the peak | memory (MB) | ratio | to |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for work in works:
        cost = measured[work.title]
        rate = cost.flops / cost.seconds
        against = work.against or work.title
        ratio = cost.seconds / min(
            other.seconds
            for title, other in measured.items()
            if title == against or title.startswith(f"{against}{_BY}")
        )
        memory = "" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f}"
        lines.append(
            f"| {work.title} | {work.images} | {cost.seconds:.3f} | "
            f"{work.images / cost.seconds:.3g} | {rate / 1e9:.0f} | "
            f"{rate / peaks[work.dtype]:.0%} | {memory} | {ratio:.3f} | {work.against} |"
        )
    return "\n".join(lines)


def _own_works(
    model: nn.Module, images: Tensor, layout: TokenLayout, batch_sizes: list[int], precision: str
) -> Iterator[_Work]:
    tokens = layout.num_image_tokens

    def plain(count: int, batch_size: int, bf16: bool = False) -> Callable[[], None]:
        def run() -> None:
            with (
                torch.inference_mode(),
                torch.autocast(images.device.type, torch.bfloat16, enabled=bf16),
            ):
                for start in range(0, count, batch_size):
                    model(images[: min(batch_size, count - start)])

        return run

    one, few = images[:1], images[:_ATTRIBUTION_BATCH]
    yardstick = _yardstick(tokens)
    for size in batch_sizes:
        title = f"{yardstick}{_BY}{size}"
        yield _Work(title, plain(tokens, size), tokens, yardstick)
    yield _Work(
        f"{tokens} forwards under bf16 autocast{_BY}{batch_sizes[0]}",
        plain(tokens, batch_sizes[0], bf16=True),
        tokens,
        yardstick,
        torch.bfloat16,
    )
    chunk = default_rows_per_forward(images.device)
    yield _Work(f"plain forward of one chunk ({chunk})", plain(chunk, chunk), chunk)
    reflection = ReflectedRelevance(model).reflect(one, _TARGET)
    for attributor, name, suffix, dtype in (
        (ReflectedRelevance(model), "float32", "", torch.float32),
        (
            ReflectedRelevance(model, precision="bf16"),
            "bf16",
            ', precision="bf16"',
            torch.bfloat16,
        ),
    ):
        if precision not in (name, "both"):
            continue
        title = f"ReflectedRelevance{suffix}"
        yield _Work(title, _attribution(attributor, one), 1, yardstick, dtype)
        yield _Work(
            f"{title}: reflected forwards alone",
            _forwards(attributor, one, reflection),
            1,
            yardstick,
            dtype,
        )
    for options in _MASK_REGRESSION if can_drop_tokens(model, one) else _MASK_REGRESSION[:1]:
        named = "".join(f", {name}={value!r}" for name, value in options.items())
        yield _Work(
            f"MaskRegression{named}",
            _attribution(MaskRegression(model, **options), one),
            1,
            yardstick,
            torch.bfloat16 if "precision" in options else torch.float32,
        )
    generic = ReflectedRelevance(lambda images: model(images))  # what it runs cannot be known
    yield _Work("ReflectedRelevance, generic path", _attribution(generic, one), 1, yardstick)
    yield _Work("naive loop of the paper", _naive_loop(model, one, reflection.masks), 1, yardstick)
    forward = f"plain forward of {len(few)}"
    yield _Work(forward, plain(len(few), len(few)), len(few))
    yield _Work(
        f"TransformerAttribution of {len(few)}",
        _attribution(TransformerAttribution(model), few),
        len(few),
        forward,
    )
    scored = images[:_EVALUATED]
    maps = torch.rand(len(scored), *images.shape[-2:], device=images.device)
    count = _count_forwards(model, scored, maps)
    for bf16 in (False, True):
        dtype = torch.bfloat16 if bf16 else torch.float32
        suffix = ", bf16 autocast" if bf16 else ""
        forwards = f"the {count} forwards of evaluate{suffix}"

        def score(bf16: bool = bf16) -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                evaluate(model, scored, maps, target=_TARGET)

        yield _Work(forwards, plain(count, chunk, bf16), count, "", dtype)
        yield _Work(f"metrics.evaluate{suffix}", score, len(scored), forwards, dtype)


def _other_works(
    model: nn.Module, images: Tensor, layout: TokenLayout, batch_size: int
) -> Iterator[_Work]:
    one, tokens = images[:1], layout.num_image_tokens
    yardstick = _yardstick(tokens)
    gradients, occlusion = IntegratedGradients(model), Occlusion(model)
    patch = tuple(
        side // cells for side, cells in zip(one.shape[-2:], layout.grid_size, strict=True)
    )
    window = (one.shape[1], *patch)
    yield _Work(
        "Captum IntegratedGradients, 50 steps",
        lambda: gradients.attribute(one, target=_TARGET, internal_batch_size=batch_size),
        1,
        yardstick,
    )
    yield _Work(
        "Captum Occlusion, patch by patch",
        lambda: occlusion.attribute(
            one,
            target=_TARGET,
            sliding_window_shapes=window,
            strides=window,
            perturbations_per_eval=batch_size,
        ),
        1,
        yardstick,
    )
    blocks = getattr(model, "blocks", None)
    layer = getattr(blocks[-1], "norm1", None) if isinstance(blocks, nn.Sequential) else None
    if isinstance(layer, nn.Module):
        with contextlib.suppress(ImportError):
            yield _Work(
                "pytorch-grad-cam ScoreCAM",
                _score_cam(model, layer, one, layout, batch_size),
                1,
                yardstick,
            )


def _attribution(attributor: Any, images: Tensor) -> Callable[[], object]:
    return lambda: attributor.attribute(images, _TARGET)


def _forwards(
    attributor: ReflectedRelevance, images: Tensor, reflection: Reflection
) -> Callable[[], object]:
    def run() -> None:
        score_masks(
            attributor.forward_func,
            images,
            reflection.masks,
            _TARGET,
            precision=attributor.precision,
        )

    return run


def _naive_loop(model: nn.Module, images: Tensor, masks: Tensor) -> Callable[[], object]:
    """The reflected images made in full, forwarded one by one, attention recorded."""

    def run() -> None:
        TransformerAttribution(model).relevance(images, _TARGET)
        for reflected in reflected_images(images, masks)[0]:
            maps: list[Tensor] = []

            def keep(attention: Tensor, maps: list[Tensor] = maps) -> Tensor:
                maps.append(attention)
                return attention

            with AttentionMode(keep):
                model(reflected.unsqueeze(0))

    return run


def _score_cam(
    model: nn.Module, layer: nn.Module, images: Tensor, layout: TokenLayout, batch_size: int
) -> Callable[[], object]:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def on_grid(tokens: Tensor) -> Tensor:
        cells = tokens[:, layout.num_prefix_tokens :].transpose(1, 2)
        return cells.reshape(*cells.shape[:2], *layout.grid_size)

    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            cam = ScoreCAM(model, [layer], reshape_transform=on_grid)
            try:
                cam.batch_size = batch_size
                cam(images, [ClassifierOutputTarget(_TARGET)])
            finally:
                cam.activations_and_grads.release()

    return run


def _layout(model: nn.Module, images: Tensor) -> TokenLayout:
    batch = make_batch(images, _TARGET, None)
    return TransformerAttribution(model).layers_and_readout(batch)[2]


def _batch_sizes(device: torch.device) -> list[int]:
    return [1 << power for power in range(6 if device.type == "cpu" else 9)]


def _yardstick(tokens: int) -> str:
    return f"{tokens} plain forwards"


def _fast_batch_sizes(model: nn.Module, images: Tensor) -> list[int]:
    """The three that are fastest in a short trial, the fastest first."""
    sizes = _batch_sizes(images.device)
    best: dict[int, float] = {}
    with torch.inference_mode():
        for _ in range(3):
            for size in sizes:
                seconds = time_of(lambda: model(images[:size]), images.device)  # noqa: B023
                best[size] = min(best.get(size, seconds), seconds)
    return sorted(sizes, key=lambda size: best[size] / size)[:3]


def _count_forwards(model: nn.Module, images: Tensor, maps: Tensor) -> int:
    seen: list[int] = []

    def forward(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 2, device=images.device)

    evaluate(forward, images, maps, target=_TARGET)
    return sum(seen)


def _machine(device: torch.device) -> str:
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    capability = torch.backends.cpu.get_cpu_capability()
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{name} ({capability}), {cores}, load average before the run {busy}, {versions}"


# -- bf16 against float32 ----------------------------------------------------------------


def _agreement(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    photos: list[Path],
    device: torch.device,
) -> str:
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


# -- a large image -----------------------------------------------------------------------


def _large_image(name: str, side: int, device: torch.device) -> str:
    model = _random_model(name, device, img_size=side)
    channels = resolve_model_data_config(model)["input_size"][0]
    image = torch.randn(1, channels, side, side, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a random model, the relevance may be zero
        works = {"": _attribution(TransformerAttribution(model), image)}
        cost = measure(works, device, repeats=1)[""]
        tokens = _layout(model, image).num_tokens
    memory = "" if cost.peak_bytes is None else f", {cost.peak_bytes / 2**30:.2f} GiB at most"
    return (
        f"TransformerAttribution of one image of {side} x {side} pixels ({name}, random weights, "
        f"N = {tokens}): {cost.seconds:.1f} s{memory}."
    )


# -- how the cost grows ------------------------------------------------------------------


def _scaling(name: str, device: torch.device, plot: Path) -> str:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained")
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
    figure.savefig(plot, dpi=120)
    return (
        f"How the cost of ReflectedRelevance grows ({name}, random weights; the expected "
        "exponent is that of the FLOPs of J plain forwards):\n\n" + "\n".join(lines)
    )


def _scaling_points(name: str, device: torch.device) -> dict[str, list[tuple[int, float, float]]]:
    """By what grows: (its value, seconds, FLOPs of the plain forwards)."""
    model = _random_model(name, device)
    size = resolve_model_data_config(model)["input_size"]
    depth = len(model.blocks) if isinstance(model.blocks, nn.Sequential) else 12
    points: dict[str, list[tuple[int, float, float]]] = {}

    def add(title: str, value: int | None, model: nn.Module, batch_size: int, side: int) -> None:
        images = torch.randn(batch_size, size[0], side, side, device=device)
        tokens = _layout(model, images[:1]).num_image_tokens
        with torch.no_grad():
            flops = flops_of(lambda: model(images)) * tokens
        seconds = time_of(_attribution(ReflectedRelevance(model), images), device)
        points.setdefault(title, []).append((value or tokens, seconds, flops))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = _layout(model, torch.randn(1, *size, device=device)).grid_size[0]
        sides = [size[1] // rows * round(rows * factor) for factor in (1, 9 / 7, 12 / 7, 16 / 7)]
        for side in tqdm(sides, desc="image size", disable=None):
            add("J (image size)", None, _random_model(name, device, img_size=side), 1, side)
        for batch_size in tqdm((1, 2, 4), desc="batch size", disable=None):
            add("B (images)", batch_size, model, batch_size, size[1])
        for blocks in tqdm((depth // 4, depth // 2, depth), desc="depth", disable=None):
            add("depth (blocks)", blocks, _random_model(name, device, depth=blocks), 1, size[1])
    return points
