"""Reads image files as RGB images in the right orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# The errors that PIL raises for broken files.
UNREADABLE = (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)

# With a larger aspect ratio, a resized photo would mostly repeat one row of pixels.
_MAX_ASPECT = 100


def read_picture(path: Path) -> Image.Image:
    """Reads an image file as 8-bit RGB, in the right orientation.

    Args:
        path: the file.

    Returns:
        Image: mode RGB, rotated according to its EXIF data.

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
    if picture.mode.startswith("I;16"):  # PIL's conversion would clip the values to white
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}; wanted: 8 or 16 bits per channel")
    return picture.convert("RGB")
