"""Runs the command ``captum-reflected explain``."""

from __future__ import annotations

import argparse
import errno
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from captum_reflected.attr._base import recommended_start_layer
from captum_reflected.attr.methods import METHODS, QUALITIES, find_method
from captum_reflected.cli.explanation_files import SHARE_TO_MARK, ExplanationFiles, PhotoResult
from captum_reflected.cli.options import load_from, resolve_device
from captum_reflected.cli.parsing import EXIT_BAD_INPUT, EXIT_OK
from captum_reflected.cli.photo_files import result_names
from captum_reflected.cli.targets import find_classes
from captum_reflected.errors import UsageError
from captum_reflected.models import LoadedModel
from captum_reflected.models.fitting import PhotoFitter
from captum_reflected.models.pictures import UNREADABLE, read_picture
from captum_reflected.models.weights import reason
from captum_reflected.visualization.overlay import Box, check_style

# Errors that concern a single file. Other errors of the disk would also occur for the next file.
_SINGLE_FILE_ERRORS = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR}
_REPLACED = " (replaced)"


@dataclass(frozen=True)
class _Job:
    """A readable photo, the name of its results, the model's input, and where that lies in it."""

    path: Path
    name: str
    photo: Image.Image
    image: Tensor
    box: Box


def run_command(arguments: argparse.Namespace) -> int:
    """Explains the photos, prints what the model sees in them, and writes the results."""
    try:
        check_style(arguments.alpha, arguments.cmap)
    except ValueError as error:
        raise UsageError(str(error)) from None
    methods = arguments.method or [QUALITIES[arguments.quality]]
    options = _start_layers(methods, arguments.start_layer)
    paths = arguments.images
    loaded = load_from(arguments, resolve_device(arguments.device))
    classes = find_classes(arguments.target, loaded)
    top = min(arguments.top or 1, loaded.num_classes)
    start_layer = recommended_start_layer(loaded.model)
    if start_layer and any(find_method(method).rolls_out for method in methods) and not options:
        print(
            f"attention is rolled out from layer {start_layer} on, as in published code for such "
            "models; use --start-layer 0 to roll out all layers"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = ExplanationFiles(
        arguments.output,
        loaded,
        methods,
        [find_method(method).title for method in methods],
        alpha=arguments.alpha,
        cmap=arguments.cmap,
    )
    fitter = PhotoFitter(loaded.transform, loaded.mean, loaded.std, arguments.fit)
    started = time.perf_counter()
    done = 0
    maps_per_image = (top if classes is None else len(classes)) * len(methods)
    with tqdm(
        total=len(paths) * maps_per_image, desc="explaining", unit="map", disable=None
    ) as bar:
        for jobs in _batches(paths, fitter, arguments.batch_size, bar, maps_per_image):
            images = torch.stack([job.image for job in jobs])
            logits, explained, maps = _explain_batch(
                loaded, images, classes, top, methods, options, bar
            )
            for row, job in enumerate(jobs):
                problem = _not_finite(logits[row], maps[row])
                if problem:
                    _complain(f"no map of {job.path}: {problem}")
                    continue
                result = _result(job, logits[row], explained[row], maps[row])
                try:
                    written = files.write(job.name, job.path.name, result)
                except OSError as error:
                    if error.errno not in _SINGLE_FILE_ERRORS:
                        raise
                    _complain(f"cannot write the map of {job.path}: {error}")
                    continue
                tqdm.write(_report(job, logits[row], result, written, loaded))
                done += 1
    if done:
        seconds = time.perf_counter() - started
        print(f"{done} image{'s' if done > 1 else ''} in {seconds:.1f} s, "
              f"{seconds / done:.2g} s an image")  # fmt: skip
    return EXIT_OK if done == len(paths) else EXIT_BAD_INPUT


def _complain(text: str) -> None:
    tqdm.write(f"captum-reflected: {text}", file=sys.stderr)


def _result(job: _Job, logits: Tensor, explained: Tensor, maps: Tensor) -> PhotoResult:
    probabilities = logits.double().softmax(dim=-1)
    predicted = int(probabilities.argmax())
    return PhotoResult(
        photo=np.asarray(job.photo),
        box=job.box,
        classes=explained.tolist(),
        probabilities=probabilities[explained].tolist(),
        predicted=predicted,
        predicted_probability=float(probabilities[predicted]),
        maps=maps.float().numpy(),
    )


def _report(
    job: _Job,
    logits: Tensor,
    result: PhotoResult,
    written: Sequence[tuple[Path, bool]],
    loaded: LoadedModel,
) -> str:
    """What is printed of a photo."""
    values, classes = logits.softmax(dim=-1).topk(min(5, logits.numel()))
    lines = [str(job.path)]
    for value, index in zip(values.tolist(), classes.tolist(), strict=True):
        lines.append(f"  {value:6.1%}  {loaded.class_name(index)} ({index})")
    if result.share_seen < SHARE_TO_MARK:
        lines.append(
            f"  the model sees {result.share_seen:.0%} of this photo, marked in the figure; to "
            "show it all, use --fit pad or --fit squash"
        )
    lines += [
        f"  explained: {loaded.class_name(index)} ({index}), {probability:.1%}"
        for index, probability in zip(result.classes, result.probabilities, strict=True)
    ]
    shown = len(written) if result.maps.shape[:2] == (1, 1) else 1
    lines += [f"  -> {path}{_REPLACED if old else ''}" for path, old in written[:shown]]
    rest = written[shown:]
    if rest:
        replaced = sum(old for _, old in rest)
        lines.append(
            f"     and beside it {len(rest)} files of single maps"
            + (f", {replaced} of them{_REPLACED}" if replaced else "")
        )
    return "\n".join(lines)


def _not_finite(logits: Tensor, maps: Tensor) -> str | None:
    """Why an image has no explanation; None if it has one."""
    if not bool(logits.isfinite().all()):
        return "the model's output holds NaN or infinite values"
    if not bool(maps.isfinite().all()):
        return "the map holds NaN or infinite values"
    return None


def _start_layers(methods: Sequence[str], start_layer: int | None) -> dict[str, int]:
    """The option of methods that roll out attention, if the user set it."""
    if start_layer is None:
        return {}
    if not any(find_method(method).rolls_out for method in methods):
        names = ", ".join(name for name, method in METHODS.items() if method.rolls_out)
        raise UsageError(
            f"method {', '.join(map(repr, methods))} takes no start layer; wanted: one of {names}"
        )
    return {"start_layer": start_layer}


def _batches(
    paths: Sequence[Path], fitter: PhotoFitter, size: int, bar: tqdm[None], maps_per_image: int
) -> Iterator[list[_Job]]:
    """The readable photos, at most ``size`` at a time, which have inputs of one shape."""
    jobs: list[_Job] = []
    for path, name in zip(paths, result_names(paths), strict=True):
        try:
            photo = read_picture(path)
        except UNREADABLE as error:
            _complain(f"cannot read {path}: {error}")
            bar.update(maps_per_image)
            continue
        try:
            fitted = fitter(photo)
        except ValueError as error:
            _complain(f"cannot fit {path}: {error}")
            bar.update(maps_per_image)
            continue
        job = _Job(path, name, photo, fitted.image, Box(*fitted.box))
        # Some preprocessing keeps the size of a photo.
        if len(jobs) == size or (jobs and jobs[0].image.shape != job.image.shape):
            yield jobs
            jobs = []
        jobs.append(job)
    if jobs:
        yield jobs


def _logits(loaded: LoadedModel, images: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            logits: Tensor = loaded.model(images)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(
            f"model {loaded.name!r} fails on images of shape {tuple(images.shape[1:])}, which its "
            f"preprocessing makes: {reason(error)}"
        ) from error
    return logits


def _explain_batch(
    loaded: LoadedModel,
    images: Tensor,
    classes: Sequence[int] | None,
    top: int,
    methods: Sequence[str],
    options: dict[str, int],
    bar: tqdm[None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), explained classes (B, T) and maps (B, T, M, H, W), all on the CPU.

    A map is NaN where the logits are not finite.
    """
    images = images.to(next(loaded.model.parameters()).device)
    logits = _logits(loaded, images)
    explained = (
        logits.topk(top, dim=-1).indices
        if classes is None
        else torch.tensor(classes, device=logits.device).expand(len(images), -1)
    )
    shape = (len(images), explained.shape[1], len(methods), *images.shape[-2:])
    maps = torch.full(shape, torch.nan)
    usable = logits.isfinite().all(dim=-1)
    for place in range(explained.shape[1]):
        for column, name in enumerate(methods):
            method = find_method(name)
            if bool(usable.any()):
                try:
                    found = method.explain(
                        loaded.model,
                        images[usable],
                        explained[usable, place],
                        **(options if method.rolls_out else {}),
                    )
                except ValueError as error:  # the model or an option does not fit the method
                    raise UsageError(str(error)) from error
                maps[usable.cpu(), place, column] = found.detach().cpu().to(maps.dtype)
            bar.update(len(images))
    return logits.cpu(), explained.cpu(), maps
