"""Figures of pictures in rows and columns, with texts that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.axes import Axes

from captum_reflected.visualization.notebook_figure import NotebookFigure

# Height of a picture relative to the wanted width, at most, and the long and the short side of
# those that are very wide or tall.
_TALLEST, _LONGEST, _SHORTEST = 1.6, 3.0, 0.16
# In inches: space between cells.
GAP = 0.12


def picture_inches(shape: Sequence[int], size: float) -> tuple[float, float]:
    """Height and width of a picture in a figure, in inches, with the picture's proportions.

    Args:
        shape: (H, W) of the picture, or (H, W, C).
        size: the width that the pictures of the figure should have. A tall picture is less wide;
            a picture that would be too narrow a strip is longer than the others.
    """
    height, width = shape[:2]
    ratio = max(height, width) / min(height, width)
    usual = size * (min(ratio, _TALLEST) if height > width else 1.0)
    long = max(usual, min(_SHORTEST * ratio, _LONGEST) * size)
    return (long, long / ratio) if height > width else (long / ratio, long)


@dataclass(frozen=True)
class Cells:
    """Places in a figure, in inches from the top.

    Attributes:
        columns: number of columns.
        width: of a column.
        heights: of the pictures of each row.
        below: of the space for what is under the pictures of each row.
        above: of the space for what is over the first row.
    """

    columns: int
    width: float
    heights: Sequence[float]
    below: Sequence[float]
    above: float

    @cached_property
    def figure(self) -> NotebookFigure:
        """The figure; it is not attached to any window."""
        return NotebookFigure(
            figsize=(
                self.columns * (self.width + GAP) + GAP,
                self.above + sum(self.heights) + sum(self.below) + len(self.heights) * GAP,
            )
        )

    def picture(self, row: int, column: int) -> Axes:
        """The axes of a picture."""
        return self._axes(column, self._top(row), self.heights[row])

    def bar(self, row: int, column: int, *, space: float, height: float) -> Axes:
        """Axes of this height, with this space between them and the picture over them."""
        return self._axes(column, self._top(row) + self.heights[row] + space, height)

    def _top(self, row: int) -> float:
        return self.above + sum(self.heights[:row]) + sum(self.below[:row]) + row * GAP

    def _axes(self, column: int, top: float, height: float) -> Axes:
        width, whole = self.figure.get_size_inches()
        left = GAP + column * (self.width + GAP)
        axes: Axes = self.figure.add_axes(
            (left / width, 1 - (top + height) / whole, self.width / width, height / whole)
        )
        return axes
