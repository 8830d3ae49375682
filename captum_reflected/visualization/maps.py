"""Figures of maps: heat maps on pictures, and grids that compare methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import visualization as captum_visualization
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Monotonic in lightness, so it works for colour-blind readers and in greyscale print.
HEAT_COLORS = "inferno"
_Values: TypeAlias = npt.NDArray[np.float64]

# How far preprocessing and its inversion may exceed the range from 0 to 1.
_ROUNDING = 0.01


def draw_heat(axes: Axes, picture: Tensor, heat: Tensor) -> None:
    """Draws a picture with a heat map over it, bright where the map is high.

    Args:
        axes: the axes to draw on.
        picture: (H, W, C), from 0 to 1.
        heat: (H, W). Negative values are dark; if all values are positive, the smallest is
            dark. A map of zeros leaves the picture dark.
    """
    image: npt.NDArray[np.float32] = picture.cpu().numpy()
    positive = (heat - heat.min().clamp(min=0)).clamp(min=0).float().cpu().numpy()
    if positive.max() > 0:
        captum_visualization.visualize_image_attr(
            positive[..., None],
            image,
            method="blended_heat_map",
            sign="positive",
            cmap=HEAT_COLORS,
            alpha_overlay=0.6,
            plt_fig_axis=(axes.figure, axes),
            use_pyplot=False,
        )
    else:  # Captum raises an error for a map without positive values
        axes.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
        axes.imshow(np.zeros(positive.shape), cmap=HEAT_COLORS, vmin=0, vmax=1, alpha=0.6)
    axes.set_axis_off()


def comparison_grid(
    pictures: Tensor | Sequence[Tensor],
    maps: Mapping[str, Tensor | Sequence[Tensor | None]],
    *,
    masks: Tensor | Sequence[Tensor | None] | None = None,
    labels: Sequence[str] | None = None,
    size: float = 1.9,
) -> Figure:
    """Draws a grid with one row per image and one column per method.

    Args:
        pictures: (B, H, W, C), from 0 to 1, or B of (H, W, C), which may differ in size.
        maps: by title, (B, H, W), or B of (H, W), with None for an empty cell.
        masks: in the same format, true on the object; drawn in a separate column.
        labels: B texts, one under each picture.
        size: side length of one cell in inches.

    Returns:
        Figure: not attached to any window; ``figure.savefig(path)`` writes it to a file.

    Raises:
        ValueError: pictures, maps and masks differ in number or size, a value is not finite, or
            a picture is not in the range from 0 to 1.
    """
    check_pictures(pictures)
    _check_cells(pictures, maps if masks is None else {**maps, "masks": masks})
    titles = ["image", *(["object"] if masks is not None else []), *maps]
    figure = Figure(
        figsize=(size * len(titles), (size + 0.18) * len(pictures) + 0.15), layout="constrained"
    )
    grid = figure.subplots(len(pictures), len(titles), squeeze=False)
    for row, picture in zip(range(len(pictures)), pictures, strict=True):
        cells = iter(grid[row])
        axes = next(cells)
        axes.imshow(picture.cpu().numpy())
        axes.set_xticks([])
        axes.set_yticks([])
        if labels is not None:
            axes.set_xlabel(labels[row], fontsize=8, parse_math=False)
        if masks is not None:
            axes, mask = next(cells), masks[row]
            if mask is not None:
                axes.imshow(mask.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        for heats in maps.values():
            axes, heat = next(cells), heats[row]
            if heat is None:
                axes.set_axis_off()
            else:
                draw_heat(axes, picture, heat)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def check_pictures(pictures: Tensor | Sequence[Tensor]) -> None:
    """Raises ValueError unless pictures are (H, W, 3 or 4) with values from 0 to 1."""
    for picture in pictures:
        if picture.dim() != 3 or picture.shape[-1] not in (3, 4):
            raise ValueError(
                f"a picture has shape {tuple(picture.shape)}; wanted: (H, W, 3), as "
                "image.permute(1, 2, 0) gives"
            )
        low, high = float(picture.min()), float(picture.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f"a picture has values from {low:.3g} to {high:.3g}; wanted: from 0 to 1, with "
                "the preprocessing undone"
            )


def _check_cells(
    pictures: Tensor | Sequence[Tensor], maps: Mapping[str, Tensor | Sequence[Tensor | None]]
) -> None:
    """Checks that every map has its picture's size; a stretched map would be misaligned."""
    for title, heats in maps.items():
        if len(heats) != len(pictures):
            raise ValueError(
                f"{title!r} has {len(heats)} maps and there are {len(pictures)} pictures; wanted: "
                "one for each"
            )
        for picture, heat in zip(pictures, heats, strict=True):
            if heat is None:
                continue
            if heat.shape != picture.shape[:2]:
                raise ValueError(
                    f"a map of {title!r} has shape {tuple(heat.shape)} and its picture "
                    f"{tuple(picture.shape)}; wanted: (H, W) of the picture"
                )
            if not bool(torch.isfinite(heat).all()):
                raise ValueError(
                    f"a map of {title!r} holds NaN or infinite values; wanted: finite numbers"
                )
