"""The results of a benchmark run, as they are read from its folder."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captum_reflected.attr.methods import method_key
from captum_reflected.benchmark.rows import Row, read_rows
from captum_reflected.benchmark.settings import GALLERY, SETTINGS_FILE, Settings, read_settings
from captum_reflected.errors import BenchmarkError
from captum_reflected.metrics.registry import METRICS, Metric, find_metric


@dataclass(frozen=True)
class Failure:
    """Why an image, or one method on it (``method`` is not None), has no scores."""

    index: int
    file: str
    method: str | None
    reason: str


@dataclass(frozen=True)
class Example:
    """One image of the gallery.

    Attributes:
        index: its place in the data set.
        picture: (H, W, 3), uint8.
        mask: (H, W), true on the object, if known.
        maps: method to (H, W); only maps of finite numbers.
        titles: method to its title.
        prediction: name of the class that the model sees.
        label: name of the class it is of, or "".
        target: name of the class that is explained.
    """

    index: int
    picture: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_] | None
    maps: Mapping[str, npt.NDArray[np.float32]]
    titles: Mapping[str, str]
    prediction: str
    label: str
    target: str


@dataclass(frozen=True)
class Results:
    """A run, finished or not.

    Attributes:
        settings: what was run.
        rows: one for each image so far, by index.
        torn: how many lines could not be read, as a killed writer leaves them.
        headers: what each process said of itself when it started.
        gallery: images to look at, by index.
        unread_examples: gallery files that could not be read.
    """

    settings: Settings
    rows: tuple[Row, ...]
    torn: int
    headers: tuple[Mapping[str, Any], ...]
    gallery: tuple[Example, ...]
    unread_examples: tuple[str, ...]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the run, the known ones first and in the order of the paper."""
        order = [*METRICS, *self.settings.metrics]
        return tuple(map(find_metric, sorted(self.settings.metrics, key=order.index)))

    @property
    def missing(self) -> int:
        """Images that the run has yet to come to."""
        return max(0, self.settings.images - len(self.rows))

    @property
    def failures(self) -> list[Failure]:
        """Every image, and every method on an image, that has no scores."""
        found = []
        for row in self.rows:
            if row.error is not None:
                found.append(Failure(row.index, row.file, None, row.error))
            found += [
                Failure(row.index, row.file, method, row.method_errors[method])
                for method in self.settings.methods
                if method in row.method_errors
            ]
        return found

    def scores(self, method: str, metric: str) -> npt.NDArray[np.float64]:
        """One value a row, NaN where there is none, so that methods can be paired."""
        return np.array(
            [row.figures.get(method, {}).get(metric, math.nan) for row in self.rows], dtype=float
        )

    def curves(self, method: str, metric: Metric) -> npt.NDArray[np.float64] | None:
        """(n, S + 1), of the n images that have a curve; None if no image has."""
        found = [
            np.asarray(row.figures[method][metric.curve_key])
            for row in self.rows
            if metric.curve_key in row.figures.get(method, {})
        ]
        lengths = sorted({len(curve) for curve in found})
        if len(lengths) > 1:
            raise BenchmarkError(
                f"curves ({metric.key} of {method}) have {' and '.join(map(str, lengths))} points; "
                "wanted: one number of points throughout a run"
            )
        return np.stack(found).astype(float) if found else None


def read_results(folder: Path | str) -> Results:
    """Reads a benchmark's folder, also while it is still being written.

    Args:
        folder: where a run was, or is being, written.

    Returns:
        Results: the run so far.

    Raises:
        BenchmarkError: it is no such folder, is of another version, or has no row yet.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if settings is None:
        raise BenchmarkError(f"{folder} has no {SETTINGS_FILE}; wanted: a benchmark's folder")
    rows = read_rows(folder)
    if not rows.by_index:
        raise BenchmarkError(
            f"{folder} holds no evaluated image yet ({rows.torn} unreadable lines); wanted: one or "
            "more"
        )
    gallery, unread = _read_gallery(folder / GALLERY)
    return Results(
        settings=settings,
        rows=tuple(rows.by_index[index] for index in sorted(rows.by_index)),
        torn=rows.torn,
        headers=tuple(rows.headers),
        gallery=tuple(gallery),
        unread_examples=tuple(unread),
    )


def _read_gallery(folder: Path) -> tuple[list[Example], list[str]]:
    examples, unread = [], []
    for path in sorted(folder.glob("*.npz")):
        try:
            examples.append(_read_example(path))
        # What numpy raises on files that are cut off.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            unread.append(path.name)
    return examples, unread


def _read_example(path: Path) -> Example:
    with np.load(path, allow_pickle=False) as arrays:
        picture, maps = arrays["picture"], arrays["maps"]
        methods = [method_key(str(method)) for method in arrays["methods"]]
        titles = [str(title) for title in arrays["titles"]]
        mask = arrays["mask"] if "mask" in arrays.files else None
        prediction, label, target = (
            str(arrays[name]) for name in ("prediction", "label", "target")
        )
    finite = {
        method: heat.astype(np.float32)
        for method, heat in zip(methods, maps, strict=True)
        if np.isfinite(heat).all()
    }
    return Example(
        index=int(path.stem),
        picture=picture,
        mask=None if mask is None else mask.astype(bool),
        maps=finite,
        titles=dict(zip(methods, titles, strict=True)),
        prediction=prediction,
        label=label,
        target=target,
    )
