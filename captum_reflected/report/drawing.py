"""Curves as shapes of an SVG picture that is part of the page.

Unlike a figure of matplotlib, such a picture takes its colours from the page's style sheet, and
its curves react to the pointer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from captum_reflected.visualization.curves import CurvePanel

WIDTH, HEIGHT = 410, 310
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 8, 46
_TICKS = 6

_Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """A curve, in coordinates of the picture.

    Attributes:
        method: whose curve it is.
        line: the mean, as the ``d`` of an SVG path.
        band: the outline of its interval, likewise.
    """

    method: str
    line: str
    band: str


@dataclass(frozen=True)
class Drawing:
    """A panel of curves, in coordinates of a picture of ``WIDTH`` x ``HEIGHT``.

    Attributes:
        xlabel: the label of the x axis.
        x_ticks: places and texts on the x axis.
        y_ticks: places and texts on the y axis.
        shapes: the curves, in the order in which they are painted.
    """

    xlabel: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    shapes: Sequence[Shape]


def draw(panel: CurvePanel, order: Sequence[str], limits: tuple[float, float]) -> Drawing:
    """Draws the mean curves of a panel and their intervals.

    Args:
        panel: the curves, of probabilities.
        order: the methods in the order in which they are painted.
        limits: the lowest and the highest probability on the y axis.
    """
    low, high = limits

    def across(fractions: _Points) -> _Points:
        return LEFT + fractions * (WIDTH - LEFT - RIGHT)

    def up(values: _Points) -> _Points:
        share = (np.clip(values, low, high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    x = across(panel.fractions)
    shapes = []
    for method in order:
        band = panel.bands.get(method)
        if band is None:
            continue
        upper, lower = up(band.mean + band.half_width), up(band.mean - band.half_width)
        outline = np.concatenate([upper, lower[::-1]])
        around = np.concatenate([x, x[::-1]])
        shapes.append(Shape(method, _path(x, up(band.mean)), f"{_path(around, outline)}Z"))
    return Drawing(panel.xlabel, _ticks(0, 1, across), _ticks(low, high, up), shapes)


def _path(x: _Points, y: _Points) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _ticks(low: float, high: float, place: Callable[[_Points], _Points]) -> list[tuple[float, str]]:
    """Round numbers from ``low`` to ``high``: their places, and their texts in percent."""
    found = np.asarray(MaxNLocator(_TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    found = found[(found >= low) & (found <= high)]
    return [
        (round(float(at), 1), f"{100 * value:.3g}%")
        for at, value in zip(place(found), found, strict=True)
    ]
