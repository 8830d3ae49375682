"""Fits a photo into a model's input, and says which part of the photo the model then sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_reflected.inputs.checks import check_option

Fit = Literal["crop", "pad", "squash"]
FITS: tuple[Fit, ...] = get_args(Fit)

# Columns at the edges of the input are left out of the fit, since resizing repeats edge pixels.
_EDGE = 0.1
# Largest deviation from a straight line, as a share of the ramp.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class FittedPhoto:
    """A photo as a model's input.

    Attributes:
        image: (C, H, W), preprocessed.
        box: (left, top, right, bottom): where the input lies in the photo, in the photo's pixels.
            With ``"pad"`` it is larger than the photo.
    """

    image: Tensor
    box: tuple[float, float, float, float]


class PhotoFitter:
    """Fits photos into the input of a model.

    Args:
        transform: the model's preprocessing, from a PIL image to (C, H, W).
        mean: (C,), the mean that it subtracts.
        std: (C,), the standard deviation that it divides by.
        fit: ``"crop"`` uses the preprocessing as it is, which for most models keeps the centre of
            a photo; ``"pad"`` shows the whole photo, with bars of the mean colour; ``"squash"``
            shows the whole photo, stretched to the shape of the input.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Tensor],
        mean: Tensor,
        std: Tensor,
        fit: Fit = "crop",
    ) -> None:
        check_option("fit", fit, FITS)
        self._transform, self._fit = transform, fit
        self._mean, self._std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        # Photos of one camera have one size.
        self._seen_box = cache(self._find_seen_box)

    def __call__(self, photo: Image.Image) -> FittedPhoto:
        """Fits a photo.

        Args:
            photo: mode RGB.

        Raises:
            ValueError: the preprocessing moves pixels in another way than resizing and cropping.
        """
        width, height = photo.size
        if self._fit == "crop":
            return FittedPhoto(self._transform(photo), self._seen_box(width, height))
        rows, columns = self._input_size
        if self._fit == "squash":
            whole = (0.0, 0.0, float(width), float(height))
            return FittedPhoto(self._normalized(_resized(photo, columns, rows)), whole)
        scale = min(columns / width, rows / height)
        inner = max(round(width * scale), 1), max(round(height * scale), 1)
        left, top = (columns - inner[0]) // 2, (rows - inner[1]) // 2
        image = torch.zeros(3, rows, columns)  # zero is the mean colour
        small = self._normalized(_resized(photo, *inner))
        image[:, top : top + inner[1], left : left + inner[0]] = small
        across, down = width / inner[0], height / inner[1]
        box = (-left * across, -top * down, (columns - left) * across, (rows - top) * down)
        return FittedPhoto(image, box)

    @property
    def _input_size(self) -> tuple[int, int]:
        rows, columns = self._transform(Image.new("RGB", (64, 64))).shape[-2:]
        return rows, columns

    def _normalized(self, photo: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std

    def _find_seen_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Where the input lies in photos of this size, read from ramps sent through."""
        box = (0.0, 0.0, float(width), float(height))
        # The first ramps span the photo; the second ones only what was seen, and are finer.
        for _ in range(2):
            ramps = np.zeros((height, width, 3), dtype=np.uint8)
            across, start_x, span_x = _ramp(width, box[0], box[2])
            down, start_y, span_y = _ramp(height, box[1], box[3])
            ramps[..., 0], ramps[..., 1] = across, down[:, None]
            seen = self._transform(Image.fromarray(ramps)).float() * self._std + self._mean
            left, right = _ends(seen[0].double().numpy(), width, "horizontal")
            top, bottom = _ends(seen[1].double().numpy().T, height, "vertical")
            box = (
                start_x + left * span_x,
                start_y + top * span_y,
                start_x + right * span_x,
                start_y + bottom * span_y,
            )
        return box


def _ramp(length: int, low: float, high: float) -> tuple[np.ndarray, float, float]:
    """Grey levels that rise from ``low`` to ``high`` and a margin; its start and its span."""
    margin = max(0.1 * (high - low), 2.0)
    start, end = max(low - margin, 0.0), min(high + margin, float(length))
    levels = 255 * (np.arange(length) + 0.5 - start) / (end - start)
    return np.round(levels.clip(0, 255)), start, end - start


def _ends(positions: np.ndarray, length: int, direction: str) -> tuple[float, float]:
    """The ends of the input on the ramp, from the position (0 to 1) of each of its pixels."""
    size = positions.shape[1]
    inner = slice(int(_EDGE * size), size - int(_EDGE * size))
    centers = (np.arange(size) + 0.5)[inner]
    values = positions[inner, inner] if positions.shape[0] > 10 else positions[:, inner]
    slope, start = np.polyfit(centers, values.mean(axis=0), 1)
    if not np.abs(values - (start + slope * centers)).max() <= _TOLERANCE or slope <= 0:
        raise ValueError(
            f"where the model sees this photo of {length} pixels cannot be found, since the "
            f"preprocessing moves their {direction} position in another way than resizing and "
            'cropping; wanted: a larger photo, or to fit it by "pad" or "squash"'
        )
    return float(start), float(start + slope * size)


def _resized(photo: Image.Image, width: int, height: int) -> Image.Image:
    return photo.resize((width, height), Image.Resampling.BICUBIC)
