"""The figure of an explanation: a row for each target, a column for each method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from captum_reflected.visualization.notebook_figure import NotebookFigure
from captum_reflected.visualization.overlay import HEAT_COLORS, Box, HeatScale, Pixels

# Pixels of the longer side of a picture in a figure; photos can be far larger.
_LONGEST_SIDE = 900
_CROP_COLORS = ("#000000", "#ffffff")
# Characters of a text of size 10 for each inch of a cell.
_CHARACTERS_PER_INCH = 12.5
# Height of a picture relative to its width, at most.
_TALLEST = 1.6
# In inches: space between cells, a line of text, and a colour bar with its numbers.
_GAP, _LINE, _BAR = 0.12, 0.18, 0.34


@dataclass(frozen=True)
class FigureRow:
    """A row of the figure.

    Attributes:
        photo: (H, W, 3), uint8.
        text: the text under it: target and probability.
        overlays: for each column, the photo under the map.
        scales: for each column, the values at the ends of its colours.
        box: what the model sees of the photo, if that has to be marked.
    """

    photo: Pixels
    text: str
    overlays: Sequence[Pixels]
    scales: Sequence[HeatScale]
    box: Box | None = None


def explanation_figure(
    rows: Sequence[FigureRow],
    titles: Sequence[str],
    *,
    heading: str = "",
    cmap: str = HEAT_COLORS,
    size: float = 3.2,
) -> Figure:
    """Draws photos, overlays with colour bars, and texts that do not overlap.

    Args:
        rows: one for each target or image.
        titles: the titles of the columns of overlays.
        heading: the text above the figure; lines are broken.
        cmap: name of the colour map of the overlays.
        size: width of one cell in inches.

    Returns:
        Figure: not attached to any window.
    """
    columns = 1 + len(titles)
    heights = [min(row.photo.shape[0] / row.photo.shape[1], _TALLEST) * size for row in rows]
    texts = [_wrapped(row.text, size) for row in rows]
    head = [_wrapped(title, size) for title in titles]
    above = "\n".join(textwrap.wrap(heading, int(size * columns * _CHARACTERS_PER_INCH)))
    # Everything is placed in inches, from the top: texts then never overlap.
    top = _GAP + _LINE * (_lines(above) + max(map(_lines, head), default=0)) + _GAP
    below = [max(_LINE * _lines(text) + 0.1, _BAR) + _GAP for text in texts]
    width, height = columns * (size + _GAP) + _GAP, top + sum(heights) + sum(below)
    figure = NotebookFigure(figsize=(width, height))

    def place(left: float, upper: float, wide: float, high: float) -> Axes:
        axes: Axes = figure.add_axes(
            (left / width, 1 - (upper + high) / height, wide / width, high / height)
        )
        return axes

    if above:
        figure.text(0.5, 1 - 0.08 / height, above, ha="center", va="top", fontsize=11,
                    parse_math=False)  # fmt: skip
    upper = top
    for row, high, text, space in zip(rows, heights, texts, below, strict=True):
        _draw_photo(place(_GAP, upper, size, high), row, text)
        for column, (picture, scale) in enumerate(zip(row.overlays, row.scales, strict=True), 1):
            left = _GAP + column * (size + _GAP)
            axes = place(left, upper, size, high)
            axes.imshow(_reduced(picture))
            axes.set_axis_off()
            if upper == top:
                axes.set_title(head[column - 1], fontsize=10, pad=5, parse_math=False)
            _draw_bar(place(left, upper + high + 0.07, size, 0.09), scale, cmap)
        upper += high + space
    return figure


def _draw_photo(axes: Axes, row: FigureRow, text: str) -> None:
    axes.imshow(_reduced(row.photo))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(text, fontsize=10, labelpad=5, parse_math=False)
    if row.box is not None:
        height, width = row.photo.shape[:2]
        factor = min(1.0, _LONGEST_SIDE / max(height, width))
        left, top = max(row.box.left, 0), max(row.box.top, 0)
        right, bottom = min(row.box.right, width), min(row.box.bottom, height)
        for color, line in zip(_CROP_COLORS, ((0, (4, 4)), (4, (4, 4))), strict=True):
            axes.add_patch(
                Rectangle(
                    (left * factor - 0.5, top * factor - 0.5),
                    (right - left) * factor,
                    (bottom - top) * factor,
                    fill=False,
                    edgecolor=color,
                    linestyle=line,
                    linewidth=1.5,
                    clip_on=False,
                )
            )


def _draw_bar(axes: Axes, scale: HeatScale, cmap: str) -> None:
    """A colour bar, with the values at its ends."""
    axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=cmap, extent=(0, 1, 0, 1))
    axes.set_yticks([])
    highest = f"≥ {scale.high:.3g}" if scale.high > scale.low else f"{scale.low:.3g}"
    axes.set_xticks([0, 1], [f"{scale.low:.3g}", highest])
    axes.tick_params(labelsize=8, length=0, pad=2)
    lowest_label, highest_label = axes.get_xticklabels()
    lowest_label.set_horizontalalignment("left")
    highest_label.set_horizontalalignment("right")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _wrapped(text: str, size: float) -> str:
    width = int(size * _CHARACTERS_PER_INCH)
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width))


def _reduced(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    factor = _LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
