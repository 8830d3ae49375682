"""Runs the command ``captum-reflected benchmark``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from captum_reflected import __version__
from captum_reflected.benchmark.data import SCENES, ImageSet, choose, open_images
from captum_reflected.benchmark.rows import read_rows
from captum_reflected.benchmark.runner import run
from captum_reflected.benchmark.settings import Processes, Settings, weights_digest
from captum_reflected.cli.options import load_from, resolve_device
from captum_reflected.cli.parsing import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK
from captum_reflected.errors import BenchmarkError, UsageError
from captum_reflected.metrics.registry import METRICS


def run_command(arguments: argparse.Namespace) -> int:
    """Runs or resumes a benchmark."""
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
