"""The command ``captum-reflected benchmark``; torchrun runs it as a module."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_reflected.cli.names import (
    DEMO_MODEL,
    HALF_NAMES,
    METHOD_NAMES,
    METRIC_NAMES,
    METRICS_WITH_MASKS,
    PRECISION_NAMES,
    SCENES,
    TARGET_NAMES,
)
from captum_reflected.cli.options import add_model_options
from captum_reflected.cli.parsing import method_names, names_from, precision_name, whole_number
from captum_reflected.errors import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {"model": DEMO_MODEL, "data": SCENES, "target": "label"},
    "paper-table1": {
        "model": "vit_base_patch16_224.orig_in21k_ft_in1k",
        "methods": [
            "attention_grad_cam",
            "attention_rollout",
            "transformer_attribution",
            "reflected_relevance",
        ],
    },
    "paper-table2": {
        "model": "open_clip:ViT-B-32/openai",
        "classes": "imagenet",
        "methods": ["transformer_attribution", "reflected_relevance"],
    },
}
"""Option values of each preset; the user has to pass the path of ImageNet's validation images."""

_DEFAULTS = {"target": "predicted", "methods": list(METHOD_NAMES), "metrics": list(METRIC_NAMES)}

_EXAMPLES = """\
examples:
  captum-reflected benchmark --preset scenes
      all methods and metrics on the embedded model and scenes, offline, in a minute or two
  captum-reflected benchmark --model deit_tiny_patch16_224 --data photos --limit 200
      a folder of photos
  captum-reflected benchmark --model deit_tiny_patch16_224 --data photos --masks masks \\
      --labels labels.csv --correct-only --metrics pointing_game,average_precision
      how well maps find the objects that the model recognizes
  torchrun --nproc-per-node 8 -m captum_reflected.benchmark --preset paper-table1 \\
      --data imagenet/val --output table1
      Sago & Hotta's Table 1 (50,000 images), on eight GPUs; run the same command again to
      resume it after any interruption
  captum-reflected report table1
      tables, curves, gallery and a page, also while the benchmark runs
"""


def add_benchmark_command(commands: Any) -> None:
    """Adds the subcommand ``benchmark``."""
    parser = commands.add_parser(
        "benchmark",
        description="Explains images by several methods, scores every map, and writes the results "
        "of each image\nto a file as soon as they are known. To resume an interrupted run, run the "
        "same command again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=_run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; options that a preset may set default to None."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help="default values for other options: scenes (the embedded model and scenes), "
        "paper-table1, paper-table2 (those of Sago & Hotta; pass ImageNet's folder with --data)",
    )
    add_model_options(parser, default=None)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help='a folder of images, such as ILSVRC\'s val; "scenes" for the embedded scenes; or a '
        "name for timm.data.create_dataset, torch/... or hfds/...",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of a timm dataset")
    parser.add_argument(
        "--split", default="validation", help="split of a timm dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.csv",
        help="the class of each image of a folder, in the format of ILSVRC's LOC_val_solution.csv "
        "(default: inferred from the names of folders and files)",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="a folder with the mask of each image of a folder, photo.png for photo.jpg, of the "
        "photo's size: 255 on the object, 128 on pixels to be ignored, 0 on the background. It is "
        "resized and cropped like the photo. Images without a mask fail",
    )
    parser.add_argument(
        "--correct-only",
        action="store_true",
        help="skip and count images whose predicted class is not their label, as localisation "
        "makes sense only where the model recognizes the object",
    )
    parser.add_argument(
        "--methods",
        type=method_names,
        metavar="NAME,...",
        help=f"all (default), or some of {', '.join(METHOD_NAMES)}; options of an attributor "
        "follow after colons, such as mask_regression:forwards=50,transformer_attribution:rule=lrp",
    )
    parser.add_argument(
        "--metrics",
        type=names_from(METRIC_NAMES),
        metavar="NAME,...",
        help=f"all (default), or some of {', '.join(METRIC_NAMES)}. Masks of the objects (--masks; "
        f"the scenes have some) are needed for {', '.join(METRICS_WITH_MASKS)}",
    )
    parser.add_argument(
        "--target", choices=TARGET_NAMES, help="the class to explain (default: predicted)"
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1),
        metavar="N",
        help="evaluate only N images, evenly spaced in the data (default: all)",
    )
    parser.add_argument(
        "--half",
        choices=HALF_NAMES,
        help="evaluate only the images for choosing between methods (even numbers) or for "
        "confirming the choice (odd numbers)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISION_NAMES,
        type=precision_name,
        default="float32",
        help="precision of the model's forwards, by autocast (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="number of images in a batch (default: 1 on a CPU, else 16)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        metavar="N",
        help="data loading workers of each process (default: 0 on a CPU, else 4)",
    )
    parser.add_argument(
        "--gallery",
        type=whole_number(0),
        default=8,
        metavar="N",
        help="number of images stored with their maps for the report (default: %(default)s)",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="retry the images that failed before"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark"),
        metavar="DIR",
        help="folder for the results, created if missing; all nodes have to share it "
        "(default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> int:
    _fill_in(arguments)
    from captum_reflected.cli.run_benchmark import run_command

    return run_command(arguments)


def _fill_in(arguments: argparse.Namespace) -> None:
    """Sets missing options to the preset's values, or to their defaults."""
    preset = PRESETS.get(arguments.preset, {})
    for name, value in {**_DEFAULTS, **preset}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("model", "data"):
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name} is missing; wanted: --{name}, or a --preset that has one")
