"""Finds the photos that the user named, and gives each a name for its results."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from captum_reflected.errors import UsageError


def find_photos(texts: Sequence[str]) -> list[Path]:
    """The files that the arguments name, each once.

    Args:
        texts: files; folders, of which every image directly inside is taken; or patterns with
            ``*``, ``?`` or ``**`` that the shell has left as they are.

    Raises:
        UsageError: a folder holds no image, a pattern fits no file, or no file exists.
    """
    found: list[Path] = []
    for text in texts:
        if not text.strip():  # as of a variable of the shell that is not set
            raise UsageError(f"image is {text!r}; wanted: a file, a folder or a pattern")
        path = Path(text)
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if _is_image(file)]
            if not inside:
                raise UsageError(f"folder {path} holds no image; wanted: images directly inside")
            found += inside
        elif glob.has_magic(text) and not path.exists():
            fitting = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
            if not fitting:
                raise UsageError(f"no file fits the pattern {text}; wanted: at least one image")
            found += [file for file in fitting if file.is_file()]
        else:
            found.append(path)
    if not any(path.exists() for path in found):
        raise UsageError(f"cannot read {found[0]}: there is no such file")
    by_place: dict[Path, Path] = {}
    for path in found:
        by_place.setdefault(_place(path), path)
    return list(by_place.values())


def _place(path: Path) -> Path:
    """Where a file lies, by its own name, without links and ``..`` before it."""
    return Path(os.path.realpath(path.parent)) / path.name


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    from PIL import Image  # not needed for help

    # Links that lead nowhere are kept, since photos that cannot be read are named.
    is_file = path.is_file() or (path.is_symlink() and not path.exists())
    return not hidden and path.suffix.lower() in Image.registered_extensions() and is_file


def result_names(paths: Sequence[Path]) -> list[str]:
    """A name for the results of each photo: its own, with its folder where that is needed.

    Some file systems ignore case, so names differ in more than that.
    """
    # Names with ".." in them would be those of hidden files.
    absolute = [_place(path) if ".." in path.parts else path.absolute() for path in paths]
    # photo.png and photo.jpg of one folder.
    beside = _repeated([str(path.with_suffix("")) for path in absolute])
    stems = [
        f"{path.stem}-{path.suffix.lstrip('.')}"
        if str(path.with_suffix("")).casefold() in beside
        else path.stem
        for path in absolute
    ]
    # The stem; where that is repeated, with its folder; with the folder's folder; ...
    names = list(stems)
    for depth in range(1, max((len(path.parts) for path in absolute), default=0)):
        repeated = _repeated(names)
        for place, path in enumerate(absolute):
            if names[place].casefold() in repeated:
                folders = [part.strip("/\\:") for part in path.parts[-1 - depth : -1]]
                names[place] = "_".join(filter(None, [*folders, stems[place]]))
    taken: set[str] = set()
    for place, name in enumerate(names):
        count = 1
        while names[place].casefold() in taken:
            count += 1
            names[place] = f"{name}-{count}"
        taken.add(names[place].casefold())
    return names


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name, count in Counter(map(str.casefold, names)).items() if count > 1}
