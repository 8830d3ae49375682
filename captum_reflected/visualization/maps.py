"""Figures of maps: heat maps on pictures, and grids that compare methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from captum_reflected.visualization.notebook_figure import NotebookFigure
from captum_reflected.visualization.overlay import (
    HEAT_COLORS,
    OPACITY,
    HeatScale,
    check_style,
    heat_scale,
    overlay,
)

_Values: TypeAlias = npt.NDArray[np.float64]

# How far preprocessing and its inversion may exceed the range from 0 to 1.
_ROUNDING = 0.01


def draw_heat(
    axes: Axes, picture: Tensor, heat: Tensor, *, alpha: float = OPACITY, cmap: str = HEAT_COLORS
) -> HeatScale:
    """Draws a picture with a heat map over it, bright where the map is high.

    Args:
        axes: the axes to draw on.
        picture: (H, W, C), from 0 to 1.
        heat: (H, W); see :func:`captum_reflected.visualization.heat_scale`. A map of zeros
            leaves the picture dark.
        alpha: opacity of the heat map, from 0 to 1.
        cmap: name of a colour map of matplotlib.

    Returns:
        HeatScale: the values at the ends of the colours.
    """
    values = heat.double().cpu().numpy()
    scale = heat_scale(values)
    image = picture.cpu().numpy().clip(0, 1)
    axes.imshow(overlay(image, values, alpha=alpha, cmap=cmap, scale=scale))
    axes.set_axis_off()
    return scale


def comparison_grid(
    pictures: Tensor | Sequence[Tensor],
    maps: Mapping[str, Any],
    *,
    masks: Tensor | Sequence[Tensor | None] | None = None,
    labels: Sequence[str] | None = None,
    size: float = 1.9,
    alpha: float = OPACITY,
    cmap: str = HEAT_COLORS,
) -> Figure:
    """Draws a grid with one row per image and one column per method.

    Args:
        pictures: (B, H, W, C), from 0 to 1, or B of (H, W, C), which may differ in size.
        maps: by title, what ``attribute`` returns, (B, C, H, W) or a 1-tuple of it, whose channels
            are added; or (B, H, W); or B of (C, H, W) or (H, W), with None for an empty cell.
        masks: (B, H, W), or B of (H, W), true on the object; drawn in a separate column.
        labels: B texts, one under each picture.
        size: side length of one cell in inches.
        alpha: opacity of the maps, from 0 to 1.
        cmap: name of a colour map of matplotlib.

    Returns:
        Figure: not attached to any window; ``figure.savefig(path)`` writes it to a file.

    Raises:
        ValueError: pictures, maps and masks differ in number or size, a value is not finite, or
            a picture is not in the range from 0 to 1; ``alpha`` or ``cmap`` is invalid.
    """
    check_style(alpha, cmap)
    check_pictures(pictures)
    maps = {title: _without_channels(heats) for title, heats in maps.items()}
    _check_cells(pictures, maps if masks is None else {**maps, "masks": masks})
    titles = ["image", *(["object"] if masks is not None else []), *maps]
    figure = NotebookFigure(
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
                draw_heat(axes, picture, heat, alpha=alpha, cmap=cmap)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def _without_channels(heats: Any) -> list[Tensor | None]:
    """One map (H, W) for each image, the sum of its channels where it has some."""
    if isinstance(heats, tuple) and len(heats) == 1:
        heats = heats[0]
    single = (None if heat is None else heat.detach() for heat in heats)
    return [heat if heat is None or heat.dim() != 3 else heat.sum(dim=0) for heat in single]


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
