"""Reads the folder that a benchmark run wrote, also while it is still being written."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from captum_reflected.benchmark.rows import SETTINGS_FILE, check_version, counts_more, read_entries
from captum_reflected.errors import BenchmarkError
from captum_reflected.report.measures import MEASURES

_CURVE = "_curve"
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Settings:
    """What was run.

    Attributes:
        methods: keys of the methods, in the order of the run.
        metrics: keys of the metrics.
        images: how many images the run has when it is finished.
        fractions: share of pixels removed or inserted at each point of a curve, if told.
        entries: all settings as they were written.
    """

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    images: int
    fractions: tuple[float, ...] | None
    entries: Mapping[str, Any]

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.entries.get("model", "a model without a name"))

    @property
    def data(self) -> str:
        """Name of the data set."""
        data = self.entries.get("data")
        name = data.get("name") if isinstance(data, dict) else data
        return str(name or "data without a name")


@dataclass(frozen=True)
class Row:
    """One image.

    Attributes:
        index: its place in the data set.
        file: its name there.
        label: the class it is of, if known.
        prediction: the class that the model sees.
        probability: of the class that is explained.
        scores: method to metric to value.
        curves: method to metric to its curve.
        method_errors: method to why it has no scores.
        error: why there is nothing at all, or None.
        content: digest of the picture, if told.
    """

    index: int
    file: str
    label: int | None
    prediction: int | None
    probability: float | None
    scores: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Mapping[str, npt.NDArray[np.float32]]]
    method_errors: Mapping[str, str]
    error: str | None
    content: str | None = None


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
            [row.scores.get(method, {}).get(metric, math.nan) for row in self.rows], dtype=float
        )

    def curves(self, method: str, metric: str) -> npt.NDArray[np.float64] | None:
        """(n, S + 1), of the n images that have one; None if no image has."""
        found = [
            row.curves[method][metric]
            for row in self.rows
            if method in row.curves and metric in row.curves[method]
        ]
        if not found:
            return None
        wanted = self.settings.fractions
        lengths = sorted({len(curve) for curve in found} | ({len(wanted)} if wanted else set()))
        if len(lengths) > 1:
            raise BenchmarkError(
                f"curves ({metric} of {method}) have {' and '.join(map(str, lengths))} points; "
                "wanted: one number of points throughout a run"
            )
        return np.stack(found).astype(float)

    def fractions(self, points: int) -> npt.NDArray[np.float64]:
        """The share of pixels removed or inserted at each point of a curve."""
        if self.settings.fractions is not None:
            return np.array(self.settings.fractions)
        return np.linspace(0, 1, points)


def read_results(folder: Path | str) -> Results:
    """Reads a benchmark's folder.

    Lines that are torn are counted and left out. Where an image occurs more than once, the
    last row counts, and one with scores before one that failed.

    Args:
        folder: where a run was, or is being, written.

    Returns:
        Results: the run so far.

    Raises:
        BenchmarkError: it is no such folder, is of another version, or has no row yet.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    rows: dict[int, Row] = {}
    headers: list[Mapping[str, Any]] = []
    torn = 0
    for entry in read_entries(folder):
        if entry is None:
            torn += 1
        elif entry["kind"] == "header":
            headers.append({k: v for k, v in entry.items() if k not in ("kind", "version")})
        elif (row := _read_row(entry, settings)) is None:
            torn += 1
        else:
            before = rows.get(row.index)
            before_failed = None if before is None else before.error is not None
            if counts_more(row.error is not None, before_failed):
                rows[row.index] = row
    if not rows:
        raise BenchmarkError(
            f"{folder} holds no evaluated image yet ({torn} unreadable lines); wanted: one or more"
        )
    gallery, unread = _read_gallery(folder / "gallery")
    return Results(
        settings=settings,
        rows=tuple(rows[index] for index in sorted(rows)),
        torn=torn,
        headers=tuple(headers),
        gallery=tuple(gallery),
        unread_examples=tuple(unread),
    )


