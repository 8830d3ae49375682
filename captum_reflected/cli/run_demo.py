"""Runs the command ``captum-reflected demo``."""

from __future__ import annotations

import argparse
import time

from tqdm.auto import tqdm

from captum_reflected import demo
from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import METHODS
from captum_reflected.cli.parsing import EXIT_OK
from captum_reflected.metrics import relevance_mass_accuracy
from captum_reflected.models import DEMO_MODEL, load_model
from captum_reflected.visualization.maps import comparison_grid
from captum_reflected.visualization.notebook_figure import figure_bytes

_METHODS = (
    "balanced_relevance",
    "mask_regression",
    "transformer_attribution",
    "reflected_relevance",
    "integrated_gradients",
)


def run_command(arguments: argparse.Namespace) -> int:
    """Explains the scenes, prints the share of each method on the object, and writes a figure."""
    start = time.perf_counter()
    loaded = load_model(DEMO_MODEL)
    scenes = demo.load_scenes()
    images = demo.preprocess(scenes.images)
    maps = {
        METHODS[name].title: METHODS[name].explain(loaded.model, images, scenes.labels).detach()
        for name in tqdm(_METHODS, desc="explaining", unit="method", disable=None)
    }
    chosen = slice(0, 8, 2)
    figure = comparison_grid(
        loaded.to_pictures(images[chosen]),
        {title: heat[chosen] for title, heat in maps.items()},
        masks=scenes.masks[chosen],
        labels=[loaded.class_name(label) for label in scenes.labels[chosen].tolist()],
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output, figure_bytes(figure, "png", dpi=120))
    print(f"Relevance mass: share of the map on the object, mean of {len(images)} scenes")
    for title, heat in maps.items():
        print(f"  {title:<26}{relevance_mass_accuracy(heat, masks=scenes.masks).mean():6.1%}")
    print(f"  {'(area of the object)':<26}{scenes.masks.float().mean():6.1%}")
    seconds = (time.perf_counter() - start) / len(images)
    print(f"{seconds:.2g} s an image for all {len(maps)} methods\nFigure: {arguments.output}")
    return EXIT_OK
