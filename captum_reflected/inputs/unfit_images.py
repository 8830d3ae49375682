"""Says what is wrong with images that a model cannot take, and how to make images that it can."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from captum_reflected.inputs.modules import modules_of

_WANTED = "wanted: a torch.Tensor of shape (B, C, H, W), or a 1-tuple of it"
_OF_TIMM = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
_OF_TORCHVISION = "transform = weights.transforms()"
_OF_TRANSFORMERS = "processor = AutoImageProcessor.from_pretrained(name)"


def preprocessing_of(photo: str) -> str:
    """The end of an error: how a photo becomes a model's input.

    Args:
        photo: an expression for the photo as an image of PIL.
    """
    return (
        f", preprocessed as the model wants it. For a model of timm:\n    {_OF_TIMM}\n"
        f'    images = transform({photo}.convert("RGB"))[None]\n'
        f"For one of torchvision: {_OF_TORCHVISION}; of transformers: {_OF_TRANSFORMERS}"
    )


def describe_other(name: str, given: Any) -> str:
    """The message of an error about images that are no tensor.

    Args:
        name: of the argument.
        given: its value.
    """
    start = f"{name} is a {type(given).__name__}; {_WANTED}"
    if isinstance(given, (str, os.PathLike)):
        path = repr(os.fspath(given))
        return f"{name} is {path}; {_WANTED}{preprocessing_of(f'Image.open({path})')}"
    if _is_photo(given):
        return f"{name} is an image of PIL; {_WANTED}{preprocessing_of('photo')}"
    if isinstance(given, np.ndarray):
        start = f"{name}, of shape {given.shape} and {given.dtype}, is a ndarray; {_WANTED}"
        if given.dtype == np.uint8:
            return start + preprocessing_of("Image.fromarray(array)")
        return f"{start}; torch.from_numpy({name}).float() makes a tensor of it"
    if isinstance(given, list) and given and all(isinstance(one, Tensor) for one in given):
        return f"{start}; torch.stack({name}) makes one tensor of several"
    if isinstance(given, list) and given and all(map(_is_photo, given)):
        return start + preprocessing_of("photo")
    if isinstance(given, Mapping) and isinstance(given.get("pixel_values"), Tensor):
        return f'{start}; it holds one: {name}["pixel_values"]'
    return start


def batch_hint(name: str, shape: tuple[int, ...]) -> str:
    """The end of an error about images of other dimensions than four."""
    if len(shape) != 3:
        return ""
    channels = ".permute(2, 0, 1)" if _has_channels_last(shape) else ""
    return f"; add the batch dimension with {name}{channels}[None]"


def channels_hint(name: str, shape: tuple[int, ...]) -> str:
    """The end of an error about images (B, C, H, W) of an unsuitable number of channels."""
    if _has_channels_last(shape[1:]):
        return f"; put the channels before height and width with {name}.permute(0, 3, 1, 2)"
    return '; a photo has three channels after photo.convert("RGB")' if shape[1] == 4 else ""


def misfit(forward_func: Callable[..., Any], images: Tensor) -> str | None:
    """How images differ from those that a model states that it takes; None if they do not.

    A model may take other images, too, so ask only after it has failed.

    Args:
        forward_func: the model, or a function that calls it.
        images: (B, C, H, W).
    """
    modules = modules_of(forward_func)
    shape = tuple(images.shape)
    size = next((size for module in modules if (size := _stated_size(module))), shape[2:])
    channels = next((m.in_channels for m in modules if isinstance(m, nn.Conv2d)), shape[1])
    if shape[1] != channels:
        wanted = (shape[0], channels, *size)
        return f"images of shape {shape}, and states {wanted}{channels_hint('images', shape)}"
    if shape[2:] != size:
        wanted = (*shape[:2], *size)
        how = _OF_TIMM if _has(modules, "pretrained_cfg") else _OF_TORCHVISION
        how = _OF_TRANSFORMERS if _has(modules, "config") else how
        return f"images of shape {shape}, and states {wanted}; its preprocessing makes them:\n{how}"
    floats = (p for module in modules for p in module.parameters() if p.is_floating_point())
    weight = next(floats, images)
    if (weight.dtype, weight.device) != (images.dtype, images.device):
        return (
            f"images of {images.dtype} on {images.device}, and has parameters of {weight.dtype} on "
            f"{weight.device}; use images.to({str(weight.device)!r}, {weight.dtype})"
        )
    return None


def _is_photo(given: Any) -> bool:
    return type(given).__module__.split(".")[0] == "PIL"


def _has_channels_last(shape: tuple[int, ...]) -> bool:
    return shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4)


def _has(modules: list[nn.Module], name: str) -> bool:
    return any(hasattr(module, name) for module in modules)


def _stated_size(module: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the images that a model says it takes, as timm, torchvision and transformers do."""
    config = getattr(module, "config", None)
    for size in (
        getattr(getattr(module, "patch_embed", None), "img_size", None),
        getattr(module, "image_size", None),
        getattr(config, "image_size", None),
    ):
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None
