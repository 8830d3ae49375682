"""The end of an error about an unknown name: the known names that look like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CLOSE = 0.7


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean A or B?"`` with the closest names; empty if none is close."""
    # Names differ in case alone more often than in anything else.
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=_CLOSE)
    return f"; did you mean {' or '.join(by_lower[one] for one in close)}?" if close else ""
