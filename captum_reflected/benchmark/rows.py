"""The rows of a benchmark on disk: append-only, one file a process, one JSON text a line.

A row is durable once :meth:`RowFile.append` returns. A process that is killed while it writes
leaves a torn last line at most, which is no JSON and is passed over; its image is evaluated
again. Nothing that was written is ever changed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from captum_reflected.attr.methods import method_key
from captum_reflected.errors import BenchmarkError
from captum_reflected.metrics.registry import find_metric

VERSION = 1
ROW_FILES = "rows-*.jsonl"

# Seconds; a killed process's readers of images notice within five that it is gone.
LOCK_TIMEOUT = 10.0

_ROUNDING = 1e-3

Figures: TypeAlias = "Mapping[str, float | npt.NDArray[np.float32]]"


@dataclass(frozen=True)
class Row:
    """One image.

    Attributes:
        index: its place in the data set.
        file: its name there.
        error: why there is nothing at all, or None.
        label: the class it is of, if known.
        prediction: the class that the model sees.
        probability: of the class that is explained.
        figures: key of the method to metric to value, and to curve (S + 1,) under ``NAME_curve``.
        method_errors: method to why it has no figures.
        content: digest of the picture that the row was computed from.
        stamp: size and times of its file then, and of its mask's; None where it came from no file.
        mask: digest of the file of its mask; None where it had none.
        skipped: whether it was left out on purpose, since the model does not predict its label.
    """

    index: int
    file: str
    error: str | None = None
    label: int | None = None
    prediction: int | None = None
    probability: float | None = None
    figures: Mapping[str, Figures] = field(default_factory=dict)
    method_errors: Mapping[str, str] = field(default_factory=dict)
    content: str | None = None
    stamp: list[int] | None = None
    mask: str | None = None
    skipped: bool = False


@dataclass(frozen=True)
class Rows:
    """All that the row files of a folder hold.

    Attributes:
        by_index: the row of each image that has one.
        headers: what each process said of itself when it started.
        torn: how many lines could not be read, as a killed writer leaves them.
    """

    by_index: dict[int, Row]
    headers: list[dict[str, Any]]
    torn: int


def read_rows(folder: Path, *, figures: bool = True) -> Rows:
    """Reads a folder, also while it is still being written.

    Where an image occurs more than once, the last row counts, and one with results before
    one that failed.

    Args:
        folder: of a benchmark.
        figures: whether the methods' figures are kept, which are most of a row.

    Raises:
        BenchmarkError: a file is of another version.
        OSError: a file cannot be read.
    """
    rows: dict[int, Row] = {}
    headers = []
    torn = 0
    for entry in read_entries(folder):
        if entry is not None and entry["kind"] == "header":
            headers.append({k: v for k, v in entry.items() if k not in ("kind", "version")})
            continue
        row = None if entry is None else _read_row(entry, figures)
        if row is None:
            torn += 1
        elif row.error is None or row.index not in rows or rows[row.index].error is not None:
            rows[row.index] = row
    return Rows(rows, headers, torn)


def read_entries(folder: Path) -> Iterator[dict[str, Any] | None]:
    """The row files line by line.

    Args:
        folder: of a benchmark.

    Yields:
        dict or None: a header (``kind`` is ``"header"``), a row (``"row"``, with a whole
        number as ``index``), or None for a line that is neither: what a killed process was
        about to write.

    Raises:
        BenchmarkError: a file is of another version.
        OSError: a file cannot be read.
    """
    for path in sorted(folder.glob(ROW_FILES)):
        with path.open("rb") as file:
            for line in file:
                if not line.strip():
                    continue
                entry = _parse(line)
                if entry is not None and entry["kind"] == "header":
                    check_version(path, entry)
                yield entry


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # what is not UTF-8 is a ValueError, too
        return None
    if not isinstance(entry, dict):
        return None
    index = entry.get("index")
    is_row = entry.get("kind") == "row" and type(index) is int and index >= 0
    return entry if is_row or entry.get("kind") == "header" else None


def check_version(path: Path, content: dict[str, Any]) -> None:
    """Raises BenchmarkError if a file is of another version than this package writes."""
    if content.get("version") != VERSION:
        raise BenchmarkError(
            f"{path} is of version {content.get('version')!r}; wanted: version {VERSION}"
        )


def _read_row(entry: Mapping[str, Any], with_figures: bool) -> Row | None:
    """The row, or None where it is not one."""
    index, methods, error = entry["index"], entry.get("methods"), entry.get("error")
    file = str(entry.get("file", f"image {index}"))
    if error is not None:
        return Row(index, file, str(error))
    if not isinstance(methods, dict):
        return None
    figures, errors = {}, {}
    for method, values in methods.items() if with_figures else ():
        found = _read_figures(values)
        key = method_key(method)
        if isinstance(found, str):
            errors[key] = found
        else:
            figures[key] = found
    names = ("label", "prediction", "probability", "content", "stamp", "mask")
    return Row(
        index,
        file,
        figures=figures,
        method_errors=errors,
        skipped=entry.get("skipped") is True,
        **{name: entry.get(name) for name in names},
    )


def _read_figures(values: Any) -> Figures | str:
    """The figures of a method, or why it has none."""
    if not isinstance(values, dict):
        return f"its scores are {values!r}; wanted: values by metric"
    if "error" in values:
        return str(values["error"])
    figures: dict[str, float | npt.NDArray[np.float32]] = {}
    for name, value in values.items():
        if value is None:  # a metric that is not defined for this image
            continue
        is_share = find_metric(name).percent
        if name.endswith("_curve"):
            if not isinstance(value, list) or len(value) < 2 or not all(map(_is_share, value)):
                name = name.removesuffix("_curve")
                return f"the curve of {name} is no list of numbers from 0 to 1"
            figures[name] = np.array(value, dtype=np.float32)
        elif _is_share(value) if is_share else _is_finite(value):
            figures[name] = float(value)
        else:
            wanted = "a number from 0 to 1" if is_share else "a finite number"
            return f"{name} is {value!r}; wanted: {wanted}"
    return figures


def _is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that floating point can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_share(value: Any) -> TypeGuard[float]:
    """Whether it is from 0 to 1, but for rounding."""
    return _is_finite(value) and -_ROUNDING <= value <= 1 + _ROUNDING


class RowFile:
    """One process's file, held so that no other process writes to it.

    Args:
        folder: of the benchmark.
        rank: number of the process.
        header: what the process says of itself, written before its first row.

    Raises:
        BenchmarkError: another process holds the file.
        OSError: it cannot be opened.
    """

    def __init__(self, folder: Path, rank: int, header: dict[str, Any]) -> None:
        self._header: dict[str, Any] | None = {"kind": "header", "version": VERSION, **header}
        self._path = folder / _name(rank)
        self._lock = _lock(self._path)
        try:
            self._file = self._path.open("ab+", buffering=0)
        except BaseException:
            self._lock.release()
            raise

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes rows; when it returns they survive the end of the process and of the machine.

        Raises:
            BenchmarkError: they could not be written; those before them are kept.
        """
        entries = [{"kind": "row", **row} for row in rows]
        if self._header is not None:
            entries.insert(0, self._header)
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        if self._is_torn():
            text = "\n" + text
        left = memoryview(text.encode("ascii"))
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BenchmarkError(
                f"cannot write {self._path}: {error.strerror}; the rows before this one are kept: "
                "run the same command again to resume"
            ) from error
        self._header = None

    def _is_torn(self) -> bool:
        """Whether the file ends within a line: a process was killed, or a write failed."""
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()


