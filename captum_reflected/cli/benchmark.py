"""The command ``captum-reflected benchmark``; torchrun runs it as a module."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from captum_reflected import __version__
from captum_reflected.attr.methods import METHODS
from captum_reflected.benchmark.data import HALVES, SCENES, ImageSet, choose, open_images
from captum_reflected.benchmark.rows import read_rows
from captum_reflected.benchmark.runner import run
from captum_reflected.benchmark.settings import (
    PRECISIONS,
    TARGETS,
    Processes,
    Settings,
    weights_digest,
)
from captum_reflected.cli.options import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_model_options,
    load_from,
    method_names,
    names_from,
    resolve_device,
    whole_number,
)
from captum_reflected.errors import BenchmarkError, UsageError
from captum_reflected.metrics.registry import METRICS
from captum_reflected.models import DEMO_MODEL

PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {"model": DEMO_MODEL, "data": SCENES, "target": "label"},
    "paper-table1": {
        "model": "vit_base_patch16_224.orig_in21k_ft_in1k",
        "methods": ["grad_cam", "rollout", "transformer_attribution", "reflected"],
    },
    "paper-table2": {
        "model": "open_clip:ViT-B-32/openai",
        "classes": "imagenet",
        "methods": ["transformer_attribution", "reflected"],
    },
}
"""Option values of each preset; the user has to pass the path of ImageNet's validation images."""

_DEFAULTS = {"target": "predicted", "methods": list(METHODS), "metrics": list(METRICS)}

_WITH_MASKS = [name for name, metric in METRICS.items() if metric.needs_masks]

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
    parser.set_defaults(run=run_command)


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
        help=f"all (default), or some of {', '.join(METHODS)}; options of an attributor follow "
        "after colons, such as mask_regression:forwards=50,transformer_attribution:rule=lrp",
    )
    parser.add_argument(
        "--metrics",
        type=names_from(tuple(METRICS)),
        metavar="NAME,...",
        help=f"all (default), or some of {', '.join(METRICS)}. Masks of the objects (--masks; the "
        f"scenes have some) are needed for {', '.join(_WITH_MASKS)}",
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="the class to explain (default: predicted)"
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1),
        metavar="N",
        help="evaluate only N images, evenly spaced in the data (default: all)",
    )
    parser.add_argument(
        "--half",
        choices=HALVES,
        help="evaluate only the images for choosing between methods (even numbers) or for "
        "confirming the choice (odd numbers)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
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


def run_command(arguments: argparse.Namespace) -> int:
    """Runs or resumes a benchmark."""
    _fill_in(arguments)
    _check_output(arguments.output, None if arguments.data == SCENES else Path(arguments.data))
    processes = Processes.started()
    device = resolve_device(arguments.device)
    if device.type == "cuda" and device.index is None and processes.count > 1:
        device = resolve_device(f"cuda:{processes.local_rank}")
        torch.cuda.set_device(device)
    model = load_from(arguments, device)
    if model.num_classes < 2:
        raise UsageError(
            f"model {model.name!r} has {model.num_classes} classes; wanted: a classifier with "
            "two classes or more"
        )
    images = open_images(
        arguments.data,
        model,
        root=arguments.data_root,
        split=arguments.split,
        labels=arguments.labels,
        masks=arguments.masks,
    )
    on_cpu = device.type == "cpu"
    settings = Settings(
        captum_reflected=__version__,
        model=arguments.model,
        weights=weights_digest(model.model),
        data={
            "name": images.name,
            "images": len(images.files),
            "fingerprint": images.fingerprint,
        }
        | ({} if arguments.masks is None else {"masks": str(arguments.masks)}),
        images=len(choose(len(images.files), arguments.limit, arguments.half)),
        methods=arguments.methods,
        metrics=_usable_metrics(arguments.metrics, images),
        target=arguments.target,
        precision=arguments.precision,
        batch_size=arguments.batch_size or (1 if on_cpu else 16),
        gallery=arguments.gallery,
        half=arguments.half,
        correct_only=arguments.correct_only,
    )
    _check_labels(settings, images)
    try:
        with _terminated_as_interrupted():
            progress = run(
                model,
                images,
                settings,
                arguments.output,
                processes,
                workers=(0 if on_cpu else 4) if arguments.workers is None else arguments.workers,
                retry_failed=arguments.retry_failed,
            )
    except KeyboardInterrupt:
        if processes.is_first:
            print(
                f"captum-reflected: interrupted; the results of {_count_kept(arguments.output)} of "
                f"{settings.images} images are in {arguments.output}; run the same command again "
                "to resume",
                file=sys.stderr,
            )
        return EXIT_INTERRUPTED
    if progress is None:
        return EXIT_OK
    skipped = (
        f", {progress.skipped} skipped because the model does not predict their label"
        if arguments.correct_only
        else ""
    )
    rate = progress.evaluated / progress.seconds
    print(
        f"{progress.evaluated} images in {progress.seconds:.1f} s, {rate:.3g} images/s, "
        f"{processes.count} process(es) on {device.type}\n"
        f"{progress.finished} of {settings.images} images finished, {progress.failed} of them "
        f"failed{skipped}\nFor tables and figures, run: captum-reflected report {arguments.output}"
    )
    return EXIT_OK if progress.failed + progress.skipped < progress.finished else EXIT_BAD_INPUT


def _count_kept(folder: Path) -> int:
    return len(read_rows(folder, figures=False).by_index)


def _check_output(output: Path, data: Path | None) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; wanted: a folder")
    if data is not None and data.is_dir() and output.resolve().is_relative_to(data.resolve()):
        raise UsageError(
            f"output {output} is inside the folder of the images, {data}, so that figures of a "
            "report would count as images; wanted: a folder outside of it"
        )


def _fill_in(arguments: argparse.Namespace) -> None:
    """Sets missing options to the preset's values, or to their defaults."""
    preset = PRESETS.get(arguments.preset, {})
    for name, value in {**_DEFAULTS, **preset}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("model", "data"):
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name} is missing; wanted: --{name}, or a --preset that has one")


def _usable_metrics(names: list[str], images: ImageSet) -> list[str]:
    """The metrics that can be computed on the data; without masks, none that needs them."""
    needing = [name for name in names if METRICS[name].needs_masks]
    if images.read_mask is not None or not needing:
        return names
    if names != list(METRICS):
        usable = [name for name, metric in METRICS.items() if not metric.needs_masks]
        raise UsageError(
            f"metrics {', '.join(needing)} need masks of the objects, and data {images.name!r} has "
            f"none; wanted: --masks DIR for a folder of images, or some of {', '.join(usable)}"
        )
    return [name for name in names if name not in needing]


def _check_labels(settings: Settings, images: ImageSet) -> None:
    if (settings.target == "label" or settings.correct_only) and images.labels is not None:
        unknown = [
            file for file, label in zip(images.files, images.labels, strict=True) if label is None
        ]
        if len(unknown) == len(images.files):
            given, otherwise = "target is 'label'", "--target predicted"
            if settings.correct_only:
                given, otherwise = "--correct-only is given", "no --correct-only"
            raise BenchmarkError(
                f"{given}, and the classes of the images in {images.name} are not known; "
                f"wanted: --labels FILE.csv, folders named by WordNet id or class, or {otherwise}"
            )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treats SIGTERM, which schedulers and torchrun send, like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
