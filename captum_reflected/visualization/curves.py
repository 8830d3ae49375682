"""Figures of deletion, insertion and other curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from captum_reflected.inputs.checks import check_option
from captum_reflected.inputs.targets import Score
from captum_reflected.metrics import Evaluation, mean_interval
from captum_reflected.visualization.maps import _ROUNDING, _Values
from captum_reflected.visualization.notebook_figure import NotebookFigure

Dashes: TypeAlias = tuple[float, ...]

# Okabe and Ito's colours that are visible on light and dark backgrounds, and grey. They can be
# distinguished by colour-blind readers, and by dashes in greyscale. 7 colours and 6 dashes give 42
# different line styles.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#858585")
_DASHES: tuple[Dashes, ...] = (
    (),
    (5, 2),
    (1.2, 1.4),
    (6, 1.5, 1.2, 1.5),
    (9, 2.5),
    (3, 1.2, 1.2, 1.2, 1.2, 1.2),
)


@dataclass(frozen=True)
class Theme:
    """Colours of text (``ink``) and of lines behind the data (``faint``)."""

    ink: str
    faint: str


LIGHT = Theme(ink="#1f2328", faint="#d9dde2")
DARK = Theme(ink="#e4e7eb", faint="#3a4048")


GREY = "#a9b0b8"
"""The colour of curves that are not emphasised, visible on light and dark backgrounds."""


def line_style(place: int) -> tuple[str, Dashes]:
    """Colour and dashes of the method at this position in a figure; () is a solid line."""
    return _COLORS[place % len(_COLORS)], _DASHES[place % len(_DASHES)]


@dataclass(frozen=True)
class Band:
    """A mean curve and the half-width of its 95 % interval, which is 0 for a single image."""

    mean: _Values
    half_width: _Values

    @property
    def top(self) -> float:
        """The highest point."""
        return float((self.mean + self.half_width).max())

    @property
    def bottom(self) -> float:
        """The lowest point."""
        return float((self.mean - self.half_width).min())


@dataclass(frozen=True)
class CurvePanel:
    """Mean curves that share their axes.

    Attributes:
        heading: the title of the panel.
        xlabel: the label of the x axis: what happens along the curves.
        fractions: (S + 1,), the share of pixels at each point.
        bands: the curves by method.
    """

    heading: str
    xlabel: str
    fractions: _Values
    bands: Mapping[str, Band]


def metric_curves(results: Mapping[str, Evaluation], *, score: Score = "probability") -> Figure:
    """Draws mean deletion and insertion curves with their pointwise 95 % intervals.

    The smaller the area under a deletion curve, and the larger that under an insertion
    curve, the better the maps rank the pixels.

    Args:
        results: by title, the result of :func:`captum_reflected.metrics.evaluate` for a method.
        score: the ``score`` that was passed to ``evaluate``.

    Returns:
        Figure: one panel for deletion and one for insertion.

    Raises:
        ValueError: there are no results, their curves have different points, or ``score`` is
            unknown or does not fit the curves.
    """
    check_option("score", score, get_args(Score))
    if not results:
        raise ValueError("results is empty; wanted: one Evaluation or more, by title")
    fractions = next(iter(results.values())).fractions.double().cpu()
    for title, result in results.items():
        if not torch.equal(result.fractions.double().cpu(), fractions):
            raise ValueError(
                f"the curves of {title!r} have {len(result.fractions)} points and the first "
                f"{len(fractions)}, or at other fractions; wanted: one pixels_per_step and one "
                "image size"
            )
        curves = torch.stack([result.deletion_curve, result.insertion_curve])
        if score == "probability" and bool(((curves < 0) | (curves > 1 + _ROUNDING)).any()):
            raise ValueError(
                f'score is "probability" and the curves of {title!r} go beyond 0 to 1; wanted: '
                'score="logit", if evaluate was asked for it'
            )
    panels = []
    for kind, change, hint in (
        ("deletion", "removed", "low is better"),
        ("insertion", "inserted", "high is better"),
    ):
        bands = {
            title: _mean_band(getattr(result, f"{kind}_curve")) for title, result in results.items()
        }
        heading = f"{kind.capitalize()}: {hint}"
        panels.append(CurvePanel(heading, f"pixels {change}", fractions.numpy(), bands))
    return curves_figure(panels, {title: title for title in results}, score=score)


def curves_figure(
    panels: Sequence[CurvePanel],
    titles: Mapping[str, str],
    *,
    score: Score = "probability",
    emphasised: Collection[str] | None = None,
) -> Figure:
    """Draws panels side by side, on one scale and with one legend.

    Args:
        panels: one or more panels.
        titles: the names in the legend by method; the position of a method here determines its
            line style in every panel.
        score: the score that the curves show.
        emphasised: the methods whose curves are in colour and in the legend; the others are
            grey, without intervals. None emphasises all of them.

    Returns:
        Figure: not attached to any window.
    """
    columns = 2 * len(panels)
    num_named = len(titles if emphasised is None else emphasised)
    rows = -(-(num_named + (num_named < len(titles))) // columns)
    figure = NotebookFigure(
        figsize=(4.2 * len(panels), 3.9 + 0.22 * rows), layout=ConstrainedLayoutEngine(wspace=0.05)
    )
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    limits = curve_limits(panels, score)
    lines: dict[str, Artist] = {}
    for axes, panel in zip(grid, panels, strict=True):
        draw_curves(axes, panel, titles, limits=limits, score=score, emphasised=emphasised)
        axes.set_title(panel.heading, fontsize=10, color=LIGHT.ink, parse_math=False)
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    for axes in grid[1:]:
        axes.set_ylabel("")
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3.2,
    )
    return figure


def curve_limits(panels: Sequence[CurvePanel], score: Score = "probability") -> tuple[float, float]:
    """The common y limits of all panels, so that they can be compared; always include 0."""
    bands = [band for panel in panels for band in panel.bands.values()]
    top = max([*(band.top for band in bands), 0.01])
    if score == "probability":  # the wide intervals of few images can go beyond a probability of 1
        return 0.0, 1.03 * min(top, 1.0)
    return min([0.0, *(band.bottom for band in bands)]), 1.03 * top


def draw_curves(
    axes: Axes,
    panel: CurvePanel,
    titles: Mapping[str, str],
    *,
    limits: tuple[float, float],
    score: Score = "probability",
    theme: Theme = LIGHT,
    emphasised: Collection[str] | None = None,
) -> None:
    """Draws the curves of one panel, without heading and legend.

    Args:
        axes: the axes to draw on.
        panel: the curves.
        titles: the labels by method; the position of a method here determines its line style.
        limits: from :func:`curve_limits`.
        score: the score that the curves show.
        theme: colours of everything but the curves.
        emphasised: as in :func:`curves_figure`; line styles then depend on the position among
            these methods.
    """
    named = list(titles if emphasised is None else filter(emphasised.__contains__, titles))
    for place, method in enumerate(named):
        band = panel.bands.get(method)
        if band is None:
            continue
        color, dashes = line_style(place)
        axes.fill_between(
            panel.fractions,
            band.mean - band.half_width,
            band.mean + band.half_width,
            color=color,
            alpha=0.13,
            linewidth=0,
        )
        axes.plot(
            panel.fractions,
            band.mean,
            color=color,
            linestyle=(0, dashes) if dashes else "-",
            linewidth=1.7,
            label=titles[method].replace("$", r"\$"),
        )
    others = [panel.bands[one] for one in titles if one in panel.bands and one not in named]
    for band in others:
        axes.plot(
            panel.fractions,
            band.mean,
            color=GREY,
            linewidth=1.0,
            zorder=1.5,  # behind the curves in colour
            label="other methods" if band is others[0] else None,
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(limits)
    axes.set_xlabel(panel.xlabel, fontsize=10, color=theme.ink)
    axes.set_ylabel(f"{score} of the explained class", fontsize=10, color=theme.ink)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if score == "probability":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=9, colors=theme.ink, length=0, pad=6)
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.faint)


def _mean_band(curves: Tensor) -> Band:
    """The mean of (B, S + 1) curves over the images."""
    points = [mean_interval(point) for point in curves.detach().cpu().T]
    return Band(
        np.array([point.mean for point in points]),
        np.array([point.half_width if point.count > 1 else 0.0 for point in points]),
    )