class RowCounter:
    """How many rows the files of a folder hold, each byte read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._rows = 0

    def count(self) -> int:
        """Rows written until now by all processes, those of one image more than once too."""
        for path in self._folder.glob(ROW_FILES):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            end = text.rfind(b"\n") + 1
            self._read[path] = self._read.get(path, 0) + end
            self._rows += text[:end].count(b'{"kind": "row"')
        return self._rows


def assert_idle(folder: Path, *, own: int) -> None:
    """Raises BenchmarkError if a process of an earlier start is still writing to the folder.

    Args:
        folder: of the benchmark.
        own: the files of so many ranks belong to processes of this start.
    """
    for path in sorted(folder.glob(ROW_FILES)):
        if path.name >= _name(own):
            _lock(path).release()


def are_others_writing(folder: Path, rank: int) -> bool:
    """Whether a process of another rank holds its file."""
    for path in folder.glob(ROW_FILES):
        if path.name != _name(rank):
            try:
                _lock(path, timeout=0).release()
            except BenchmarkError:
                return True
    return False


def _name(rank: int) -> str:
    return f"rows-{rank:05d}.jsonl"


def _lock(path: Path, timeout: float | None = None) -> FileLock:
    """Holds a row file; the system lets go of it when the process ends, however it ends."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=LOCK_TIMEOUT if timeout is None else timeout)
    except Timeout:
        raise BenchmarkError(
            f"{path} is being written by another process; wanted: one run at a time in a folder"
        ) from None
    return lock
