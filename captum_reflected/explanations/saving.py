"""Writes a result to a file, in the format that the file's name states."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

from matplotlib.figure import Figure

from captum_reflected._writing import write_whole
from captum_reflected.visualization.notebook_figure import figure_bytes

Formats: TypeAlias = Mapping[str, Callable[[], bytes]]

SHOWN = 16
"""Images that a notebook shows, which keeps pictures in its file."""


def save_as(path: str | Path, formats: Formats) -> None:
    """Writes a file, which is replaced as a whole if it exists.

    Args:
        path: the file.
        formats: by the end of a file's name, such as ``".png"``, a function that returns the
            content.

    Raises:
        ValueError: the file name ends otherwise.
        OSError: the file cannot be written.
    """
    path = Path(path)
    make = formats.get(path.suffix.lower())
    if make is None:
        *others, last = formats
        raise ValueError(
            f"path is {path}; wanted: a file name that ends in {', '.join(others)} or {last}"
        )
    write_whole(path, make())


def figure_formats(draw: Callable[[], Figure]) -> Formats:
    """The formats of a figure, which is drawn when one of them is made."""
    kinds = {".png": "png", ".jpg": "jpeg", ".pdf": "pdf", ".svg": "svg"}
    return {
        ending: partial(lambda kind: figure_bytes(draw(), kind), kind)
        for ending, kind in kinds.items()
    }


def figure_html(figure: Figure, text: str) -> str:
    """An HTML image of a figure; ``text`` describes it and is already escaped."""
    data = base64.b64encode(figure_bytes(figure, "jpeg")).decode()
    return f'<img style="max-width: 100%" alt="{text}" src="data:image/jpeg;base64,{data}">'


def note_html(shown: int, count: int, others: str) -> str:
    """What an HTML image leaves out; nothing if it shows all."""
    if shown == count:
        return ""
    return f"<p>The first {shown} of {count} images; <code>{others}</code> has all of them.</p>"
