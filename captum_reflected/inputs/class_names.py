"""The names of a model's classes: a list, those of ImageNet, or those that the model states."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from captum_reflected._suggestions import did_you_mean

IMAGENET = (
    "imagenet-1k",
    "imagenet-12k",
    "imagenet-21k",
    "imagenet-21k-miil",
    "imagenet-22k",
    "imagenet-22k-ms",
)
"""Lists of class names that timm holds; each has another number of classes."""

# transformers' name of class 3, where the checkpoint has none.
_NO_NAME = re.compile(r"LABEL_\d+")


def find_class_names(
    forward_func: Callable[..., Any], given: Sequence[str] | None, count: int
) -> tuple[str, ...] | None:
    """The names of a model's classes, where they are known.

    Names are never inferred from the number of classes, since a model of 1000 classes need not
    be one of ImageNet.

    Args:
        forward_func: the model. If no names are given, they are its ``class_names``, as of a
            :class:`~captum_reflected.models.ZeroShotClassifier`, or those in its ``config``, as of
            a classifier of Hugging Face. A function that calls such a model states none.
        given: the names in the order of the model's classes, or one of :data:`IMAGENET`.
        count: number of classes.

    Raises:
        TypeError: ``given`` is no list of texts.
        ValueError: it has another number of names, or is the name of no list.
    """
    if given is None:
        stated = getattr(forward_func, "class_names", None)
        names = _texts(stated) or configured_names(getattr(forward_func, "config", None))
        return names if names is not None and len(names) == count else None
    found = imagenet_names(given) if isinstance(given, str) else _texts(given)
    if found is None:
        raise TypeError(
            f"class_names is {_shown(given)}; wanted: a list of texts, one for each class, in the "
            "order of the model's classes"
        )
    if len(found) != count:
        what = f"class_names is {given!r}: " if isinstance(given, str) else ""
        raise ValueError(
            f"{what}there are {len(found)} class_names, and the model has {count} classes; wanted: "
            "one name for each"
        )
    return found


def imagenet_names(name: str) -> tuple[str, ...]:
    """The names of ImageNet's classes, in the order in which models have them.

    Args:
        name: one of :data:`IMAGENET`.

    Raises:
        ValueError: it is another one.
    """
    from timm.data import ImageNetInfo  # takes long to import

    if name.lower() not in IMAGENET:
        raise ValueError(
            f"class_names is {name!r}; wanted: a list of names, such as "
            "captum_reflected.models.read_class_names(path) reads from a file, or one of "
            f"{', '.join(IMAGENET)}{did_you_mean(name, IMAGENET)}"
        )
    return tuple(ImageNetInfo(name.lower()).label_descriptions())


def configured_names(config: Any) -> tuple[str, ...] | None:
    """The names in the configuration of a classifier of transformers; None where it has none.

    Args:
        config: of the model, with ``id2label``.
    """
    by_index = getattr(config, "id2label", None)
    if not isinstance(by_index, Mapping) or set(by_index) != set(range(len(by_index))):
        return None
    names = tuple(str(by_index[index]) for index in range(len(by_index)))
    return None if all(map(_NO_NAME.fullmatch, names)) else names


def _texts(given: Any) -> tuple[str, ...] | None:
    """The texts in a list; None if it is no list of texts, or has no order."""
    if not isinstance(given, Iterable) or isinstance(given, (str, Mapping, Set)):
        return None
    names = tuple(given)
    return names if names and all(isinstance(name, str) for name in names) else None


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:56]} ..."
