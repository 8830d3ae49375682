"""The end of an error about an unknown name: the known names that look like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

_CLOSE = 0.7


def did_you_mean(name: str, known: Iterable[str], meaning: Mapping[str, str] | None = None) -> str:
    """``"; did you mean A or B?"`` with the closest names; empty if none is close.

    Args:
        name: what was given.
        known: the names that it is compared with.
        meaning: what is said in the place of a name, if not the name itself.
    """
    # Names differ in case alone more often than in anything else.
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=_CLOSE)
    found = [by_lower[one] for one in close]
    meant = dict.fromkeys(found if meaning is None else (meaning.get(one, one) for one in found))
    return f"; did you mean {' or '.join(meant)}?" if meant else ""
