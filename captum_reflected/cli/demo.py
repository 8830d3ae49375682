"""The command ``captum-reflected demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_reflected.cli.options import check_output_file
from captum_reflected.errors import UsageError


def add_demo_command(commands: Any) -> None:
    """Adds the subcommand ``demo``."""
    show = commands.add_parser(
        "demo",
        description="Explains an embedded Vision Transformer on embedded scenes with known ground "
        "truth, offline. Writes a figure, and prints how much of each map lies on the object that "
        "determines the class.",
    )
    show.add_argument(
        "--output",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE.png",
        help="file for the figure (default: %(default)s)",
    )
    show.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.output.suffix.lower() != ".png":
        raise UsageError(f"output is {arguments.output}; wanted: a file that ends in .png")
    check_output_file(arguments.output)
    from captum_reflected.cli.run_demo import run_command

    return run_command(arguments)
