"""Figures that notebooks show, and figures as files."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

_DPI = 110
# matplotlib draws fewer pixels than this in each direction.
_MOST_PIXELS = 2**16


class NotebookFigure(Figure):
    """A figure that a notebook shows when it is the value of a cell.

    Notebooks show matplotlib's own figures only after pyplot was set up. After that, this one is
    shown once, too, as it is still a single picture.
    """

    def _repr_png_(self) -> bytes:
        return figure_bytes(self, "png")


def figure_bytes(figure: Figure, kind: str, *, dpi: int = _DPI, quality: int = 90) -> bytes:
    """A figure as a file; the same figure gives the same bytes.

    Args:
        figure: the figure.
        kind: ``"png"``, ``"pdf"``, ``"svg"`` or ``"jpeg"``.
        dpi: pixels per inch; a very long figure has fewer.
        quality: of JPEG, which takes a fifth of the space of PNG in a notebook.
    """
    content = io.BytesIO()
    dpi = min(dpi, int((_MOST_PIXELS - 1) / max(figure.get_size_inches())))
    options: dict[str, Any] = {"pil_kwargs": {"quality": quality}} if kind == "jpeg" else {}
    figure.savefig(content, format=kind, dpi=dpi, **options)
    return content.getvalue()
