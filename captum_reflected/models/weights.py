"""Checks weights files: only safetensors files are loaded."""

from __future__ import annotations

import textwrap
from pathlib import Path

from captum_reflected.errors import ModelLoadError


def check_weights_file(weights: Path) -> None:
    """Raises ModelLoadError unless this is a .safetensors file; other formats are pickles."""
    if weights.suffix != ".safetensors":
        raise ModelLoadError(f"weights is {weights}; wanted: a .safetensors file")
    if not weights.is_file():
        raise ModelLoadError(f"weights file {weights} does not exist")


def reason(error: Exception) -> str:
    """The message of another library's error, shortened to one line."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or repr(error)
