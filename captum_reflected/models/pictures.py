"""Reads image files the way a model should see them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What PIL raises on broken files of one kind or another.
UNREADABLE = (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)

# Beyond it a resized photo would be mostly one row of pixels, many times repeated.
_MAX_ASPECT = 100


def read_picture(path: Path) -> Image.Image:
    """An image file in 8-bit RGB, the right way up.

    Args:
        path: the file.

    Returns:
        Image: mode RGB, turned as its EXIF data says.

    Raises:
        OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError: the file
            cannot be read as a picture (:data:`UNREADABLE`).
    """
    with Image.open(path) as file:
        if max(file.size) > _MAX_ASPECT * min(file.size):
            raise ValueError(
                f"it is {file.width} x {file.height} pixels; wanted: sides of at most "
                f"{_MAX_ASPECT} to 1"
            )
        picture = ImageOps.exif_transpose(file)
    if picture.mode.startswith("I;16"):  # PIL would clip it to white
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}; wanted: 8 or 16 bits a channel")
    return picture.convert("RGB")
