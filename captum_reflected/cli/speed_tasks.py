"""The tasks that ``captum-reflected speed`` measures: explanations, metrics, plain forwards."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.attr import IntegratedGradients, Occlusion
from torch import Tensor, nn

from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr import (
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.cli.measuring import time_of
from captum_reflected.inputs.batch import make_batch
from captum_reflected.inputs.chunks import default_rows_per_forward
from captum_reflected.masking.reflection import Reflection, reflected_images
from captum_reflected.masking.scoring import score_masks
from captum_reflected.metrics import evaluate

TARGET = 0
_EVALUATED = 2
_BATCH_ON_CPU, _BATCH_ON_GPU = 16, 64
IN_BATCHES_OF = " in batches of "
_MASK_REGRESSION: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "bf16"},
    {"forwards": 50},
)


@dataclass(frozen=True)
class Task:
    """A row of the table.

    Attributes:
        title: the name of the row.
        run: the function to measure.
        images: number of images that it explains, scores or forwards.
        against: title of the forwards that it is compared with; if there are several, "TITLE in
            batches of N", the fastest of them. Empty for a row that others are compared with.
        dtype: its FLOP/s are compared with the peak of this dtype.
    """

    title: str
    run: Callable[[], object]
    images: int
    against: str = ""
    dtype: torch.dtype = torch.float32


def own_tasks(
    model: nn.Module, images: Tensor, layout: TokenLayout, batch_sizes: list[int], precision: str
) -> Iterator[Task]:
    """This library's methods and metrics, and the plain forwards to compare them with."""
    tokens = layout.num_image_tokens
    plain = partial(plain_forwards, model, images)
    one, few = images[:1], images[: batch_that_fits(model, images)]
    reference, fastest = _reference_title(tokens), batch_sizes[0]
    for size in batch_sizes:
        title = f"{reference}{IN_BATCHES_OF}{size}"
        yield Task(title, plain(tokens, size), tokens, reference)
    half = copy.deepcopy(model).bfloat16()
    for title, work in (
        ("under bf16 autocast", plain(tokens, fastest, bf16=True)),
        ("of the model in bf16", plain_forwards(half, images.bfloat16(), tokens, fastest)),
    ):
        title = f"{tokens} forwards {title}{IN_BATCHES_OF}{fastest}"
        yield Task(title, work, tokens, reference, torch.bfloat16)
    chunk = default_rows_per_forward(images.device)
    yield Task(f"plain forward of one chunk ({chunk})", plain(chunk, chunk), chunk)
    reflection = ReflectedRelevance(model).reflect(one, TARGET)
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
        yield Task(title, attribution(attributor, one), 1, reference, dtype)
        yield Task(
            f"{title}: reflected forwards alone",
            masked_forwards(attributor, one, reflection),
            1,
            reference,
            dtype,
        )
    for options in _MASK_REGRESSION:
        named = "".join(f", {name}={value!r}" for name, value in options.items())
        explainer = MaskRegression(model, **options)
        dtype = torch.bfloat16 if "precision" in options else torch.float32
        yield Task(f"MaskRegression{named}", attribution(explainer, one), 1, reference, dtype)
        if options.get("forwards") is None:
            title = f"MaskRegression of {len(few)}{named}"
            yield Task(title, attribution(explainer, few), len(few), reference, dtype)
    # A function hides the structure of the model, so the fast forward cannot be used.
    generic = ReflectedRelevance(lambda images: model(images))
    yield Task("ReflectedRelevance, generic path", attribution(generic, one), 1, reference)
    yield Task("naive loop of the paper", _naive_loop(model, one, reflection.masks), 1, reference)
    forward = f"plain forward of {len(few)}"
    yield Task(forward, plain(len(few), len(few)), len(few))
    for one_pass in (TransformerAttribution(model), BalancedRelevance(model)):
        name = type(one_pass).__name__
        yield Task(f"{name} of 1", attribution(one_pass, one), 1, reference)
        yield Task(f"{name} of {len(few)}", attribution(one_pass, few), len(few), forward)
    scored = images[:_EVALUATED]
    maps = torch.rand(len(scored), *images.shape[-2:], device=images.device)
    count = _count_forwards(model, scored, maps)
    for bf16 in (False, True):
        dtype = torch.bfloat16 if bf16 else torch.float32
        suffix = ", bf16 autocast" if bf16 else ""
        forwards = f"the {count} forwards of evaluate{suffix}"

        def score(bf16: bool = bf16) -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                evaluate(model, scored, maps, target=TARGET)

        yield Task(forwards, plain(count, chunk, bf16=bf16), count, "", dtype)
        yield Task(f"metrics.evaluate{suffix}", score, len(scored), forwards, dtype)


