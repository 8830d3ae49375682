"""Writes files as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is complete and on the disk when this returns.

    It is written under a short name in the same folder and moved into place, so that a full
    disk or a kill leaves the file that was there before, if any. Devices and pipes are
    written to as they are.

    Args:
        path: the file; a link is followed.
        content: all of it.

    Raises:
        OSError: it cannot be written; the error names ``path``, and nothing is left of it.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        place = Path(os.path.realpath(path))
        beside = place.parent / f".{secrets.token_hex(8)}.part"
        try:
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(place)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
