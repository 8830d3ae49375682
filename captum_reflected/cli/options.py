"""The options that name a model and a device, which several subcommands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from captum_reflected.cli.names import DEFAULT_TEMPLATE, FIT_NAMES
from captum_reflected.errors import UsageError

if TYPE_CHECKING:
    import torch

    from captum_reflected.models import LoadedModel

# Stands for ImageNet's 1000 classes, with open_clip's names.
_IMAGENET = "imagenet"


def add_model_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds ``--model``, ``--weights``, names of classes and ``--device``."""
    parser.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help="a Vision Transformer of timm; hf:NAME for one of the Hugging Face hub; a local "
        'folder of one; open_clip:NAME/TAG with --classes; or "demo"'
        f"{'' if default is None else ' (default: %(default)s)'}",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="local weights for the model (default: downloads its pretrained weights)",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="the class names of a fine-tuned model: one name per line, or JSON (a list, or an "
        "object from number to name)",
    )
    parser.add_argument(
        "--classes",
        type=lambda text: text if text == _IMAGENET else [name.strip() for name in text.split(",")],
        metavar="NAME,NAME,...",
        help="the class names for an open_clip model, separated by commas; "
        f'"{_IMAGENET}" for ImageNet\'s 1000 classes',
    )
    parser.add_argument(
        "--templates",
        action="append",
        metavar="TEXT",
        help="prompt for an open_clip model, with {} for the class name; if given more than once, "
        f'the text features are averaged (default: "{DEFAULT_TEMPLATE}")',
    )
    parser.add_argument(
        "--device",
        default="auto",
        help='"cpu", "cuda", "cuda:1", "mps", ...; "auto" uses an accelerator if there is one '
        "(default: %(default)s)",
    )


def add_fit_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--fit``."""
    parser.add_argument(
        "--fit",
        choices=FIT_NAMES,
        default="crop",
        help="how a photo becomes the model's input: crop, as in the model's preprocessing; pad, "
        "the whole photo with bars; squash, the whole photo, distorted (default: %(default)s)",
    )


def check_output_folder(folder: Path) -> None:
    """Raises UsageError if a folder for results neither exists nor can be created."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"the output {folder} cannot be a folder, since {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"nothing can be written into the folder {there} (--output {folder})")


def check_output_file(file: Path) -> None:
    """Raises UsageError if a file for results cannot be written where it is to be."""
    if file.is_dir():
        raise UsageError(f"the output {file} is a folder; wanted: a file")
    check_output_folder(file.parent)


def check_files(arguments: argparse.Namespace) -> None:
    """Raises UsageError if a file that the options of :func:`add_model_options` name is missing."""
    weights, names = arguments.weights, arguments.class_names
    if weights is not None and weights.suffix == ".safetensors" and not weights.is_file():
        raise UsageError(f"weights file {weights} does not exist")
    if names is not None and not names.exists():  # it may be a pipe
        raise UsageError(f"cannot read the class names {names}: there is no such file")


def load_from(arguments: argparse.Namespace, device: torch.device) -> LoadedModel:
    """The model that the options of :func:`add_model_options` name."""
    from captum_reflected.models import load_model
    from captum_reflected.models.class_names import read_class_names

    names = arguments.class_names
    return load_model(
        arguments.model,
        weights=arguments.weights,
        device=device,
        classes=arguments.classes,
        templates=arguments.templates,
        class_names=None if names is None else read_class_names(names),
    )


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` means an accelerator if there is one, else the CPU."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
