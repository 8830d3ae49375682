"""Removes and inserts pixels in the order of a map, in batches computed on the device.

Pixels are ranked once. Every perturbed image is then one comparison of the ranks with a count, so
a step needs no sort, no copy of the images and no transfer to the host.
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

from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.chunks import in_chunks
from captum_reflected.inputs.outputs import run_model
from captum_reflected.inputs.targets import Score, target_score

Fill: TypeAlias = "float | str | Tensor | Callable[[Tensor], Tensor]"
Baselines: TypeAlias = "Fill | None"

_BLUR_SIZE, _BLUR_SIGMA = 11, 5.0


@dataclass(frozen=True)
class Point:
    """One perturbed version of every image.

    Attributes:
        count: number of pixels with the highest attribution.
        keep: True to keep these pixels and replace the others, False to replace these pixels.
        baseline: index of the baseline that replaces pixels.
        ranking: index of the map that orders the pixels.
    """

    count: int
    keep: bool
    baseline: int
    ranking: int = 0


def rank_pixels(attributions: Tensor) -> Tensor:
    """The rank of each pixel in the order of decreasing attribution.

    Args:
        attributions: (B, H, W).

    Returns:
        Tensor: (B, H, W), int32, 0 for the highest; equal values in raster order.

    Raises:
        TypeError: the attributions are not a tensor of real numbers.
        ValueError: the shape is another, or a value is not finite.
    """
    if not isinstance(attributions, Tensor) or attributions.is_complex():
        kind = getattr(attributions, "dtype", type(attributions).__name__)
        raise TypeError(f"attributions is a {kind}; wanted: a tensor of real numbers (B, H, W)")
    if attributions.dim() != 3:
        raise ValueError(
            f"attributions has shape {tuple(attributions.shape)}; wanted: (B, H, W), one value "
            "per pixel"
        )
    if not bool(torch.isfinite(attributions).all()):
        raise ValueError("attributions holds NaN or infinite values; wanted: finite numbers")
    flat = attributions.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order, dtype=torch.int32)
    places = torch.arange(flat.shape[1], dtype=torch.int32, device=flat.device).expand_as(order)
    return ranks.scatter_(1, order, places).view_as(attributions)


def blur(images: Tensor) -> Tensor:
    """RISE's blurred image: an 11 x 11 kernel of sigma 5, with zero padding.

    The kernel is the published one: the Gaussian, truncated at 4 sigma, is reflected at the
    kernel's edges. This makes it flatter than a Gaussian that is truncated at the edges.

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
    """The values that replace removed pixels, as a tensor of the images' shape.

    Args:
        baselines: a number, ``"blur"``, a tensor of the images' shape (or with first
            dimension 1), or a function of the images that returns one.
        images: (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).

    Raises:
        TypeError: ``baselines`` is none of these.
        ValueError: its name, shape or value is not supported.
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
    """Scores every perturbed version of every image with the model.

    Args:
        forward_func: a function from images (R, C, H, W) to (R, K).
        batch: B images, with target and further arguments.
        ranks: (M, B, H, W), from :func:`rank_pixels`, for each of M maps.
        points: P versions of each image.
        baselines: each (B, C, H, W).
        score: ``"probability"`` or ``"logit"``.
        rows_per_forward: maximal number of perturbed images in one forward.
        show_progress: whether to show a progress bar.

    Returns:
        Tensor: (B, P), in the batch's compute dtype.
    """
    images = batch.images
    counts = torch.tensor([point.count for point in points], device=images.device)
    counts = counts.to(ranks.dtype)[:, None, None]

    def group_key(row: int) -> tuple[int, bool, int, int]:
        """Rows with the same key differ only in their pixel count."""
        point = points[row % len(points)]
        return row // len(points), point.keep, point.baseline, point.ranking

    def run(start: int, stop: int) -> Tensor:
        perturbed = images.new_empty(stop - start, *images.shape[1:])
        for (image, keep, baseline, ranking), group in groupby(range(start, stop), group_key):
            rows = list(group)
            point = rows[0] % len(points)
            highest = ranks[ranking, image] < counts[point : point + len(rows)]
            is_shown = (highest if keep else ~highest).unsqueeze(1)
            fill = baselines[baseline][image]
            result = perturbed[rows[0] - start : rows[-1] - start + 1]
            torch.where(is_shown, images[image], fill, out=result)
        image_of = torch.arange(start, stop, device=images.device) // len(points)
        args, target = batch.rows(image_of)
        output = run_model(forward_func, perturbed, args)
        return target_score(
            output, target, stop - start, score, batch.compute_dtype, indices=batch.indices
        )

    total = batch.size * len(points)
    scores = in_chunks(
        run, total, rows_per_forward, description="metrics", show_progress=show_progress
    )
    return scores.reshape(batch.size, len(points))
