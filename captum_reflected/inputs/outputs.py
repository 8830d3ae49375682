"""Finds the logits in a model's output, whatever object the model returns them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from captum_reflected._captum import run_forward
from captum_reflected.inputs.unfit_images import misfit


def logits_of(output: Any) -> Any:
    """The ``logits`` of an output that has them, such as Hugging Face's; any other unchanged.

    Only a tensor of this name is taken. Of a tuple, or of several tensors with other names, it is
    not known which one is meant.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output


def run_model(forward_func: Callable[..., Any], images: Tensor, args: tuple[Any, ...]) -> Any:
    """The output of ``forward_func(images, *args)``, called as Captum calls it, or its logits.

    An error of the model is left as it is. If the images are not such as the model states, a note
    is added to it (from Python 3.11 on).
    """
    try:
        return logits_of(run_forward(forward_func, images, args))
    except Exception as error:
        with suppress(Exception):  # nothing may hide the model's own error
            if (found := misfit(forward_func, images)) is not None and hasattr(error, "add_note"):
                error.add_note(f"The model was given {found}")
        raise


def returning_logits(forward_func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its logits as output, for code that takes nothing but tensors."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return logits_of(forward_func(*args, **kwargs))

    return forward


def not_logits(output: Any) -> str:
    """The message of an error: what an output that is not a tensor holds, and what is wanted."""
    fields = _fields(output)
    held = ", ".join(f"{name} {_form(value)}" for name, value in fields.items())
    message = (
        f"forward_func returned a {type(output).__name__}{f' of {held}' if held else ''}; wanted: "
        "a tensor of logits of shape (B, C), or an object that has them as its logits. "
    )
    if "logits_per_image" in fields:
        return (
            f"{message}For a model of images and texts, make a classifier first: "
            "captum_reflected.models.ZeroShotClassifier"
        )
    name = next((name for name, value in fields.items() if isinstance(value, Tensor)), "logits")
    selected = f"[{name}]" if isinstance(output, (tuple, list)) else f".{name}"
    if isinstance(output, dict) and not hasattr(output, name):
        selected = f"[{name!r}]"
    return f"{message}Select them, for instance: lambda x: model(x){selected}"


def _fields(output: Any) -> dict[Any, Any]:
    """What an output holds, by name or by index."""
    if isinstance(output, Mapping):
        return dict(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}


def _form(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"
