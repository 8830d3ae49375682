"""Finds the classes that the user named."""

from __future__ import annotations

import re

from captum_reflected._suggestions import did_you_mean
from captum_reflected.errors import UsageError
from captum_reflected.models import LoadedModel

_SHOWN = 8


def find_classes(text: str, loaded: LoadedModel) -> list[int] | None:
    """The indices of the classes that a text names; None for ``auto``.

    Args:
        text: ``auto``; or classes separated by commas, each by number, by name or by part of a
            name. A name that itself has commas, as ImageNet's, may be written as a whole. The
            number of a class means this class, even if the name of another one is that number.
        loaded: the model.

    Raises:
        UsageError: a part names no class, or more than one.
    """
    if text == "auto":
        return None
    wanted = text.strip().lower()
    whole = [index for index, name in enumerate(loaded.class_names or ()) if name.lower() == wanted]
    if len(whole) == 1 and not _is_number_of_class(wanted, loaded):
        return whole
    return list(dict.fromkeys(_find_class(part, loaded) for part in text.split(",")))


def _is_number_of_class(text: str, loaded: LoadedModel) -> bool:
    return text.isdecimal() and len(text) <= 9 and int(text) < loaded.num_classes


def _find_class(text: str, loaded: LoadedModel) -> int:
    count, wanted = loaded.num_classes, text.strip().lower()
    if not wanted:
        raise UsageError("target is blank; wanted: a class, by number or by name")
    if _is_number_of_class(wanted, loaded):
        return int(wanted)
    names = loaded.class_names or ()
    synonyms = [[part.strip().lower() for part in name.split(",")] for name in names]
    # As a whole, as whole words, as a part: the first way that names any class.
    word = re.compile(rf"\b{re.escape(wanted)}\b")
    found = [index for index, parts in enumerate(synonyms) if wanted in parts]
    if not found and wanted.removeprefix("-").isdecimal():
        raise UsageError(
            f"target {wanted} is out of range; wanted: one of the classes 0 to {count - 1} of "
            f"model {loaded.name!r}"
        )
    found = found or [index for index, name in enumerate(names) if word.search(name.lower())]
    found = found or [index for index, name in enumerate(names) if wanted in name.lower()]
    if len(found) == 1:
        return found[0]
    some = "; ".join(f"{index} {names[index]}" for index in found[:_SHOWN])
    some += f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    hint = "" if found else did_you_mean(wanted, [part for parts in synonyms for part in parts])
    raise UsageError(
        f"target {text.strip()!r} names {len(found)} of the {count} classes of model "
        f"{loaded.name!r}{': ' + some if some else ''}; wanted: one class, by number or by "
        f"name{hint}"
    )
