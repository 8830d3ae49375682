"""The pictures of photos in the README and in the documentation.

``python tools/photos.py --weights deit_tiny.safetensors`` explains photos that other packages
ship and everybody may show, and writes ``docs/photo.png``, the README's picture, and
``docs/gallery/``. ``pip install scikit-image`` first: most of the photos are in its wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from captum_reflected._writing import write_whole
from captum_reflected.cli.parsing import EXIT_BAD_INPUT, EXIT_OK
from captum_reflected.errors import ModelLoadError, UsageError
from captum_reflected.explanations import explain
from captum_reflected.models import LoadedModel, load_model
from captum_reflected.models.pictures import read_picture
from captum_reflected.visualization.notebook_figure import figure_bytes
from captum_reflected.visualization.overlay import Pixels

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Photo:
    """A photo that a package ships.

    Attributes:
        package: whose wheel holds it, by the name that is imported.
        file: inside the package.
        classes: what is explained; first words of class names.
    """

    package: str
    file: str
    classes: tuple[str, ...]


# Sources and licences are in docs/gallery.md.
PHOTOS = {
    "hopper": Photo(
        "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", ("military uniform", "bow tie")
    ),
    "coffee": Photo("skimage", "data/coffee.png", ("espresso", "cup")),
    "chelsea": Photo("skimage", "data/chelsea.png", ("Egyptian cat",)),
    "camera": Photo("skimage", "data/camera.png", ("tripod",)),
    "rocket": Photo("skimage", "data/rocket.jpg", ("crane",)),
}
FIRST = "hopper"

README_METHODS = {
    "balanced_relevance": "BalancedRelevance",
    "mask_regression": "MaskRegression",
    "transformer_attribution": "TransformerAttribution",
    "integrated_gradients": "IntegratedGradients",
    "attention_grad_cam": "AttentionGradCam",
}
GALLERY_METHODS = {
    "balanced_relevance": "BalancedRelevance",
    "mask_regression": "MaskRegression",
    "transformer_attribution:rule=balanced": "TransformerAttribution\nrule=balanced",
    "transformer_attribution": "TransformerAttribution",
    "reflected_relevance": "ReflectedRelevance",
    "integrated_gradients": "IntegratedGradients",
    "attention_grad_cam": "AttentionGradCam",
}
PAGE_METHODS = (
    "balanced_relevance",
    "mask_regression",
    "transformer_attribution",
    "reflected_relevance",
    "attention_rollout",
    "raw_attention",
    "attention_grad_cam",
)


@dataclass(frozen=True)
class Case:
    """A photo as the model sees it, and a class.

    Attributes:
        image: (1, C, H, W), preprocessed.
        picture: (H, W, 3).
        target: the class.
        label: its name and probability.
    """

    image: Tensor
    picture: Pixels
    target: int
    label: str


def cases(loaded: LoadedModel, photo: Photo) -> list[Case]:
    """The photo with each of its classes.

    Raises:
        UsageError: the package is not installed, or the model has no such class.
    """
    image = loaded.transform(read_picture(path_of(photo)))[None]
    with torch.no_grad():
        probability = loaded.model(image).softmax(dim=-1)[0]
    found = []
    for name in photo.classes:
        named = [
            index
            for index, text in enumerate(loaded.class_names or ())
            if text.partition(",")[0] == name
        ]
        if not named:
            raise UsageError(f"{loaded.name} has no class {name!r}; wanted: a model of ImageNet")
        # "crane" is a bird and a machine.
        target = max(named, key=lambda index: float(probability[index]))
        label = f"{name}, {probability[target]:.0%}"
        picture = (255 * loaded.to_pictures(image)[0]).round().byte().numpy()
        found.append(Case(image, picture, target, label))
    return found


def path_of(photo: Photo) -> Path:
    """The photo's file.

    Raises:
        UsageError: the package is not installed.
    """
    package = importlib.util.find_spec(photo.package)
    if package is None or package.origin is None:
        raise UsageError(f"{photo.package} is not installed; wanted: pip install scikit-image")
    return Path(package.origin).parent / photo.file


def overlay(loaded: LoadedModel, case: Case, method: str) -> Pixels:
    """(H, W, 3): the photo under its map."""
    shown: Pixels = explain(loaded.model, case.image, case.target, method=method).overlay()[0]
    return shown


def sheet(cells: Sequence[Sequence[tuple[str, Pixels]]], size: float = 2.0) -> Figure:
    """Pictures (H, W, 3) in rows, each with a line of text above it."""
    columns = max(len(row) for row in cells)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(size * columns, (size + 0.22) * len(cells)), layout=layout)
    grid = figure.subplots(len(cells), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, line in zip(grid, cells, strict=True):
        for axes, (text, picture) in zip(row, line, strict=False):
            axes.imshow(picture, interpolation="lanczos")
            axes.set_title(text, fontsize=9.5, parse_math=False, pad=4)
    return figure


def write(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure as PNG, or as JPEG if the path says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.removeprefix(".")
    write_whole(path, figure_bytes(figure, suffix, dpi=dpi))


def draw_readme(loaded: LoadedModel, path: Path) -> None:
    """One photo, two of its classes, several methods."""
    rows = []
    for case in cases(loaded, PHOTOS[FIRST]):
        maps = [(title, overlay(loaded, case, method)) for method, title in README_METHODS.items()]
        rows.append([(case.label, case.picture), *maps])
    write(sheet(rows), path, dpi=80)


def draw_gallery(loaded: LoadedModel, folder: Path) -> None:
    """A picture for each photo and class: the photo, and the maps of several methods."""
    for name, photo in PHOTOS.items():
        for case in cases(loaded, photo):
            cells = [
                (case.label, case.picture),
                *(
                    (title, overlay(loaded, case, method))
                    for method, title in GALLERY_METHODS.items()
                ),
            ]
            half = len(cells) // 2
            file = f"{name}-{case.label.partition(',')[0].replace(' ', '-').lower()}.jpg"
            write(sheet([cells[:half], cells[half:]]), folder / file, dpi=110)


def draw_methods(loaded: LoadedModel, folder: Path) -> None:
    """A picture for each method's page: the photo, and the maps of two classes."""
    both = cases(loaded, PHOTOS[FIRST])
    for method in PAGE_METHODS:
        maps = [(case.label, overlay(loaded, case, method)) for case in both]
        write(sheet([[("", both[0].picture), *maps]]), folder / f"{method}.jpg", dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python tools/photos.py", description="Draws the pictures of photos in the docs."
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="default: %(default)s")
    parser.add_argument("--weights", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="default: docs")
    given = parser.parse_args(arguments)
    try:
        loaded = load_model(given.model, weights=given.weights)
        draw_readme(loaded, given.output / "photo.png")
        draw_gallery(loaded, given.output / "gallery")
        draw_methods(loaded, given.output / "gallery")
    except (ModelLoadError, UsageError, OSError) as error:
        print(f"captum-reflected: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
