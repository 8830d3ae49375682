"""Texts for figures, pages and terminals."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text on one line that every file and terminal takes, what it cannot show escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
