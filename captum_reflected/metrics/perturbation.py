"""Removing and inserting pixels in the order of a map, in batches made on the device.

Pixels are ranked once; every perturbed image is then one comparison of ranks with a count,
so that a step costs no sort, no copy of the images, and nothing is copied to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected._captum import run_forward
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.chunks import in_chunks
from captum_reflected.inputs.targets import Score, select_target, target_score

Fill: TypeAlias = "float | str | Tensor | Callable[[Tensor], Tensor]"
Baselines: TypeAlias = "Fill | None"

_BLUR_SIZE, _BLUR_SIGMA = 11, 5.0


@dataclass(frozen=True)
class Point:
    """One perturbed version of every image.

    Attributes:
        count: how many pixels of the highest attribution are meant.
        keep: whether those pixels are kept and the others replaced, or the other way round.
        baseline: index of the baseline that stands where a pixel is replaced.
    """

    count: int
    keep: bool
    baseline: int


def rank_pixels(attributions: Tensor) -> Tensor:
    """The place of each pixel in the order of decreasing attribution.

    Args:
        attributions: (B, H, W).

    Returns:
        Tensor: (B, H, W), int32, 0 for the highest; equal values in raster order.

    Raises:
        TypeError: not a tensor of real numbers.
        ValueError: another shape, or a value is not finite.
    """
    if not isinstance(attributions, Tensor) or attributions.is_complex():
        kind = getattr(attributions, "dtype", type(attributions).__name__)
        raise TypeError(f"attributions is a {kind}; wanted: a tensor of real numbers (B, H, W)")
    if attributions.dim() != 3:
        raise ValueError(
            f"attributions has shape {tuple(attributions.shape)}; wanted: (B, H, W), one value a "
            "pixel"
        )
    if not bool(torch.isfinite(attributions).all()):
        raise ValueError("attributions holds NaN or infinite values; wanted: finite numbers")
    flat = attributions.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order, dtype=torch.int32)
    places = torch.arange(flat.shape[1], dtype=torch.int32, device=flat.device).expand_as(order)
    return ranks.scatter_(1, order, places).view_as(attributions)


def blur(images: Tensor) -> Tensor:
    """RISE's blurred image: an 11 x 11 kernel of sigma 5, zeros beyond the border.

    The kernel is the published one: the Gaussian, cut at 4 sigma, is folded back at the
    kernel's edges, which makes it flatter than a Gaussian cut at its edges.

    Args:
        images: (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).
    """
    half, reach = _BLUR_SIZE // 2, int(4 * _BLUR_SIGMA)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * _BLUR_SIGMA**2))
    places = (offsets.long() + half) % (2 * _BLUR_SIZE)
    folded = torch.where(places < _BLUR_SIZE, places, 2 * _BLUR_SIZE - 1 - places)
    line = torch.zeros(_BLUR_SIZE, dtype=torch.float64).index_add_(0, folded, weights)
    channels = images.shape[1]
    kernel = (line / line.sum()).to(images).expand(channels, 1, 1, -1)
    with torch.autocast(images.device.type, enabled=False):
        rows = F.conv2d(images, kernel, padding=(0, half), groups=channels)
        return F.conv2d(rows, kernel.transpose(2, 3), padding=(half, 0), groups=channels)


def resolve_baseline(baselines: Fill, images: Tensor) -> Tensor:
    """What stands where a pixel is removed, as a tensor that broadcasts to the images.

    Args:
        baselines: a number, ``"blur"``, a tensor of the images' shape (or with first
            dimension 1), or a function of the images that returns one.
        images: (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).

    Raises:
        TypeError: none of these.
        ValueError: a name, shape or value that is not taken.
    """
    if isinstance(baselines, str):
        if baselines != "blur":
            raise ValueError(f'baselines is {baselines!r}; wanted: a number, "blur" or a tensor')
        return blur(images)
    if callable(baselines) and not isinstance(baselines, Tensor):
        baselines = baselines(images)
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        if not math.isfinite(baselines):
            raise ValueError(f"baselines is {baselines}; wanted: a finite number")
        return torch.full_like(images[:1], baselines).expand_as(images)
    if not isinstance(baselines, Tensor):
        raise TypeError(
            f'baselines is a {type(baselines).__name__}; wanted: a number, "blur", a tensor '
            "shaped like inputs, or a function of the inputs that returns one"
        )
    shape = tuple(images.shape)
    if tuple(baselines.shape) not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"baselines has shape {tuple(baselines.shape)}; wanted: {shape} or {(1, *shape[1:])}"
        )
    if not bool(torch.isfinite(baselines).all()):
        raise ValueError("baselines holds NaN or infinite values; wanted: finite numbers")
    return baselines.detach().to(images).expand_as(images)


def score_points(
    forward_func: Callable[..., Any],
    batch: Batch,
    ranks: Tensor,
    points: Sequence[Point],
    baselines: Sequence[Tensor],
    *,
    score: Score,
    rows_per_forward: int,
    show_progress: bool,
) -> Tensor:
    """What the model says of every perturbed version of every image.

    Args:
        forward_func: images (R, C, H, W) to (R, K).
        batch: the images, B of them, with target and further arguments.
        ranks: (B, H, W), from :func:`rank_pixels`.
        points: P versions of each image.
        baselines: each (B, C, H, W).
        score: ``"probability"`` or ``"logit"``.
        rows_per_forward: perturbed images in one forward, at most.
        show_progress: whether a progress bar is shown.

    Returns:
        Tensor: (B, P), in the batch's compute dtype.
    """
    images = batch.images
    counts = torch.tensor([point.count for point in points], device=images.device)
    counts = counts.to(ranks.dtype)[:, None, None]

    def alike(row: int) -> tuple[int, bool, int]:
        point = points[row % len(points)]
        return row // len(points), point.keep, point.baseline

    def run(start: int, stop: int) -> Tensor:
        perturbed = images.new_empty(stop - start, *images.shape[1:])
        for (image, keep, baseline), rows in groupby(range(start, stop), alike):
            place, *others = rows
            point, end = place % len(points), place - start + 1 + len(others)
            highest = ranks[image] < counts[point : point + 1 + len(others)]
            shown = (highest if keep else ~highest).unsqueeze(1)
            fill = baselines[baseline][image]
            torch.where(shown, images[image], fill, out=perturbed[place - start : end])
        image_of = torch.arange(start, stop, device=images.device) // len(points)
        args, target = batch.rows(image_of)
        output = run_forward(forward_func, perturbed, args)
        scores = target_score(
            output, target, stop - start, score, batch.compute_dtype, in_range=start > 0
        )
        if start == 0:  # The first forward shows that all targets are in range, not only its own.
            every = output[:1].expand(batch.size, *output.shape[1:])
            select_target(every, batch.target, batch.size)
        return scores

    total = batch.size * len(points)
    scores = in_chunks(
        run, total, rows_per_forward, description="metrics", show_progress=show_progress
    )
    return scores.reshape(batch.size, len(points))
