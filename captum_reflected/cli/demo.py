"""The command ``captum-reflected demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from captum_reflected import demo
from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import METHODS
from captum_reflected.cli.options import EXIT_OK
from captum_reflected.errors import UsageError
from captum_reflected.metrics import relevance_mass_accuracy
from captum_reflected.models import DEMO_MODEL, load_model
from captum_reflected.report.figures import save
from captum_reflected.visualization.maps import comparison_grid

_METHODS = (
    "balanced_relevance",
    "mask_regression",
    "transformer_attribution",
    "reflected",
    "integrated_gradients",
)


def add_demo_command(commands: Any) -> None:
    """Adds the subcommand ``demo``."""
    show = commands.add_parser(
        "demo",
        description="Explains an embedded Vision Transformer on embedded scenes with known ground "
        "truth, offline. Writes a figure, and prints how much of each map lies on the object that "
        "determines the class.",
    )
    show.add_argument(
        "--output",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE.png",
        help="file for the figure (default: %(default)s)",
    )
    show.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.output.suffix.lower() != ".png":
        raise UsageError(f"output is {arguments.output}; wanted: a file that ends in .png")
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
    write_whole(arguments.output, save(figure, "png", dpi=120))
    print(f"Positive mass of the map that falls on the object, mean of {len(images)} scenes:")
    for title, heat in maps.items():
        print(f"  {title:<26}{relevance_mass_accuracy(heat, masks=scenes.masks).mean():6.1%}")
    print(f"  {'(area of the object)':<26}{scenes.masks.float().mean():6.1%}")
    print(f"Figure: {arguments.output}")
    return EXIT_OK