def _read_settings(folder: Path) -> Settings:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise BenchmarkError(f"{folder} has no {SETTINGS_FILE}; wanted: a benchmark's folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from None
    entries = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise BenchmarkError(f'{path} holds no "settings"; wanted: what a benchmark wrote')
    check_version(path, content)
    images = entries.get("images")
    if not _is_whole(images):
        raise BenchmarkError(f'"images" of {path} is {images!r}; wanted: a whole number')
    return Settings(
        methods=_names(path, entries, "methods"),
        metrics=_names(path, entries, "metrics"),
        images=images,
        fractions=_fractions(path, entries.get("fractions")),
        entries=entries,
    )


def _names(path: Path, entries: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = entries.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise BenchmarkError(f'"{key}" of {path} is {names!r}; wanted: a list of names')
    return tuple(dict.fromkeys(names))


def _fractions(path: Path, given: Any) -> tuple[float, ...] | None:
    if given is None:
        return None
    curve = _curve(given)
    if curve is None:
        raise BenchmarkError(f'"fractions" of {path} is {given!r}; wanted: a list of numbers')
    return tuple(float(value) for value in given)


def _read_row(entry: Mapping[str, Any], settings: Settings) -> Row | None:
    """The row, or None where it is not one."""
    index, methods, error = entry.get("index"), entry.get("methods"), entry.get("error")
    if not _is_whole(index) or not (isinstance(methods, dict) or error is not None):
        return None
    scores: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    errors: dict[str, str] = {}
    for method, values in (methods or {}).items() if error is None else ():
        reason = _why_not(values, settings.metrics)
        if reason is not None:
            errors[method] = reason
            continue
        scores[method] = {
            metric: float(values[metric])
            for metric in settings.metrics
            if values.get(metric) is not None
        }
        curves[method] = {
            metric: curve
            for metric in settings.metrics
            if (curve := _curve(values.get(metric + _CURVE))) is not None
        }
    probability = entry.get("probability")
    return Row(
        index=index,
        file=str(entry.get("file", f"image {index}")),
        label=_whole_or_none(entry.get("label")),
        prediction=_whole_or_none(entry.get("prediction")),
        probability=float(probability) if _is_share(probability) else None,
        scores=scores,
        curves=curves,
        method_errors=errors,
        error=None if error is None else str(error),
        content=None if entry.get("content") is None else str(entry["content"]),
    )


def _why_not(values: Any, metrics: tuple[str, ...]) -> str | None:
    if not isinstance(values, dict):
        return f"its scores are {values!r}; wanted: values by metric"
    if "error" in values:
        return str(values["error"])
    for metric in metrics:  # None is a metric that the image has no truth for
        value, curve = values.get(metric), values.get(metric + _CURVE)
        is_share = metric in MEASURES and MEASURES[metric].percent
        if value is not None and not (_is_share(value) if is_share else _is_finite(value)):
            wanted = "a number from 0 to 1" if is_share else "a finite number"
            return f"{metric} is {value!r}; wanted: {wanted}"
        if curve is not None and _curve(curve) is None:
            return f"the curve of {metric} is no list of numbers from 0 to 1"
    return None


def _curve(values: Any) -> npt.NDArray[np.float32] | None:
    """Probabilities along a curve, or the shares of pixels that they are of."""
    if not isinstance(values, list) or len(values) < 2 or not all(map(_is_share, values)):
        return None
    return np.array(values, dtype=np.float32)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _whole_or_none(value: Any) -> int | None:
    return value if _is_whole(value) else None


def _is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that floating point can hold."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def _is_share(value: Any) -> TypeGuard[float]:
    """Whether it is from 0 to 1, but for rounding."""
    return _is_finite(value) and -_ROUNDING <= value <= 1 + _ROUNDING


def _read_gallery(folder: Path) -> tuple[list[Example], list[str]]:
    examples, unread = [], []
    for path in sorted(folder.glob("*.npz")):
        try:
            examples.append(_read_example(path))
        # What numpy raises on files that are cut off, or are something else.
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            unread.append(path.name)
    return examples, unread


def _read_example(path: Path) -> Example:
    with np.load(path, allow_pickle=False) as arrays:
        picture, maps = arrays["picture"], arrays["maps"]
        methods = [str(method) for method in arrays["methods"]]
        titles = [str(title) for title in arrays["titles"]]
        mask = arrays["mask"] if "mask" in arrays.files else None
        prediction, label, target = (
            str(arrays[name]) for name in ("prediction", "label", "target")
        )
    size = picture.shape[:2]
    if picture.dtype != np.uint8 or picture.shape != (*size, 3) or 0 in size:
        raise ValueError(f"picture is {picture.dtype} {picture.shape}; wanted: uint8 (H, W, 3)")
    if maps.shape != (len(methods), *size) or len(titles) != len(methods):
        raise ValueError(f"maps has shape {maps.shape}; wanted: {(len(methods), *size)}")
    if mask is not None and mask.shape != size:
        raise ValueError(f"mask has shape {mask.shape}; wanted: {size}")
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
