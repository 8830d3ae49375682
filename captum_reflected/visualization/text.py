"""Texts for figures, pages and terminals."""

from __future__ import annotations

import re
import warnings

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

# Where a line may be broken, the best places first: after spaces, after no-break spaces, after
# punctuation, after any character.
_BREAKS = (r"(?<= )(?! )", r"(?<=\u00a0)(?!\u00a0)", r"(?<=[-_/:;,.=])", r"(?<=.)(?=.)")
# Text in a figure can be a little wider than its outlines, as it is adjusted to the pixels.
_ROOM = 0.95
_POINTS_PER_INCH = 72
_LINE_HEIGHT = 1.3


def printable(text: str) -> str:
    """A text on one line that every file and terminal takes, what it cannot show escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def wrapped(text: str, inches: float, font_size: float) -> str:
    """Breaks the lines of a text for a figure so that none is wider than this.

    Characters that cannot be shown are escaped, as in :func:`printable`.

    Args:
        text: one line or more. A no-break space is only broken at if there is no other way, as
            are words.
        inches: the width; a single character may be wider.
        font_size: in points, of matplotlib's current font.
    """
    widths = _Widths(font_size)
    shown = ("\u00a0".join(map(printable, line.split("\u00a0"))) for line in text.split("\n"))
    return "\n".join(part for line in shown for part in _broken(line, _ROOM * inches, widths))


def lines_height(text: str, font_size: float) -> float:
    """The height of a text with these lines in a figure, in inches; 0 if it is empty."""
    lines = text.count("\n") + 1 if text else 0
    return lines * font_size * _LINE_HEIGHT / _POINTS_PER_INCH


class _Widths(dict[str, float]):
    """Characters to their widths in inches, each measured once."""

    def __init__(self, font_size: float) -> None:
        super().__init__()
        self._font = FontProperties(size=font_size)

    def __missing__(self, character: str) -> float:
        with warnings.catch_warnings():  # of characters that the font lacks; drawing warns of them
            warnings.simplefilter("ignore")
            points, _, _ = text_to_path.get_text_width_height_descent(
                character, self._font, ismath=False
            )
        self[character] = float(points) / _POINTS_PER_INCH
        return self[character]

    def of(self, text: str) -> float:
        """The width of a line without the spaces at its end."""
        return sum(map(self.__getitem__, text.rstrip()))


def _broken(line: str, room: float, widths: _Widths, level: int = 0) -> list[str]:
    if level == len(_BREAKS) or widths.of(line) <= room:
        return [line]
    lines: list[str] = []
    for piece in re.split(_BREAKS[level], line):
        if lines and widths.of(lines[-1] + piece) <= room:
            lines[-1] += piece
        else:
            lines.append(piece)
    return [part for one in lines for part in _broken(one.rstrip(), room, widths, level + 1)]
