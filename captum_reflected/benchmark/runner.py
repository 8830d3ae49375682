"""Evaluates the images of a run that have no row yet, and writes their rows."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captum
import timm
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from captum_reflected.benchmark.data import (
    ImageSet,
    assert_same_picture,
    assert_same_pictures,
    choose,
    spread,
)
from captum_reflected.benchmark.evaluation import Evaluator, Sample
from captum_reflected.benchmark.masks import MaskGeometry
from captum_reflected.benchmark.rows import (
    Row,
    RowCounter,
    RowFile,
    are_others_writing,
    assert_idle,
    read_rows,
)
from captum_reflected.benchmark.settings import (
    PATIENCE,
    Processes,
    Settings,
    begin_or_continue,
)
from captum_reflected.errors import BenchmarkError
from captum_reflected.models import LoadedModel

# Seconds between two looks at what other processes have written.
_POLL = 0.5


@dataclass(frozen=True)
class Progress:
    """How a run ended.

    Attributes:
        finished: images with a row, of earlier starts too.
        evaluated: images that had no row when the first process began, for all processes.
        failed: images whose row is an error, of earlier starts too.
        skipped: images that the model gets wrong and that were left out, of earlier starts too.
        seconds: that this start took, once models were loaded.
    """

    finished: int
    evaluated: int
    failed: int
    skipped: int
    seconds: float


class _Blocks(Dataset[list[Sample]]):
    """Blocks of images that go through the model together, always the same ones."""

    def __init__(
        self,
        model: LoadedModel,
        images: ImageSet,
        align_mask: MaskGeometry | None,
        blocks: Sequence[Sequence[int]],
    ) -> None:
        self._transform, self._images, self._blocks = model.transform, images, blocks
        self._align_mask = align_mask

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, place: int) -> list[Sample]:
        return [self._read(index) for index in self._blocks[place]]

    def _read(self, index: int) -> Sample:
        try:
            # Before it is read: a picture that is replaced meanwhile is found out later.
            stamp = None if self._images.stamp is None else self._images.stamp(index)
            picture, label, content = self._images.read(index)
            mask = mask_content = None
            if self._images.read_mask is not None and self._align_mask is not None:
                whole, mask_content = self._images.read_mask(index)
                mask = self._align_mask(whole, picture.size)
            return Sample(
                index,
                self._transform(picture),
                label,
                content=content,
                stamp=stamp,
                mask=mask,
                mask_content=mask_content,
            )
        except BenchmarkError as error:  # its message is the whole error
            return Sample(index, error=str(error))
        except Exception as error:  # decoders raise errors of many kinds
            return Sample(index, error=f"{type(error).__name__}: {error}")


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
            model, masks cannot be aligned with its images, or rows cannot be written; those that
            were are kept.
        OSError: the folder cannot be made.
    """
    align_mask = None if images.read_mask is None else MaskGeometry(model)
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
    evaluate = Evaluator(model, images, settings, folder)
    loader = DataLoader(
        _Blocks(
            model,
            images,
            align_mask,
            [block for block in share if not done.keys() >= set(block)],
        ),
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
                    assert_same_picture(images, before, sample.content, sample.mask_content, folder)
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
        skipped=sum(row.skipped for row in finished.values()),
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
