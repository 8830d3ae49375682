"""The end of an error about an unknown name: the known names that look like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

_CLOSE = 0.7


def did_you_mean(name: str, known: Iterable[str] | Mapping[str, str]) -> str:
    """``"; did you mean A or B?"`` with the closest names; empty if none is close.

    Args:
        name: what was given.
        known: the names; of a mapping, the keys are compared and their values are shown.
    """
    shown = known if isinstance(known, Mapping) else {one: one for one in known}
    # Names differ in case alone more often than in anything else.
    by_lower = {one.lower(): meant for one, meant in shown.items()}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=_CLOSE)
    meant = dict.fromkeys(by_lower[one] for one in close)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""
