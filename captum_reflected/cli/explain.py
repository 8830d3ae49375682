"""The command ``captum-reflected explain``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_reflected.cli.names import (
    DEFAULT_ALPHA,
    DEFAULT_CMAP,
    METHOD_NAMES,
    QUALITY_NAMES,
)
from captum_reflected.cli.options import (
    add_fit_option,
    add_model_options,
    check_files,
    check_output_folder,
)
from captum_reflected.cli.parsing import method_names, share, whole_number
from captum_reflected.cli.photo_files import find_photos

_EXAMPLES = """\
examples:
  captum-reflected explain photo.jpg
      why does timm's pretrained DeiT-tiny see what it sees in the photo?
  captum-reflected explain photos --model vit_base_patch16_224 --quality fast
      all images of a folder, another model, the fastest method
  captum-reflected explain photo.jpg --top 3 --method mask_regression,integrated_gradients
      the three likeliest classes by two methods, in one figure
  captum-reflected explain photo.jpg --model deit_tiny_patch16_224 \\
      --weights pets.safetensors --class-names pets.txt --target "tabby"
      a fine-tuned model, a class by its name
  captum-reflected explain photo.jpg --model open_clip:ViT-B-32/openai \\
      --classes "dog,cat" --target dog
      what in the photo looks like the words "a photo of a dog."?
"""


def add_explain_command(commands: Any) -> None:
    """Adds the subcommand ``explain``."""
    explain = commands.add_parser(
        "explain",
        description="Prints the five likeliest classes of each image, and shows where the model\n"
        "sees the predicted class, or any other. Writes, for each image:\n"
        "  NAME.CLASS.METHOD.png          the photo next to the photo under its map\n"
        "  NAME.CLASS.METHOD.overlay.png  the latter alone, at the photo's own size\n"
        "  NAME.CLASS.METHOD.npy          the map itself, height x width of the model's input,\n"
        "                                 float32",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help='image files, folders of images, or patterns such as "photos/*.jpg"',
    )
    add_model_options(explain, default="deit_tiny_patch16_224")
    classes = explain.add_mutually_exclusive_group()
    classes.add_argument(
        "--target",
        default="auto",
        metavar="CLASS,...",
        help='classes to explain, by number or by name; "auto" for the predicted class '
        "(default: %(default)s)",
    )
    classes.add_argument(
        "--top",
        type=whole_number(1),
        metavar="N",
        help="explain the N likeliest classes of each image",
    )
    methods = explain.add_mutually_exclusive_group()
    methods.add_argument(
        "--quality",
        choices=QUALITY_NAMES,
        default="good",
        help="the recommended methods, by cost. fast: balanced_relevance, one forward and "
        "one backward per image; good: mask_regression, 20 forwards; best: "
        "mask_regression:forwards=50, in no metric that was measured clearly better than good "
        "(default: %(default)s)",
    )
    methods.add_argument(
        "--method",
        type=method_names,
        metavar="METHOD,...",
        help=f"instead of --quality, some of {', '.join(METHOD_NAMES)}; options of an attributor "
        "follow after colons, such as mask_regression:forwards=30:precision=bf16. The paper's "
        "method is reflected_relevance",
    )
    explain.add_argument(
        "--start-layer",
        type=whole_number(0),
        metavar="N",
        help="first attention layer of the roll-out (default: 0; for CLIP models the last layer, "
        "as in published code)",
    )
    add_fit_option(explain)
    explain.add_argument(
        "--alpha",
        type=share,
        default=DEFAULT_ALPHA,
        metavar="SHARE",
        help="opacity of the map over the photo where the map is bright, from 0 to 1; where it is "
        "dark, it has 30%% of it (default: %(default)s)",
    )
    explain.add_argument(
        "--cmap",
        default=DEFAULT_CMAP,
        metavar="NAME",
        help="a colour map of matplotlib, such as inferno, viridis or turbo (default: %(default)s)",
    )
    explain.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="images explained at once (default: %(default)s)",
    )
    explain.add_argument(
        "--output",
        type=Path,
        default=Path("explanations"),
        metavar="DIR",
        help="folder for the results, created if missing (default: %(default)s)",
    )
    explain.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # Checked first, since importing torch and loading the model take seconds.
    arguments.images = find_photos(arguments.images)
    check_files(arguments)
    check_output_folder(arguments.output)
    from captum_reflected.cli.run_explain import run_command

    return run_command(arguments)
