"""Reads the command line: argument types, and errors that say what may have been meant.

Imports nothing that is slow, so that ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from captum_reflected._suggestions import did_you_mean
from captum_reflected.cli.names import METHOD_NAMES

EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of ``least`` or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return read


def share(text: str) -> float:
    """A type for argparse: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def precision_name(text: str) -> str:
    """A type for argparse: torch's names of half types as this package's.

    As ``masking.precision.canonical_precision``, which imports torch.
    """
    return {"bfloat16": "bf16", "float16": "fp16"}.get(text, text)


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
                f"{did_you_mean(unknown[0], choices)}"
            )
        return names

    return read


def method_names(text: str) -> list[str]:
    """A type for argparse: comma-separated methods with their options; ``all`` means all.

    They are returned by their keys, however they are written.
    """
    if text.strip() == "all":
        return list(METHOD_NAMES)
    from captum_reflected.attr.methods import find_method

    keys: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if keys and "=" in name.partition(":")[0]:
            raise argparse.ArgumentTypeError(
                f"{name!r} comes after a comma, which separates methods; wanted: a colon between "
                f"options, {keys[-1]}:{name}"
            )
        try:
            keys.append(find_method(name).key)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(keys))


def refuse_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Ends with an error that names unknown arguments and what may have been meant."""
    if unknown:
        option = unknown[0].partition("=")[0]
        hint = did_you_mean(option, parser._option_string_actions)
        parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
