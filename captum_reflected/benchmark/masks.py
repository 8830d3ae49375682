"""Masks of the objects in photos: read from files, and resized and cropped like the photos."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode

from captum_reflected.errors import BenchmarkError
from captum_reflected.models import LoadedModel
from captum_reflected.models.pictures import UNREADABLE

OBJECT, IGNORED, BACKGROUND = 255, 128, 0
"""Values of a mask's pixels."""

_WANTED = (
    f"{OBJECT} on the object, {IGNORED} on pixels to be ignored and {BACKGROUND} on the background"
)
_VALUES_SHOWN = 6

# Names of preprocessing steps in torchvision, timm and open_clip.
_RESIZING = {"Resize", "ResizeKeepRatio"}
_CROPPING = {"CenterCrop", "CenterCropOrPad"}
_ON_COLOURS = {"MaybeConvertMode", "_convert_to_rgb", "ToTensor", "MaybeToTensor", "Normalize"}

Step: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class MaskFolder:
    """A folder with one mask for each image of another folder.

    Attributes:
        paths: the mask of each image, whether it is there or not.
    """

    paths: tuple[Path, ...]

    def read(self, index: int) -> tuple[Image.Image, str]:
        """The mask of an image, with the values of this module, and a digest of its file.

        Raises:
            BenchmarkError: it is missing or not such a mask.
        """
        path = self.paths[index]
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as file:
                mask = ImageOps.exif_transpose(file)
        except FileNotFoundError:
            raise BenchmarkError(f"its mask {path} is missing") from None
        except UNREADABLE as error:
            raise BenchmarkError(
                f"its mask {path} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if mask.mode not in ("L", "1"):
            raise BenchmarkError(
                f"its mask {path} is of mode {mask.mode}; wanted: a grey picture of 8 bits, "
                f"{_WANTED}"
            )
        mask = mask.convert("L")
        values = np.unique(np.asarray(mask)).tolist()
        if not set(values) <= {OBJECT, IGNORED, BACKGROUND}:
            shown = [str(value) for value in values[:_VALUES_SHOWN]]
            more = ", ..." if len(values) > _VALUES_SHOWN else ""
            raise BenchmarkError(
                f"its mask {path} has the values {', '.join(shown)}{more}; wanted: {_WANTED}"
            )
        return mask, hashlib.sha256(content).hexdigest()[:16]

    def stamp(self, index: int) -> list[int]:
        """Size and times of a mask's file; nothing where there is none."""
        try:
            found = self.paths[index].stat()
        except OSError:
            return []
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def open_masks(folder: Path, photos: Path, files: Sequence[str]) -> MaskFolder:
    """Opens the masks of a folder of images.

    Args:
        folder: of the masks; that of ``a/photo.jpg`` is ``a/photo.png``.
        photos: the folder of the images.
        files: the images' names in it.

    Raises:
        BenchmarkError: there is no such folder, it would be read as images, it holds no mask of
            any image, or two images would have the same mask.
    """
    if not folder.is_dir():
        raise BenchmarkError(f"masks {folder} is no folder; wanted: a folder of masks")
    if folder.resolve().is_relative_to(photos.resolve()):
        raise BenchmarkError(
            f"masks {folder} is inside the folder of the images, {photos}, so that masks would "
            "count as images; wanted: a folder outside of it"
        )
    names: dict[PurePosixPath, str] = {}
    for file in files:
        path = PurePosixPath(file)
        name = path.parent / f"{path.stem}.png"
        if name in names:
            raise BenchmarkError(
                f"{names[name]} and {file} in {photos} would both have the mask {folder / name}; "
                "wanted: images whose names differ in more than their suffix"
            )
        names[name] = file
    paths = tuple(folder / name for name in names)
    if not any(path.is_file() for path in paths):
        raise BenchmarkError(
            f"masks {folder} holds no mask of the images in {photos}; wanted: {paths[0]} for "
            f"{files[0]}, and likewise for the others"
        )
    return MaskFolder(paths)


class MaskGeometry:
    """Resizes and crops masks exactly like the preprocessing of a model does with photos.

    The steps of the preprocessing that move pixels are applied to the mask, with the nearest
    pixel's value in place of interpolation, as values in between would have no meaning. A sample
    that goes both ways proves that photo and mask stay aligned.

    Args:
        model: with its preprocessing.

    Raises:
        BenchmarkError: the preprocessing has other steps, or moves pixels in another way.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._steps: list[Step] = []
        for step in getattr(model.transform, "transforms", [model.transform]):
            name = getattr(step, "__name__", type(step).__name__)
            if name in _RESIZING | _CROPPING:
                step = copy.copy(step)
                if name in _RESIZING:
                    step.interpolation = InterpolationMode.NEAREST
                if hasattr(step, "fill"):  # what is added around a photo is not the object
                    step.fill = BACKGROUND
                self._steps.append(step)
            elif name not in _ON_COLOURS:
                raise _cannot_align(model, f"has the step {name}, which may move pixels")
        if not self._keeps_aligned(model.transform):
            raise _cannot_align(model, "moves pixels in another way than its steps say")

    def __call__(self, mask: Image.Image, photo_size: tuple[int, int]) -> Tensor:
        """The mask of what the model sees, (H, W), uint8, with the values of this module.

        Args:
            mask: of the whole photo.
            photo_size: width and height of the photo.

        Raises:
            BenchmarkError: the sizes differ, or the model sees nothing of the object.
        """
        if mask.size != photo_size:
            raise BenchmarkError(
                f"its mask has {mask.width} x {mask.height} pixels; wanted: "
                f"{photo_size[0]} x {photo_size[1]}, the size of the photo when it is upright"
            )
        if OBJECT not in np.asarray(mask):
            raise BenchmarkError(f"its mask has no object; wanted: pixels of value {OBJECT}")
        seen = self._apply(mask)
        if not bool((seen == OBJECT).any()):
            raise BenchmarkError(
                "its mask has no object in the part of the photo that the model sees"
            )
        return seen

    def _apply(self, mask: Image.Image) -> Tensor:
        for step in self._steps:
            mask = step(mask)
        return torch.from_numpy(np.array(mask))

    def _keeps_aligned(self, transform: Callable[[Image.Image], Tensor]) -> bool:
        """Whether a black and white picture, taken as a photo and as a mask, ends up the same."""
        cells = np.random.default_rng(0).integers(0, 2, (9, 9), dtype=np.uint8)
        for size in ((331, 240), (240, 331)):
            pattern = Image.fromarray(cells * OBJECT).resize(size, Image.Resampling.NEAREST)
            black, white = (Image.new("RGB", size, (grey,) * 3) for grey in (0, 255))
            low, high, photo = (
                transform(one).mean(dim=0) for one in (black, white, pattern.convert("RGB"))
            )
            mask = self._apply(pattern)
            if mask.shape != photo.shape:
                return False
            # 0 where the photo is black, 1 where it is white, NaN where it was padded.
            white_share = (photo - low) / (high - low)
            # In between, interpolated pixels lie on an edge.
            disagree = torch.where(mask == OBJECT, white_share < 0.2, white_share > 0.8)
            if bool(disagree.any()):
                return False
        return True


def _cannot_align(model: LoadedModel, reason: str) -> BenchmarkError:
    return BenchmarkError(
        f"masks cannot be aligned with the images of model {model.name!r}: its preprocessing "
        f"{reason}; wanted: only resizing, a centre crop, conversion to a tensor and "
        "normalization, or no --masks and only metrics that need none. The functions of "
        "captum_reflected.metrics take masks that you align yourself"
    )
