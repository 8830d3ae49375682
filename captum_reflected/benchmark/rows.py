"""The rows of a benchmark on disk: append-only, one file a process, one JSON text a line.

A row is durable once :meth:`RowFile.append` returns. A process that is killed while it writes
leaves a torn last line at most, which is no JSON and is passed over; its image is evaluated
again. Nothing that was written is ever changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from captum_reflected.errors import BenchmarkError

VERSION = 1
SETTINGS_FILE = "settings.json"
ROW_FILES = "rows-*.jsonl"

# Seconds; a killed process's readers of images notice within five that it is gone.
LOCK_TIMEOUT = 10.0


def read_entries(folder: Path) -> Iterator[dict[str, Any] | None]:
    """All that the row files of a folder hold, line by line.

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
    is_row = entry.get("kind") == "row" and type(entry.get("index")) is int
    return entry if is_row or entry.get("kind") == "header" else None


def check_version(path: Path, content: dict[str, Any]) -> None:
    """Raises BenchmarkError if a file is of another version than this package writes."""
    if content.get("version") != VERSION:
        raise BenchmarkError(
            f"{path} is of version {content.get('version')!r}; wanted: version {VERSION}"
        )


def counts_more(failed: bool, before_failed: bool | None) -> bool:
    """Whether an image's row takes the place of an earlier one (None: there is none).

    The last row counts, and one with results before one that failed.
    """
    return not failed or before_failed is not False


@dataclass(frozen=True)
class Finished:
    """What an image's row says of the image itself.

    Attributes:
        failed: whether the row is an error.
        content: digest of the picture that the row was computed from.
        stamp: size and times of its file then; None where it came from no file.
    """

    failed: bool
    content: Any
    stamp: Any


def finished_images(folder: Path) -> dict[int, Finished]:
    """Every image that has a row, by index."""
    finished: dict[int, Finished] = {}
    for entry in read_entries(folder):
        if entry is not None and entry["kind"] == "row":
            index, failed = entry["index"], "error" in entry
            before = finished.get(index)
            if counts_more(failed, None if before is None else before.failed):
                finished[index] = Finished(failed, entry.get("content"), entry.get("stamp"))
    return finished


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
        self._path = folder / f"rows-{rank:05d}.jsonl"
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
                f"cannot write {self._path}: {error.strerror}; the rows before this one are kept, "
                "and the same command goes on from them"
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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


def assert_idle(folder: Path) -> None:
    """Raises BenchmarkError if a process of an earlier start is still writing to the folder."""
    for path in sorted(folder.glob(ROW_FILES)):
        _lock(path).release()


def _lock(path: Path) -> FileLock:
    """Holds a row file; the system lets go of it when the process ends, however it ends."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise BenchmarkError(
            f"{path} is being written by another process; wanted: one run at a time in a folder"
        ) from None
    return lock
