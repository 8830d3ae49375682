"""The command ``captum-reflected explore``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_reflected.cli.options import add_fit_option, add_model_options
from captum_reflected.cli.parsing import EXIT_OK, method_names, whole_number

_FOLDER = Path("explorations")

_EXAMPLES = """\
examples:
  captum-reflected explore photo.jpg
      a page that shows how timm's pretrained DeiT-tiny sees the photo, patch by patch
  captum-reflected explore photo.jpg --model vit_base_patch16_224 --target tabby --top 2
      another model, a class by its name, and the likeliest other class
"""


def add_explore_command(commands: Any) -> None:
    """Adds the subcommand ``explore``."""
    explore = commands.add_parser(
        "explore",
        description="Writes one web page, which needs nothing else, on which the explanation of a "
        "photo can be\nexplored: point at a patch to see the patches that it flows into and that "
        "flow into it, its\nreflected image with the model's score, and its place in the map. The "
        "page also shows other\nmethods and classes, the probability while the highest patches are "
        "deleted or inserted, and\nthe layers one by one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explore.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    add_model_options(explore, default="deit_tiny_patch16_224")
    explore.add_argument(
        "--target",
        default="auto",
        metavar="CLASS",
        help='class to explain, by number or by name; "auto" for the predicted class '
        "(default: %(default)s)",
    )
    explore.add_argument(
        "--top",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="number of classes on the page: the explained one and the likeliest others; the time "
        "is proportional to it (default: %(default)s)",
    )
    explore.add_argument(
        "--methods",
        type=method_names,
        metavar="METHOD,...",
        help="methods whose maps are shown, separated by commas, with options after colons as in "
        "captum-reflected explain (default: mask_regression, balanced_relevance, "
        "transformer_attribution, reflected_relevance)",
    )
    add_fit_option(explore)
    explore.add_argument(
        "--start-layer",
        type=whole_number(0),
        metavar="N",
        help="first attention layer of the roll-out (default: 0; for CLIP models the last layer, "
        "as in published code, after which nothing flows between patches)",
    )
    explore.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help=f"file for the page (default: {_FOLDER}/NAME.html, NAME being that of the image)",
    )
    explore.set_defaults(run=_explore)


def _explore(arguments: argparse.Namespace) -> int:
    # Imported here, so that the help needs no torch.
    from captum_reflected.cli.options import check_files, load_from, resolve_device
    from captum_reflected.cli.targets import find_classes
    from captum_reflected.errors import UsageError
    from captum_reflected.exploration.explorer_page import DEFAULT_METHODS, explorer
    from captum_reflected.models.fitting import PhotoFitter
    from captum_reflected.models.pictures import UNREADABLE, read_picture

    check_files(arguments)
    output = arguments.output or _FOLDER / f"{arguments.image.stem}.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"output is {output}; wanted: a file that ends in .html")
    try:
        picture = read_picture(arguments.image)
    except UNREADABLE as error:
        raise UsageError(f"cannot read {arguments.image}: {error}") from error
    loaded = load_from(arguments, resolve_device(arguments.device))
    classes = find_classes(arguments.target, loaded)
    if classes is not None and len(classes) > 1:
        raise UsageError(
            f"target {arguments.target!r} names {len(classes)} classes; wanted: one, and --top N "
            "for the likeliest others"
        )
    fitter = PhotoFitter(loaded.transform, loaded.mean, loaded.std, arguments.fit)
    try:
        image = fitter(picture).image.to(next(loaded.model.parameters()).device)
        page = explorer(
            loaded.model,
            image,
            None if classes is None else classes[0],
            methods=arguments.methods or DEFAULT_METHODS,
            classes=arguments.top,
            class_names=loaded.class_names,
            mean=loaded.mean,
            std=loaded.std,
            title=f"{arguments.image.name}, {loaded.name}",
            start_layer=arguments.start_layer,
            show_progress=True,
        )
    except ValueError as error:  # the model or a method does not fit
        raise UsageError(str(error)) from error
    page.save(output)
    print(f"{output}: {len(page.html.encode('utf-8')) / 1e6:.1f} MB; open it in a browser")
    return EXIT_OK
