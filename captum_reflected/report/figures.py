"""Figures of a run: the mean curves, and a gallery of maps."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from captum_reflected.report.measures import MEASURES, Measure, method_title
from captum_reflected.report.results import Example, Results
from captum_reflected.report.tables import interval
from captum_reflected.report.text import printable
from captum_reflected.visualization.curves import Band, CurvePanel, Theme, curve_limits, draw_curves
from captum_reflected.visualization.curves import curves_figure as draw_panels
from captum_reflected.visualization.maps import comparison_grid, draw_heat

# Characters under a picture before they run into the next one.
_LABEL_WIDTH = 28

_AXES = {
    "deletion": "pixels removed",
    "insertion": "pixels inserted, from blur",
    "insertion_zero": "pixels inserted, from zero",
}


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

    def panel(self, measure: Measure) -> CurvePanel:
        """The curves of a measure, as they are drawn."""
        bands = self.panels[measure.key]
        points = len(next(iter(bands.values())).mean)
        return CurvePanel(
            f"{measure.title}: {measure.hint}",
            _AXES[measure.key],
            self.results.fractions(points),
            bands,
        )

    @property
    def titles(self) -> dict[str, str]:
        """Every method of the run, in its order, to its name in legends."""
        return {method: printable(method_title(method)) for method in self.results.settings.methods}


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
    panels = [curves.panel(measure) for measure in curves.measures]
    return draw_panels(panels, curves.titles) if panels else None


def curve_panel(curves: Curves, measure: Measure, theme: Theme) -> Figure:
    """One panel of :func:`curves_figure`, without title and legend, on a clear ground."""
    figure = Figure(figsize=(4.1, 3.3), layout="constrained")
    figure.set_facecolor("none")
    limits = curve_limits([curves.panel(shown) for shown in curves.measures])
    draw_curves(figure.subplots(), curves.panel(measure), curves.titles, limits=limits, theme=theme)
    return figure


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
