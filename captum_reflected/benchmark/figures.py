"""Figures of a run: the mean curves, and a gallery of maps."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from captum_reflected.benchmark.measures import MEASURES, Measure, method_title
from captum_reflected.benchmark.results import Example, Results
from captum_reflected.benchmark.tables import interval
from captum_reflected.benchmark.text import printable
from captum_reflected.visualization import comparison_grid, draw_heat

Dashes: TypeAlias = tuple[float, ...]
_Values: TypeAlias = npt.NDArray[np.float64]

# Okabe and Ito's colours that show on light and on dark ground, and grey; told apart without
# colour vision, and by dashes without colour. 7 colours and 6 dashes make 42 different lines.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#858585")
_DASHES: tuple[Dashes, ...] = (
    (),
    (5, 2),
    (1.2, 1.4),
    (6, 1.5, 1.2, 1.5),
    (9, 2.5),
    (3, 1.2, 1.2, 1.2, 1.2, 1.2),
)

# Characters under a picture before they run into the next one.
_LABEL_WIDTH = 28

_AXES = {
    "deletion": "pixels removed",
    "insertion": "pixels inserted, from blur",
    "insertion_zero": "pixels inserted, from zero",
}


@dataclass(frozen=True)
class Theme:
    """Colours of text and of lines behind the data."""

    ink: str
    faint: str


LIGHT = Theme(ink="#1f2328", faint="#d9dde2")
DARK = Theme(ink="#e4e7eb", faint="#3a4048")


def line_style(place: int) -> tuple[str, Dashes]:
    """Colour and dashes of the method at this place of the run; () is a solid line."""
    return _COLORS[place % len(_COLORS)], _DASHES[place % len(_DASHES)]


@dataclass(frozen=True)
class Band:
    """A mean curve and the half-width of its 95 % interval, 0 for a single image."""

    mean: _Values
    half_width: _Values

    @property
    def top(self) -> float:
        """The highest point."""
        return float((self.mean + self.half_width).max())


@dataclass(frozen=True)
class Curves:
    """The mean curves of a run.

    Attributes:
        panels: measure to method to its band; only measures that have one.
        results: the run.
    """

    panels: Mapping[str, Mapping[str, Band]]
    results: Results

    @property
    def measures(self) -> list[Measure]:
        """The measures that have curves."""
        return [MEASURES[metric] for metric in self.panels]

    @property
    def top(self) -> float:
        """Where all panels end, so that they can be compared."""
        tops = [band.top for bands in self.panels.values() for band in bands.values()]
        return 1.03 * max([*tops, 0.01])


def mean_curves(results: Results) -> Curves:
    """The mean curve of every method and measure that has curves."""
    panels: dict[str, dict[str, Band]] = {}
    for metric in _AXES:
        for method in results.settings.methods:
            curves = results.curves(method, metric)
            if curves is not None:
                points = [point for point in map(interval, curves.T) if point is not None]
                panels.setdefault(metric, {})[method] = Band(
                    np.array([point.mean for point in points]),
                    np.array([point.half_width or 0 for point in points]),
                )
    return Curves(panels, results)


def curves_figure(curves: Curves) -> Figure | None:
    """Mean curve of every method with its 95 % interval, one panel a measure.

    Args:
        curves: of a run.

    Returns:
        Figure: or None where the run has no curves.
    """
    shown = curves.measures
    if not shown:
        return None
    columns = 2 * len(shown)
    rows = -(-len(curves.results.settings.methods) // columns)
    figure = Figure(
        figsize=(4.2 * len(shown), 3.9 + 0.22 * rows), layout=ConstrainedLayoutEngine(wspace=0.05)
    )
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    lines: dict[str, Artist] = {}
    for axes, measure in zip(panels, shown, strict=True):
        _draw_curves(axes, curves, measure, LIGHT)
        axes.set_title(f"{measure.title}: {measure.hint}", fontsize=10, color=LIGHT.ink)
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    for axes in panels[1:]:
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


def curve_panel(curves: Curves, measure: Measure, theme: Theme) -> Figure:
    """One panel of :func:`curves_figure`, without title and legend, on a clear ground."""
    figure = Figure(figsize=(4.1, 3.3), layout="constrained")
    figure.set_facecolor("none")
    _draw_curves(figure.subplots(), curves, measure, theme)
    return figure


def _draw_curves(axes: Axes, curves: Curves, measure: Measure, theme: Theme) -> None:
    for place, method in enumerate(curves.results.settings.methods):
        band = curves.panels[measure.key].get(method)
        if band is None:
            continue
        color, dashes = line_style(place)
        fractions = curves.results.fractions(len(band.mean))
        axes.fill_between(
            fractions,
            band.mean - band.half_width,
            band.mean + band.half_width,
            color=color,
            alpha=0.13,
            linewidth=0,
        )
        axes.plot(
            fractions,
            band.mean,
            color=color,
            linestyle=(0, dashes) if dashes else "-",
            linewidth=1.7,
            label=printable(method_title(method)).replace("$", r"\$"),
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, curves.top)
    axes.set_xlabel(_AXES[measure.key], fontsize=10, color=theme.ink)
    axes.set_ylabel("probability of the explained class", fontsize=10, color=theme.ink)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=9, colors=theme.ink, length=0, pad=6)
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.faint)


def gallery_methods(results: Results, examples: Sequence[Example]) -> dict[str, str]:
    """Methods that the examples have maps of, in the order of the run, with their titles."""
    titles = {method: title for example in examples for method, title in example.titles.items()}
    places = {method: place for place, method in enumerate(results.settings.methods)}
    ordered = sorted(titles, key=lambda method: places.get(method, len(places)))
    return {method: printable(titles[method]) for method in ordered}


def gallery_figure(results: Results, examples: Sequence[Example]) -> Figure | None:
    """One row an image, one column a method, as in the figures 6 and 7 of the paper.

    Args:
        results: a run.
        examples: the images to show. A map that an image has not leaves its cell empty.

    Returns:
        Figure: or None where there is no image.
    """
    methods = gallery_methods(results, examples)
    if not examples:
        return None
    has_masks = any(example.mask is not None for example in examples)
    return comparison_grid(
        [_picture(example) for example in examples],
        {
            title: [
                torch.from_numpy(example.maps[method]) if method in example.maps else None
                for example in examples
            ]
            for method, title in methods.items()
        },
        masks=[
            None if example.mask is None else torch.from_numpy(example.mask) for example in examples
        ]
        if has_masks
        else None,
        labels=[
            "\n".join(textwrap.fill(line, _LABEL_WIDTH) for line in label.split("\n"))
            for label in map(example_label, examples)
        ],
    )


def example_label(example: Example) -> str:
    """What the model sees in an image, and what it is where that is something else."""
    prediction, label = printable(example.prediction), printable(example.label)
    if not label or label == prediction:
        return prediction
    return f"{prediction}\n(label: {label})"


def _picture(example: Example) -> Tensor:
    return torch.from_numpy(example.picture).float() / 255


def heat_jpeg(example: Example, method: str, *, width: int = 240) -> bytes:
    """One cell of the gallery, without text."""
    height, side = example.picture.shape[:2]
    figure = Figure(figsize=(width / 100, max(1, round(width * height / side)) / 100), dpi=100)
    draw_heat(
        figure.add_axes((0, 0, 1, 1)), _picture(example), torch.from_numpy(example.maps[method])
    )
    figure.axes[0].set_aspect("auto")
    return save(figure, "jpeg")


def picture_jpeg(pixels: npt.NDArray[np.uint8], *, width: int = 240) -> bytes:
    """A picture (H, W, 3) or a mask (H, W), uint8, in the size of :func:`heat_jpeg`."""
    image = Image.fromarray(pixels)
    height = max(1, round(width * image.height / image.width))
    buffer = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def save(figure: Figure, kind: str, *, dpi: int = 100) -> bytes:
    """The file of a figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "captum_reflected"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()
