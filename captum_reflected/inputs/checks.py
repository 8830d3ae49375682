"""Checks of single arguments; every error says what was given and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn


def check_forward_func(forward_func: Any) -> None:
    """Raises TypeError unless ``forward_func`` is callable and may take images first."""
    kind = type(forward_func).__name__
    if not callable(forward_func):
        raise TypeError(f"forward_func is a {kind}; wanted: a model or a function")
    names: list[str] = []
    if isinstance(forward_func, nn.Module):
        with suppress(TypeError, ValueError):  # a forward without a signature
            names = list(signature(forward_func.forward).parameters)
    if names[:1] == ["input_ids"]:
        raise TypeError(
            f"forward_func is a {kind}, whose first argument is input_ids; wanted: a function of "
            "images. For a model of images and texts, make a classifier first: "
            "captum_reflected.models.ZeroShotClassifier"
        )


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Raises ValueError, naming the options, if ``value`` is not one of them."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; wanted: one of {', '.join(options)}")


def check_at_least(name: str, number: Any, least: int) -> int:
    """Returns ``number`` if it is a whole number of ``least`` or more, else raises an error."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name} is {number!r}; wanted: an int")
    if number < least:
        raise ValueError(f"{name} is {number}; wanted: {least} or more")
    return number


def check_positive(name: str, number: Any) -> int:
    """Returns ``number`` if it is a whole number of 1 or more, else raises an error."""
    return check_at_least(name, number, 1)


def check_not_negative(name: str, number: Any) -> None:
    """Raises TypeError or ValueError unless ``number`` is a finite number of 0 or more."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} is {number!r}; wanted: a number")
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} is {number}; wanted: a number, 0 or more")


def check_switch(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; wanted: True or False")


def check_finite(tensors: Sequence[Tensor], what: str) -> None:
    """Checks that tensors (B, ...) contain only finite numbers, with one device synchronisation.

    Args:
        tensors: tensors whose first dimension is the images.
        what: description of the tensors for the message.

    Raises:
        ValueError: a value is NaN or infinite; the message names the images.
    """
    finite = torch.stack([values.isfinite().flatten(1).all(dim=1) for values in tensors]).all(dim=0)
    if not bool(finite.all()):
        images = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{what} is not finite for image(s) {images} of the batch; wanted: finite numbers. "
            "The cause is a division by zero, or a number beyond the range of the model's dtype, "
            "in its forward or backward"
        )
