"""Shared parts of the subcommands: exit codes, argument types, the model's options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from captum_reflected.attr.methods import METHODS, find_method
from captum_reflected.errors import UsageError
from captum_reflected.models import DEFAULT_TEMPLATES, LoadedModel, load_model

EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130

# Stands for ImageNet's 1000 classes, with open_clip's names.
_IMAGENET = "imagenet"


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of ``least`` or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return read


def names_from(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A type for argparse: comma-separated names out of ``choices``; ``all`` means all of them."""

    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        if names == ["all"]:
            return list(choices)
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, unknown))} is none of: all, {', '.join(choices)}"
            )
        return names

    return read


def method_name(text: str) -> str:
    """A type for argparse: a method with its options."""
    try:
        find_method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def method_names(text: str) -> list[str]:
    """A type for argparse: comma-separated methods; ``all`` means all of them."""
    if text.strip() == "all":
        return list(METHODS)
    return list(dict.fromkeys(method_name(name.strip()) for name in text.split(",")))


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` means an accelerator if there is one, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def add_model_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds ``--model``, ``--weights``, ``--classes``, ``--templates`` and ``--device``."""
    parser.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help="a Vision Transformer of timm, open_clip:NAME/TAG with --classes, or "
        f'"demo"{"" if default is None else " (default: %(default)s)"}',
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="local weights for the model (default: downloads its pretrained weights)",
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
        f'the text features are averaged (default: "{DEFAULT_TEMPLATES[0]}")',
    )
    parser.add_argument(
        "--device",
        default="auto",
        help='"cpu", "cuda", "cuda:1", "mps", ...; "auto" uses an accelerator if there is one '
        "(default: %(default)s)",
    )


def load_from(arguments: argparse.Namespace, device: torch.device) -> LoadedModel:
    """The model that the options of :func:`add_model_options` name."""
    return load_model(
        arguments.model,
        weights=arguments.weights,
        device=device,
        classes=arguments.classes,
        templates=arguments.templates,
    )
