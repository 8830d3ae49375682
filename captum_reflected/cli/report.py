"""The command ``captum-reflected report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_reflected.cli.parsing import EXIT_OK


def add_report_command(commands: Any) -> None:
    """Adds the subcommand ``report``."""
    parser = commands.add_parser(
        "report",
        description="Reads the folder of a finished or unfinished benchmark, prints each method's "
        "mean scores with 95 % intervals and the paired differences to TransformerAttribution, and "
        "writes them to files, with curves, a gallery and a web page.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the benchmark")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the report, created if missing (default: the subfolder report of the "
        "benchmark's folder)",
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from captum_reflected.report.writing import write_report

    paths = write_report(arguments.folder, arguments.output)
    print(paths[0].read_text(encoding="utf-8"))
    print("Written:", *paths, sep="\n  ")
    return EXIT_OK
