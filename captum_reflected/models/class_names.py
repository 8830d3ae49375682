"""Names of a model's classes: read from files, and recognised as those of ImageNet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_reflected.errors import ModelLoadError

_WANTED = (
    "a text file with one name a line, or JSON: a list of names, or an object from each class "
    "index to its name"
)
_SHOWN = 5
_IMAGENET_SHARE = 0.75


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Reads the class names of a model from a file.

    A file that ends in ``.json``, or whose content is a JSON list or object, is read as JSON:
    either a list of names, or an object from class index to name, such as ``{"0": "cat", "1":
    "dog"}``, the form of transformers' ``id2label``. In place of a name there may be a pair of
    an identifier and a name, such as ``["n02123045", "tabby"]``. Any other file holds one name
    a line, in the model's order.

    Args:
        path: the file, in UTF-8.

    Returns:
        tuple[str, ...]: one name for each class. Two classes may share a name.

    Raises:
        ModelLoadError: the file cannot be read, or has another form.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ModelLoadError(
            f"cannot read the class names {path}: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise _wrong(path, f"is not a text in UTF-8 ({error.reason})") from error
    if not text.strip():
        raise _wrong(path, "is empty")
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        if path.suffix.lower() == ".json":
            raise _wrong(path, f"is not JSON ({error})") from error
        content = None
    except _RepeatedKeyError as error:
        raise _wrong(path, f"holds the class {error} more than once") from error
    if path.suffix.lower() == ".json" or isinstance(content, (list, dict)):
        return _names_in(path, content)
    return _names_on_lines(path, text)


def imagenet_synsets(names: Sequence[str]) -> tuple[str, ...] | None:
    """The WordNet ids of ImageNet's 1000 classes, if these are their names in ImageNet's order.

    Lists of these names differ in wording; three of four must share a synonym with timm's.

    Args:
        names: of a model's classes, in its order.
    """
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    known = imagenet.label_descriptions()
    if len(names) != len(known):
        return None
    shared = sum(
        not _synonyms(name).isdisjoint(_synonyms(other))
        for name, other in zip(names, known, strict=True)
    )
    return tuple(imagenet.label_names()) if shared >= _IMAGENET_SHARE * len(known) else None


def _synonyms(name: str) -> set[str]:
    return {part.strip().lower() for part in name.split(",")}


def _names_on_lines(path: Path, text: str) -> tuple[str, ...]:
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names:
        raise _wrong(path, f"has the blank line {names.index('') + 1}, so the class has no name")
    return tuple(names)


def _names_in(path: Path, content: Any) -> tuple[str, ...]:
    if isinstance(content, dict):
        content = _in_order(path, content)
    if not isinstance(content, list):
        raise _wrong(path, f"holds {_shown(content)}")
    if not content:
        raise _wrong(path, "holds no names")
    names = []
    for index, given in enumerate(content):
        # ImageNet's own list has pairs of synset and name.
        is_pair = isinstance(given, list) and len(given) == 2
        name = given[1] if is_pair else given
        if not isinstance(name, str) or not name.strip():
            raise _wrong(path, f"holds {_shown(given)} in place of the name of class {index}")
        names.append(name.strip())
    return tuple(names)


def _in_order(path: Path, by_index: dict[str, Any]) -> list[Any]:
    """The values of an object whose keys are class indices, in their order."""
    found: dict[int, Any] = {}
    for key, value in by_index.items():
        if not (key.isascii() and key.isdigit()):
            raise _wrong(path, f"has the key {_shown(key)}, which is no class index")
        if int(key) in found:
            raise _wrong(path, f"holds the class {int(key)} more than once")
        found[int(key)] = value
    missing = [str(index) for index in range(max(found, default=0)) if index not in found]
    if missing:
        more = ", ..." if len(missing) > _SHOWN else ""
        raise _wrong(
            path,
            f"goes up to class {max(found)} but has no name for class "
            f"{', '.join(missing[:_SHOWN])}{more}",
        )
    return [found[index] for index in sorted(found)]


class _RepeatedKeyError(ValueError):
    """A JSON object has a key twice; json.loads would keep the last value."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _wrong(path: Path, what: str) -> ModelLoadError:
    return ModelLoadError(f"class names {path}: it {what}; wanted: {_WANTED}")
