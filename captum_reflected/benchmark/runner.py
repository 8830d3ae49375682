"""Evaluates the images of a run that have no row yet, and writes their rows."""

from __future__ import annotations

import io
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captum
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import find_method
from captum_reflected.benchmark.data import (
    ImageSet,
    assert_same_picture,
    assert_same_pictures,
    choose,
    masks_of,
    spread,
)
from captum_reflected.benchmark.rows import (
    Row,
    RowCounter,
    RowFile,
    are_others_writing,
    assert_idle,
    read_rows,
)
from captum_reflected.benchmark.settings import (
    AUTOCAST_DTYPES,
    PATIENCE,
    Processes,
    Settings,
    begin_or_continue,
)
from captum_reflected.errors import BenchmarkError, UnsupportedModelError
from captum_reflected.masking.precision import Autocast
from captum_reflected.metrics.registry import score_maps
from captum_reflected.models import LoadedModel

GALLERY = "gallery"

# Seconds between two looks at what other processes have written.
_POLL = 0.5

# Figures are rounded: what lies beyond is rounding of the hardware's own.
_DECIMALS = 6


@dataclass(frozen=True)
class Progress:
    """How a run ended.

    Attributes:
        finished: images with a row, of earlier starts too.
        evaluated: images that had no row when the first process began, for all processes.
        failed: images whose row is an error, of earlier starts too.
        seconds: that this start took, once models were loaded.
    """

    finished: int
    evaluated: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class _Sample:
    """One image as read: a tensor, or why there is none."""

    index: int
    image: Tensor | None = None
    label: int | None = None
    error: str | None = None
    content: str | None = None
    stamp: list[int] | None = None


class _Blocks(Dataset[list[_Sample]]):
    """Blocks of images that go through the model together, always the same ones."""

    def __init__(
        self, model: LoadedModel, images: ImageSet, blocks: Sequence[Sequence[int]]
    ) -> None:
        self._transform, self._images, self._blocks = model.transform, images, blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, place: int) -> list[_Sample]:
        return [self._read(index) for index in self._blocks[place]]

    def _read(self, index: int) -> _Sample:
        try:
            # Before it is read: a picture that is replaced meanwhile is found out later.
            stamp = None if self._images.stamp is None else self._images.stamp(index)
            picture, label, content = self._images.read(index)
            return _Sample(index, self._transform(picture), label, content=content, stamp=stamp)
        except Exception as error:  # decoders raise errors of many kinds
            return _Sample(index, error=f"{type(error).__name__}: {error}")


