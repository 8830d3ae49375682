"""Figures of a run: the mean curves, and a gallery of maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from captum_reflected.benchmark.measures import MEASURES, Measure, method_title
from captum_reflected.benchmark.results import Example, Results
from captum_reflected.benchmark.tables import interval
from captum_reflected.benchmark.text import printable
from captum_reflected.visualization import comparison_grid, draw_heat

Dashes: TypeAlias = tuple[float, ...]

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


def curve_measures(results: Results) -> list[Measure]:
    """The measures of which at least one method has a curve."""
    return [
        MEASURES[metric]
        for metric in _AXES
        if metric in results.settings.metrics
        and any(results.curves(method, metric) is not None for method in results.settings.methods)
    ]


def curves_figure(results: Results) -> Figure | None:
    """Mean curve of every method with its 95 % interval, one panel a measure.

    Args:
        results: a run.

    Returns:
        Figure: or None where the run has no curves.
    """
    shown = curve_measures(results)
    if not shown:
        return None
    rows = -(-len(results.settings.methods) // (2 * len(shown)))
    figure = Figure(figsize=(4.1 * len(shown), 3.9 + 0.22 * rows), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, shown, strict=True):
        _draw_curves(axes, results, measure, LIGHT)
        axes.set_title(f"{measure.title}: {measure.hint}", fontsize=10, color=LIGHT.ink)
    for axes in panels[1:]:
        axes.set_ylabel("")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 * len(shown),
        frameon=False,
        fontsize=9,
        handlelength=3.2,
    )
    return figure


def curve_panel(results: Results, measure: Measure, theme: Theme) -> Figure:
    """One panel of :func:`curves_figure`, without title and legend, on a clear ground."""
    figure = Figure(figsize=(4.1, 3.3), layout="constrained")
    figure.set_facecolor("none")
    _draw_curves(figure.subplots(), results, measure, theme)
    return figure


def _draw_curves(axes: Axes, results: Results, measure: Measure, theme: Theme) -> None:
    for place, method in enumerate(results.settings.methods):
        curves = results.curves(method, measure.key)
        if curves is None:
            continue
        color, dashes = line_style(place)
        fractions = results.fractions(curves.shape[1])
        points = [point for point in map(interval, curves.T) if point is not None]
        mean = np.array([point.mean for point in points])
        half = np.array([point.half_width or 0 for point in points])
        axes.fill_between(fractions, mean - half, mean + half, color=color, alpha=0.13, linewidth=0)
        axes.plot(
            fractions,
            mean,
            color=color,
            linestyle=(0, dashes) if dashes else "-",
            linewidth=1.7,
            label=printable(method_title(method)).replace("$", r"\$"),
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_AXES[measure.key], fontsize=9, color=theme.ink)
    axes.set_ylabel("probability of the explained class", fontsize=9, color=theme.ink)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=8, colors=theme.ink, length=0)
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
        labels=[example_label(example) for example in examples],
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
