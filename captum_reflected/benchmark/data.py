"""Images to evaluate on: a folder, a dataset that timm knows, the embedded scenes.

All are random access with a fixed order, so that an image keeps its index however many
processes share the work and however often it is taken up again.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import timm.data
from PIL import Image
from tqdm.auto import tqdm

from captum_reflected import demo
from captum_reflected.benchmark.masks import OBJECT, open_masks
from captum_reflected.benchmark.rows import Row
from captum_reflected.errors import BenchmarkError
from captum_reflected.models import LoadedModel
from captum_reflected.models.pictures import read_picture

SCENES = "scenes"
"""The name of the embedded scenes."""

HALVES = ("choosing", "confirming")
"""Images of even and of odd number, under the names of what they are for in a study."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
_TIMM_PREFIXES = ("torch/", "hfds/")
# How many images that are no files are looked at again when a run is taken up again.
_SAMPLE = 64
# How ImageNet's own files begin, and the folders that hold them.
_SYNSET = re.compile(r"n\d{8}(?=_|$)")


Picture: TypeAlias = tuple[Image.Image, "int | None", str]


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    Attributes:
        name: how the user called it.
        files: the name of each image, unique.
        labels: the class of each image, ``None`` where it is not known; of datasets that tell
            an image's class only together with the image, ``None`` altogether.
        read: index to (picture in RGB, class or ``None``, digest of its content); raises
            where the image cannot be read.
        stamp: index to size and times of the image's file, which tell without reading it that
            it was not replaced; None where images are no files. With the mask's, if there is one.
        read_mask: index to (mask of the object that makes the class, digest of its file), see
            :mod:`~captum_reflected.benchmark.masks`; raises where the mask cannot be used. None
            where masks are not known.
    """

    name: str
    files: tuple[str, ...]
    labels: tuple[int | None, ...] | None
    read: Callable[[int], Picture]
    stamp: Callable[[int], list[int]] | None = None
    read_mask: Callable[[int], tuple[Image.Image, str | None]] | None = None

    @property
    def fingerprint(self) -> str:
        """Says whether two sets hold the same images in the same order, by name and class."""
        digest = hashlib.sha256()
        labels: Iterable[int | None] = self.labels or [None] * len(self.files)
        for file, label in zip(self.files, labels, strict=True):
            digest.update(f"{file}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def open_images(
    name: str,
    model: LoadedModel,
    *,
    root: Path | None = None,
    split: str = "validation",
    labels: Path | None = None,
    masks: Path | None = None,
) -> ImageSet:
    """Opens a set of images for a model, whose classes its labels are put in terms of.

    Args:
        name: a folder; ``"scenes"``; or a name for ``timm.data.create_dataset`` of a dataset
            with random access, ``"torch/..."`` or ``"hfds/..."``. In a folder, images whose
            file or innermost folder begins with a WordNet id (``n01440764/x.JPEG``,
            ``n01440764_10026.JPEG``: ImageNet's layouts) have that class, if the model knows
            ImageNet; else folders named like the model's classes, or as many folders as the
            model has classes, name them. A dataset's classes are the model's of the same
            names, too, or all of them in the same order; where it tells no names, its numbers
            are taken for the model's.
        model: its classes.
        root: where a timm dataset lies.
        split: of a timm dataset.
        labels: a CSV file that names each image of a folder, with or without its suffix, and
            its class: a number, a WordNet id or a name of the model's. Further columns and
            words are left alone, so that ILSVRC's ``LOC_val_solution.csv`` is taken as it is.
        masks: a folder with a mask for each image of a folder, see
            :func:`~captum_reflected.benchmark.masks.open_masks`.

    Returns:
        ImageSet: one image or more.

    Raises:
        BenchmarkError: there is no such set, it is empty, or its labels are not usable.
    """
    folder = Path(name)
    for kind, given in (("labels", labels), ("masks", masks)):
        if given is not None and not folder.is_dir():
            raise BenchmarkError(f"{kind} {given} go with a folder of images; data is {name!r}")
    if name == SCENES:
        return _scenes()
    if folder.is_dir():
        return _folder(folder, model, labels, masks)
    if name.startswith(_TIMM_PREFIXES):
        return _timm(name, root, split, model)
    raise BenchmarkError(
        f"data {name!r} is no folder; wanted: a folder of images, {SCENES!r}, or a name of "
        f"timm.data.create_dataset that begins with {' or '.join(_TIMM_PREFIXES)} (datasets "
        "without random access cannot be taken up again where they were left)"
    )


def _scenes() -> ImageSet:
    scenes = demo.load_scenes()
    labels: list[int] = scenes.labels.tolist()

    def read(index: int) -> Picture:
        picture = Image.fromarray(scenes.images[index].permute(1, 2, 0).numpy())
        return picture, labels[index], _digest(picture.tobytes())

    def read_mask(index: int) -> tuple[Image.Image, None]:
        return Image.fromarray((scenes.masks[index].byte() * OBJECT).numpy()), None

    files = tuple(f"{index:02d} {demo.CLASS_NAMES[label]}" for index, label in enumerate(labels))
    return ImageSet(SCENES, files, tuple(labels), read, read_mask=read_mask)


def _folder(
    folder: Path, model: LoadedModel, labels_file: Path | None, masks_folder: Path | None
) -> ImageSet:
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    files = [path.relative_to(folder).as_posix() for path in paths]
    if labels_file is not None:
        files, labels = _labelled(files, labels_file, model)
    else:
        labels = _labels_of(files, model)
    if not files:
        raise BenchmarkError(
            f"data {folder} holds no images; wanted: files that end in "
            f"{', '.join(sorted(_SUFFIXES))}, in the folder or below it"
        )
    masks = None if masks_folder is None else open_masks(masks_folder, folder, files)

    def read(index: int) -> Picture:
        path = folder / files[index]
        content = _digest(path.read_bytes())
        return read_picture(path), labels[index], content

    def stamp(index: int) -> list[int]:
        found = (folder / files[index]).stat()
        own = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        return own if masks is None else own + masks.stamp(index)

    read_mask = None if masks is None else masks.read
    return ImageSet(str(folder), tuple(files), tuple(labels), read, stamp, read_mask)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _labels_of(files: Sequence[str], model: LoadedModel) -> list[int | None]:
    """The classes that the names of files and folders tell."""
    if model.synsets is not None:
        index = {synset: place for place, synset in enumerate(model.synsets)}
        names = [_SYNSET.match(part) for part in map(_innermost, files)]
        if any(names):
            return [index.get(name[0]) if name else None for name in names]
    folders = sorted({file.rpartition("/")[0] for file in files})
    classes = _classes_called([folder.rpartition("/")[2] for folder in folders], model)
    known = dict(zip(folders, classes, strict=True))
    return [known[file.rpartition("/")[0]] for file in files]


def _classes_called(names: Sequence[str], model: LoadedModel) -> list[int | None]:
    """The model's class for each class of the data: by name, or by place if all are there."""
    by_name = _classes_by_name(model) | {
        synset: place for place, synset in enumerate(model.synsets or ())
    }
    known = [by_name.get(name.lower()) for name in names]
    if any(label is not None for label in known) or len(names) == 1:
        return known
    return list(range(len(names))) if len(names) == model.num_classes else known


def _innermost(file: str) -> str:
    """The folder of an image if ImageNet named it, else its file name."""
    folder, _, name = file.rpartition("/")
    inner = folder.rpartition("/")[2]
    return inner if _SYNSET.fullmatch(inner) else name


def _classes_by_name(model: LoadedModel) -> dict[str, int]:
    """Class indices by each name that stands for one class alone, in lower case."""
    places: dict[str, set[int]] = {}
    for place, name in enumerate(model.class_names or ()):
        for part in (name, *name.split(",")):
            places.setdefault(part.strip().lower(), set()).add(place)
    return {name: found.pop() for name, found in places.items() if len(found) == 1}


def _labelled(
    files: Sequence[str], labels_file: Path, model: LoadedModel
) -> tuple[list[str], list[int | None]]:
    """Files and classes as a CSV file tells them; also files that are not there."""
    try:
        with labels_file.open(newline="", encoding="utf-8-sig") as lines:
            table = [line for line in csv.reader(lines) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchmarkError(f"cannot read the labels {labels_file}: {error}") from error
    found = {alias: file for file in files for alias in (file, file.rpartition(".")[0])}
    synsets = {synset: place for place, synset in enumerate(model.synsets or ())}
    names = _classes_by_name(model)
    labels: dict[str, int | None] = {}
    for number, line in enumerate(table, start=1):
        told = line[1].strip() if len(line) > 1 else ""
        first = told.split(" ")[0]
        label = names.get(told.lower(), synsets.get(first))
        if first.isdecimal() and int(first) < model.num_classes:
            label = int(first)
        if label is None:
            if number == 1 and line[0] not in found:
                continue  # the columns' names
            raise BenchmarkError(
                f"line {number} of the labels {labels_file} is {','.join(line)!r}; wanted: an "
                f"image and one of the {model.num_classes} classes of model {model.name!r}, by "
                "number, WordNet id or name"
            )
        file = found.get(line[0], line[0])
        if file in labels:
            raise BenchmarkError(f"the labels {labels_file} name {line[0]!r} twice")
        labels[file] = label
    ordered = sorted(labels)
    return ordered, [labels[file] for file in ordered]


def _timm(name: str, root: Path | None, split: str, model: LoadedModel) -> ImageSet:
    try:
        dataset = timm.data.create_dataset(
            name, root=None if root is None else str(root), split=split, download=False
        )
        count = len(dataset)
    except Exception as error:  # of many libraries, and of many kinds
        where = "" if root is None else f" in {root}"
        raise BenchmarkError(
            f"timm cannot open dataset {name!r}, split {split!r}{where}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if count == 0:
        raise BenchmarkError(f"dataset {name!r}, split {split!r}, is empty")

    names = _class_names(dataset)
    classes = None if names is None else _classes_called(names, model)

    def read(index: int) -> Picture:
        picture, told = dataset[index]
        label = None if told is None or int(told) < 0 else int(told)
        if classes is not None and label is not None:  # the data's own number
            label = classes[label] if label < len(classes) else None
        picture = picture.convert("RGB")
        content = _digest(f"{picture.size} {label} ".encode() + picture.tobytes())
        return picture, label, content

    return ImageSet(f"{name}:{split}", tuple(f"{index:08d}" for index in range(count)), None, read)


def _class_names(dataset: Any) -> list[str] | None:
    """What a dataset calls its classes, by the numbers that it gives them, if it tells."""
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    if names is None:
        numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
        names = numbers and sorted(numbers, key=numbers.get)
    return [str(name) for name in names] if names else None


def assert_same_pictures(images: ImageSet, rows: Mapping[int, Row], folder: Path) -> None:
    """Checks that rows were computed from the pictures and masks that are there now.

    A file whose size and times are those of its row was not replaced; any other is read. Of
    images that are no files some are read, spread evenly.

    Raises:
        BenchmarkError: one was not, and is named.
    """
    scored = {index: row for index, row in rows.items() if row.error is None}
    if images.stamp is None:
        suspects = [list(scored)[place] for place in choose(len(scored), _SAMPLE)]
    else:
        suspects = [index for index in scored if _stamp(images, index) != scored[index].stamp]
    for index in tqdm(suspects, desc="checking images", unit="image", leave=False, disable=None):
        content = mask = None
        try:
            content = images.read(index)[2]
            mask = images.read_mask and images.read_mask(index)[1]
        except Exception:  # decoders raise errors of many kinds; it was readable before
            content = None
        assert_same_picture(images, scored[index], content, mask, folder)


def assert_same_picture(
    images: ImageSet, before: Row, content: str | None, mask: str | None, folder: Path
) -> None:
    """Checks that an image and its mask have the contents of the image's row.

    Raises:
        BenchmarkError: they have not, or the image cannot be read (``content`` is None).
    """
    if content is None or (content, mask) != (before.content, before.mask):
        raise BenchmarkError(
            f"{images.files[before.index]} in {images.name}"
            f"{'' if images.read_mask is None else ', or its mask,'} is not the picture that its "
            f"row in {folder} was computed from; wanted: the picture that was there, or another "
            "--output for the new ones"
        )


def _stamp(images: ImageSet, index: int) -> list[int] | None:
    try:
        return None if images.stamp is None else images.stamp(index)
    except OSError:
        return None


def choose(count: int, limit: int | None, half: str | None = None) -> list[int]:
    """Indices of at most ``limit`` out of ``count`` images, evenly spread: all classes have some.

    Examples:
        >>> choose(10, 3)
        [0, 3, 6]
        >>> choose(10, 3, "confirming")
        [1, 3, 7]
    """
    pool = range(count) if half is None else range(HALVES.index(half), count, 2)
    if limit is None or limit >= len(pool):
        return list(pool)
    return [pool[place * len(pool) // limit] for place in range(limit)]


def spread(count: int) -> list[int]:
    """The numbers below ``count`` in an order whose every beginning is spread evenly.

    Data sets are sorted by class; what is known of a run in its first minutes should not be.

    Examples:
        >>> spread(8)
        [0, 4, 2, 6, 1, 5, 3, 7]
    """
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda place: int(f"{place:0{digits}b}"[::-1], 2))