def run(
    model: LoadedModel,
    images: ImageSet,
    settings: Settings,
    folder: Path,
    processes: Processes,
    *,
    workers: int = 0,
    retry_failed: bool = False,
) -> Progress | None:
    """Evaluates what is left of this process's share of a run.

    Blocks of ``settings.batch_size`` images go through the model together. They are cut from
    all images of the run, not from those that are left, and an image's block is computed as a
    whole, so that its figures do not depend on how often the run was taken up again or on how
    many processes share it. Each process takes every ``processes.count``-th block, so that
    processes need not speak to each other; the first one waits until all have ended.

    Args:
        model: on its device.
        images: the whole set.
        settings: of the run.
        folder: of the run, new or with rows of the same settings.
        processes: that share it; they see the same folder.
        workers: processes that read images for each of them; 0 reads in the process itself.
        retry_failed: whether images whose row is an error are tried again.

    Returns:
        Progress: of all processes, in the first one; None in the others.

    Raises:
        BenchmarkError: the folder holds another run or is in use, a method does not suit the
            model, or rows cannot be written; those that were are kept.
        OSError: the folder cannot be made.
    """
    is_new = begin_or_continue(folder, settings, processes)
    assert_idle(folder, own=processes.count)
    blocks = _cut(images, settings)
    done = {} if is_new else read_rows(folder, figures=False).by_index
    if done and max(done) >= len(images.files):
        raise BenchmarkError(
            f"{folder} holds a row of image {max(done)}, and {images.name} has images 0 to "
            f"{len(images.files) - 1}; wanted: rows of these images"
        )
    share = blocks[processes.rank :: processes.count]
    assert_same_pictures(
        images, {i: done[i] for block in share for i in block if i in done}, folder
    )
    if retry_failed:
        done = {index: row for index, row in done.items() if row.error is None}
    began = time.monotonic()
    evaluate = _Evaluator(model, images, settings, folder)
    loader = DataLoader(
        _Blocks(model, images, [block for block in share if not done.keys() >= set(block)]),
        batch_size=None,
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
    with (
        RowFile(folder, processes.rank, _environment(model, processes)) as file,
        _progress_bar(settings, folder, processes) as show_progress,
    ):
        for block in loader:
            for sample in block:
                before = done.get(sample.index)
                if before is not None and before.error is None:
                    assert_same_picture(
                        images, sample.index, sample.content, before.content, folder
                    )
            rows = [row for row in evaluate(block) if row["index"] not in done]
            file.append(rows)
            for row in rows:
                if "error" in row:
                    tqdm.write(f"failed: {row['file']}: {row['error']}", file=sys.stderr)
            show_progress()
        if not processes.is_first:
            return None
        finished = _await_others(folder, settings, processes, show_progress)
    return Progress(
        finished=len(finished),
        evaluated=sum(index not in done for block in blocks for index in block),
        failed=sum(row.error is not None for row in finished.values()),
        seconds=time.monotonic() - began,
    )


def _cut(images: ImageSet, settings: Settings) -> list[list[int]]:
    """The images that go through the model together, in the order in which they are taken."""
    chosen = choose(len(images.files), settings.images, settings.half)
    size = settings.batch_size
    blocks = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [blocks[place] for place in spread(len(blocks))]


def _await_others(
    folder: Path, settings: Settings, processes: Processes, show_progress: Callable[[], None]
) -> dict[int, Row]:
    """The rows of all processes, once every image has one or no process is left to write it."""
    counter = RowCounter(folder)
    seen, last_active = -1, time.monotonic()
    while True:
        is_active = processes.count > 1 and are_others_writing(folder, processes.rank)
        if is_active:
            last_active = time.monotonic()
        elif (count := counter.count()) != seen:
            seen, rows = count, read_rows(folder, figures=False).by_index
        # Processes that hold no file may have yet to start.
        waited = time.monotonic() - last_active > PATIENCE
        if not is_active and (len(rows) >= settings.images or processes.count == 1 or waited):
            return rows
        time.sleep(_POLL)
        show_progress()


def _environment(model: LoadedModel, processes: Processes) -> dict[str, Any]:
    """What a process says of itself; not part of the settings, for it only rounds otherwise."""
    device = next(model.model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {module.__name__: module.__version__ for module in (captum, timm, torch)}
    return {
        "environment": {
            **versions,
            "device": f"{device.type}: {name}",
            "threads": torch.get_num_threads(),
            "processes": processes.count,
        }
    }


@contextmanager
def _progress_bar(
    settings: Settings, folder: Path, processes: Processes
) -> Iterator[Callable[[], None]]:
    """A bar over the images of all processes, with rate and remaining time, shown by the first."""
    if not processes.is_first:
        yield lambda: None
        return
    rows = RowCounter(folder)
    with tqdm(
        total=settings.images, initial=rows.count(), desc="benchmark", unit="image", smoothing=0
    ) as bar:

        def show() -> None:
            bar.update(rows.count() - bar.n)

        yield show


class _Evaluator:
    """Turns blocks of images into rows."""

    def __init__(
        self, model: LoadedModel, images: ImageSet, settings: Settings, folder: Path
    ) -> None:
        self._model, self._images, self._settings, self._folder = model, images, settings, folder
        self._methods = {name: find_method(name) for name in settings.methods}
        self._device = next(model.model.parameters()).device
        self._forward: nn.Module = model.model
        if settings.precision != "float32":
            self._forward = Autocast(model.model, AUTOCAST_DTYPES[settings.precision]).eval()
        chosen = choose(len(images.files), settings.images, settings.half)
        self._shown = {chosen[place] for place in choose(len(chosen), settings.gallery)}
        if self._shown:
            (folder / GALLERY).mkdir(exist_ok=True)

    def __call__(self, block: Sequence[_Sample]) -> list[dict[str, Any]]:
        """One row an image."""
        rows = {
            sample.index: {"index": sample.index, "file": self._images.files[sample.index]}
            for sample in block
        }
        for sample in block:
            if sample.error is not None:
                rows[sample.index]["error"] = sample.error
        read = [(sample, sample.image) for sample in block if sample.image is not None]
        if read:
            self._evaluate(
                [sample for sample, _ in read], torch.stack([image for _, image in read]), rows
            )
        return list(rows.values())

    def _evaluate(
        self, samples: Sequence[_Sample], images: Tensor, rows: dict[int, dict[str, Any]]
    ) -> None:
        images = images.to(self._device)
        with torch.no_grad():
            probabilities = self._forward(images).softmax(dim=-1)
        # One copy to the host a block.
        values, predictions = (part.tolist() for part in probabilities.max(dim=-1))
        targets: list[int] = []
        for sample, value, prediction in zip(samples, values, predictions, strict=True):
            target = prediction if self._settings.target == "predicted" else sample.label
            problem = self._problem(value, target)
            if problem is not None:
                rows[sample.index]["error"] = problem
            targets.append(-1 if target is None or problem is not None else target)
        usable = [place for place, target in enumerate(targets) if target >= 0]
        if not usable:
            return
        chosen = torch.tensor([targets[place] for place in usable], device=self._device)
        images = images[usable]
        scores = probabilities[usable].gather(1, chosen[:, None]).squeeze(1).tolist()
        for place, score in zip(usable, scores, strict=True):
            rows[samples[place].index] |= {
                "content": samples[place].content,
                **({} if samples[place].stamp is None else {"stamp": samples[place].stamp}),
                "label": samples[place].label,
                "prediction": predictions[place],
                "target": targets[place],
                "probability": round(score, _DECIMALS),
                "methods": {},
            }
        own = [rows[samples[place].index] for place in usable]
        maps = {name: self._apply(name, images, chosen, own) for name in self._settings.methods}
        self._keep_pictures(own, images, maps)

    def _problem(self, probability: float, target: int | None) -> str | None:
        """Why an image cannot be evaluated."""
        if not math.isfinite(probability):
            return "the model's output is not finite"
        if target is None:
            return "its class is not known"
        if target >= self._model.num_classes:
            return f"its class {target} is none of the model's {self._model.num_classes}"
        return None

    def _apply(
        self, name: str, images: Tensor, target: Tensor, rows: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Runs a method, writes its metrics into the rows and returns its maps (B, H, W)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a map of zeros has its metrics, too
            try:
                maps = self._methods[name].explain(self._forward, images, target).detach().float()
            except (UnsupportedModelError, ValueError) as error:
                raise BenchmarkError(
                    f"method {name!r} does not suit model {self._model.name!r}: {error}"
                ) from error
        finite = maps.flatten(1).isfinite().all(dim=1)
        maps = torch.where(finite[:, None, None], maps, 0)
        height, width = images.shape[-2:]
        masks = masks_of(self._images, [row["index"] for row in rows], (height, width))
        results = score_maps(self._forward, images, maps, target, self._settings.metrics, masks)
        columns = {metric: values.double().cpu().tolist() for metric, values in results.items()}
        for place, (row, good) in enumerate(zip(rows, finite.tolist(), strict=True)):
            figures = {metric: _rounded(values[place]) for metric, values in columns.items()}
            if not good:
                figures = {"error": "its map holds NaN or infinite values"}
            elif not np.isfinite(np.hstack(list(figures.values()))).all():
                figures = {"error": "the model's output for parts of the image is not finite"}
            row["methods"][name] = figures
        return maps

    def _keep_pictures(
        self, rows: Sequence[dict[str, Any]], images: Tensor, maps: dict[str, Tensor]
    ) -> None:
        """Writes the images of the gallery, each with its maps, before their rows are written."""
        for place, row in enumerate(rows):
            if row["index"] not in self._shown:
                continue
            picture = self._model.to_pictures(images[place : place + 1])[0]
            masks = masks_of(self._images, [row["index"]], (images.shape[-2], images.shape[-1]))
            arrays: dict[str, Any] = {
                "picture": (picture * 255).round().byte().numpy(),
                "maps": torch.stack([heat[place] for heat in maps.values()]).cpu().numpy(),
                "methods": np.array(list(maps)),
                "titles": np.array([self._methods[name].title for name in maps]),
            }
            for name in ("prediction", "target", "label"):
                known = row[name] is not None and row[name] < self._model.num_classes
                arrays[name] = np.array(self._model.class_name(row[name]) if known else "")
            if masks is not None:
                arrays["mask"] = masks[0].numpy()
            path = self._folder / GALLERY / f"{row['index']:08d}.npz"
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            write_whole(path, buffer.getvalue())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [round(number, _DECIMALS) for number in value]
    return round(value, _DECIMALS)
