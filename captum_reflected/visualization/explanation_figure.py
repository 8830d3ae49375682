"""The figure of an explanation: a row for each target, a column for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from captum_reflected.visualization.cells import GAP, Cells, picture_inches
from captum_reflected.visualization.overlay import (
    HEAT_COLORS,
    OPACITY,
    Box,
    HeatScale,
    Pixels,
    heat_bar,
)
from captum_reflected.visualization.text import lines_height, wrapped

# Pixels of a picture for each inch of a figure, at most; photos can be far larger.
_PIXELS_PER_INCH = 280
_CROP_COLORS = ("#000000", "#ffffff")
_HEADING_SIZE, _TEXT_SIZE, _NUMBER_SIZE = 11, 10, 8
# Size of a colour bar's numbers for each inch of its width, at most, so that they do not meet.
_NUMBER_SIZE_PER_INCH = 5.0
# In inches: space between a picture and its text or its colour bar, and the height of a colour bar,
# without and with its numbers.
_TEXT_SPACE, _BAR_SPACE, _BAR, _WHOLE_BAR = 0.1, 0.07, 0.11, 0.36


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
    alpha: float = OPACITY,
    cmap: str = HEAT_COLORS,
    size: float = 3.2,
) -> Figure:
    """Draws photos, overlays with colour bars, and texts that do not overlap.

    Args:
        rows: one for each target or image.
        titles: the titles of the columns of overlays.
        heading: the text above the figure; lines are broken.
        alpha: opacity of the overlays, see :func:`captum_reflected.visualization.overlay`.
        cmap: name of the colour map of the overlays.
        size: width of one cell in inches; cells of very wide photos are wider.

    Returns:
        Figure: not attached to any window.
    """
    inches = [picture_inches(row.photo.shape, size) for row in rows]
    width = max([size, *(wide for _, wide in inches)])
    columns = 1 + len(titles)
    texts = [wrapped(row.text, width, _TEXT_SIZE) for row in rows]
    head = [wrapped(title, width, _TEXT_SIZE) for title in titles]
    above = wrapped(heading, columns * (width + GAP) - GAP, _HEADING_SIZE)
    cells = Cells(
        columns,
        width,
        [high for high, _ in inches],
        [max(_TEXT_SPACE + lines_height(text, _TEXT_SIZE), _WHOLE_BAR) for text in texts],
        lines_height(above, _HEADING_SIZE)
        + max((lines_height(title, _TEXT_SIZE) for title in head), default=0)
        + 1.5 * GAP,
    )
    if above:
        cells.figure.text(
            0.5,
            1 - 0.08 / cells.figure.get_figheight(),
            above,
            ha="center",
            va="top",
            fontsize=_HEADING_SIZE,
            parse_math=False,
        )
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        _draw_photo(cells.picture(place, 0), row, text, max(inches[place]))
        for column, (picture, scale) in enumerate(zip(row.overlays, row.scales, strict=True), 1):
            axes = cells.picture(place, column)
            axes.imshow(_reduced(picture, max(inches[place])))
            axes.set_axis_off()
            if place == 0:
                axes.set_title(head[column - 1], fontsize=_TEXT_SIZE, pad=5, parse_math=False)
            bar = cells.bar(place, column, space=_BAR_SPACE, height=_BAR)
            _draw_bar(bar, scale, alpha, cmap, min(_NUMBER_SIZE, _NUMBER_SIZE_PER_INCH * width))
    return cells.figure


def _draw_photo(axes: Axes, row: FigureRow, text: str, inches: float) -> None:
    """A photo whose longer side has this length, with its text and the frame."""
    picture = _reduced(row.photo, inches)
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(text, fontsize=_TEXT_SIZE, labelpad=5, parse_math=False)
    if row.box is not None:
        height, width = row.photo.shape[:2]
        down, across = picture.shape[0] / height, picture.shape[1] / width
        left, top = max(row.box.left, 0), max(row.box.top, 0)
        right, bottom = min(row.box.right, width), min(row.box.bottom, height)
        for color, line in zip(_CROP_COLORS, ((0, (4, 4)), (4, (4, 4))), strict=True):
            axes.add_patch(
                Rectangle(
                    (left * across - 0.5, top * down - 0.5),
                    (right - left) * across,
                    (bottom - top) * down,
                    fill=False,
                    edgecolor=color,
                    linestyle=line,
                    linewidth=1.5,
                    clip_on=False,
                )
            )


def _draw_bar(axes: Axes, scale: HeatScale, alpha: float, cmap: str, font_size: float) -> None:
    """The colours as they look over mid-grey, with the values at their ends."""
    axes.imshow(
        heat_bar(alpha=alpha, cmap=cmap),
        aspect="auto",
        extent=(0, 1, 0, 1),
        interpolation="nearest",
    )
    axes.set_yticks([])
    highest = f"≥ {scale.high:.3g}" if scale.high > scale.low else f"{scale.low:.3g}"
    axes.set_xticks([0, 1], [f"{scale.low:.3g}", highest])
    axes.tick_params(labelsize=font_size, length=0, pad=2)
    lowest_label, highest_label = axes.get_xticklabels()
    lowest_label.set_horizontalalignment("left")
    highest_label.set_horizontalalignment("right")
    axes.spines[:].set_visible(False)


def _reduced(pixels: Pixels, inches: float) -> Pixels:
    """A picture that has no more pixels than its longer side needs."""
    height, width = pixels.shape[:2]
    factor = _PIXELS_PER_INCH * inches / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
