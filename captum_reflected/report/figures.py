"""Figures of a run: the mean curves, and a gallery of maps."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from captum_reflected.metrics import mean_interval
from captum_reflected.report.results import Example, Results
from captum_reflected.report.tables import method_title
from captum_reflected.visualization.curves import Band, CurvePanel
from captum_reflected.visualization.curves import curves_figure as draw_panels
from captum_reflected.visualization.maps import comparison_grid, draw_heat
from captum_reflected.visualization.notebook_figure import figure_bytes
from captum_reflected.visualization.text import printable


def mean_curves(results: Results) -> dict[str, CurvePanel]:
    """The mean curves of all methods, with 95 % intervals, by the metric that has them."""
    panels = {}
    for metric in results.metrics:
        bands = {}
        for method in results.settings.methods if metric.curve is not None else ():
            curves = results.curves(method, metric)
            if curves is not None:
                points = [mean_interval(values) for values in curves.T]
                bands[method] = Band(
                    np.array([point.mean for point in points]),
                    np.array([point.half_width if point.count > 1 else 0 for point in points]),
                )
        if bands:
            fractions = np.linspace(0, 1, len(next(iter(bands.values())).mean))
            heading = f"{metric.title}: {metric.hint}"
            panels[metric.key] = CurvePanel(heading, metric.axis, fractions, bands)
    return panels


def method_titles(results: Results) -> dict[str, str]:
    """Every method of the run, in its order, to its name in legends."""
    return {method: printable(method_title(method)) for method in results.settings.methods}


def curves_figure(
    results: Results, panels: Mapping[str, CurvePanel], emphasised: Collection[str] | None = None
) -> Figure | None:
    """The panels of :func:`mean_curves` side by side, or None where there are none.

    Args:
        results: a run.
        panels: its curves.
        emphasised: the methods whose curves are in colour; None: all.
    """
    if not panels:
        return None
    return draw_panels(list(panels.values()), method_titles(results), emphasised=emphasised)


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
    maps = {
        title: [
            torch.from_numpy(example.maps[method]) if method in example.maps else None
            for example in examples
        ]
        for method, title in methods.items()
    }
    masks = [None if one.mask is None else torch.from_numpy(one.mask) for one in examples]
    return comparison_grid(
        [_picture(example) for example in examples],
        maps,
        masks=None if all(mask is None for mask in masks) else masks,
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
    return figure_bytes(figure, "jpeg", dpi=100, quality=75)


def picture_jpeg(pixels: npt.NDArray[np.uint8], *, width: int = 240) -> bytes:
    """A picture (H, W, 3) or a mask (H, W), uint8, in the size of :func:`heat_jpeg`."""
    image = Image.fromarray(pixels)
    height = max(1, round(width * image.height / image.width))
    buffer = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()