def other_tasks(
    model: nn.Module, images: Tensor, layout: TokenLayout, batch_size: int
) -> Iterator[Task]:
    """Methods of Captum and pytorch-grad-cam."""
    one, tokens = images[:1], layout.num_image_tokens
    reference = _reference_title(tokens)
    gradients, occlusion = IntegratedGradients(model), Occlusion(model)
    patch = tuple(
        side // cells for side, cells in zip(one.shape[-2:], layout.grid_size, strict=True)
    )
    window = (one.shape[1], *patch)
    yield Task(
        "Captum IntegratedGradients, 50 steps",
        lambda: gradients.attribute(one, target=TARGET, internal_batch_size=batch_size),
        1,
        reference,
    )
    yield Task(
        "Captum Occlusion, patch by patch",
        lambda: occlusion.attribute(
            one,
            target=TARGET,
            sliding_window_shapes=window,
            strides=window,
            perturbations_per_eval=batch_size,
        ),
        1,
        reference,
    )
    blocks = getattr(model, "blocks", None)
    layer = getattr(blocks[-1], "norm1", None) if isinstance(blocks, nn.Sequential) else None
    if isinstance(layer, nn.Module):
        with contextlib.suppress(ImportError):
            yield Task(
                "pytorch-grad-cam ScoreCAM",
                _score_cam(model, layer, one, layout, batch_size),
                1,
                reference,
            )


def attribution(attributor: Any, images: Tensor) -> Callable[[], object]:
    """A function that explains images with an attributor."""
    return lambda: attributor.attribute(images, TARGET)


def plain_forwards(
    model: nn.Module, images: Tensor, count: int, batch_size: int, *, bf16: bool = False
) -> Callable[[], None]:
    """A function that runs so many forwards; with ``bf16``, under autocast to bfloat16."""

    def run() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, torch.bfloat16, enabled=bf16),
        ):
            for start in range(0, count, batch_size):
                model(images[: min(batch_size, count - start)])

    return run


def masked_forwards(
    attributor: ReflectedRelevance,
    images: Tensor,
    reflection: Reflection,
    rows: int | None = None,
) -> Callable[[], object]:
    """A function that scores the masks of a reflection, ``rows`` of each image in a forward."""

    def run() -> None:
        score_masks(
            attributor.forward_func,
            images,
            reflection.masks,
            TARGET,
            precision=attributor.precision,
            perturbations_per_eval=rows,
        )

    return run


def batch_that_fits(model: nn.Module, images: Tensor) -> int:
    """How many images an attributor is measured on: on a GPU, fewer if memory runs out."""
    if images.device.type == "cpu":
        return min(len(images), _BATCH_ON_CPU)
    images = images[:_BATCH_ON_GPU]
    while len(images) > 1:
        try:
            for one_pass in (TransformerAttribution, BalancedRelevance):
                one_pass(model).attribute(images, TARGET)
            break
        except torch.OutOfMemoryError:
            images = images[: len(images) // 2]
        if images.is_cuda:
            torch.cuda.empty_cache()
    return len(images)


def _naive_loop(model: nn.Module, images: Tensor, masks: Tensor) -> Callable[[], object]:
    """Computes all reflected images and runs them one by one, with recorded attention."""

    def run() -> None:
        TransformerAttribution(model).relevance(images, TARGET)
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
                cam(images, [ClassifierOutputTarget(TARGET)])
            finally:
                cam.activations_and_grads.release()

    return run


def layout_of(model: nn.Module, images: Tensor) -> TokenLayout:
    """The token layout of a model."""
    batch = make_batch(images, TARGET, None)
    return TransformerAttribution(model).layer_relevance(batch).layout


def batch_sizes_to_try(device: torch.device) -> list[int]:
    """Powers of two, up to more than the fastest batch size on such a device."""
    return [1 << power for power in range(6 if device.type == "cpu" else 9)]


def _reference_title(tokens: int) -> str:
    return f"{tokens} plain forwards"


def fast_batch_sizes(model: nn.Module, images: Tensor) -> list[int]:
    """The three batch sizes that are fastest in a short trial, the fastest first."""
    sizes = batch_sizes_to_try(images.device)
    best: dict[int, float] = {}
    with torch.inference_mode():
        for _ in range(3):
            for size in sizes:
                seconds = time_of(lambda: model(images[:size]), images.device)  # noqa: B023
                best[size] = min(best.get(size, seconds), seconds)
    return sorted(sizes, key=lambda size: best[size] / size)[:3]


def _count_forwards(model: nn.Module, images: Tensor, maps: Tensor) -> int:
    sizes: list[int] = []

    def forward(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return torch.zeros(len(images), 2, device=images.device)

    evaluate(forward, images, maps, target=TARGET)
    return sum(sizes)
