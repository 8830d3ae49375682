"""The command ``captum-reflected speed``: compares the methods' speed with plain forwards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captum_reflected.cli.options import check_output_file
from captum_reflected.cli.parsing import precision_name, whole_number


def add_speed_command(commands: Any) -> None:
    """Adds the subcommand ``speed``."""
    parser = commands.add_parser(
        "speed",
        description="Measures ReflectedRelevance, TransformerAttribution and the metrics in "
        "comparison with plain forwards of the model and with other methods, in one run, and "
        "prints a table: time, time per image, FLOP/s and their share of the machine's peak, "
        "peak memory.",
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", metavar="NAME",
                        help="as for explain (default: %(default)s)")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE.safetensors",
                        help="as for explain")  # fmt: skip
    source.add_argument("--random-weights", action="store_true",
                        help="load no weights; speed does not depend on them")  # fmt: skip
    parser.add_argument("--device", default="auto", help="as for explain (default: %(default)s)")
    parser.add_argument("--batch-size", type=whole_number(1), metavar="N",
                        help="batch size of the plain forwards (default: the fastest ones in a "
                        "trial)")  # fmt: skip
    parser.add_argument("--precision", default="both", choices=("float32", "bf16", "both"),
                        type=precision_name,
                        help="precision of the reflected forwards (default: %(default)s)"
                        )  # fmt: skip
    parser.add_argument("--tf32", action="store_true",
                        help="let a GPU compute products of float32 in TF32, which is faster and "
                        "keeps 10 bits of the mantissa")  # fmt: skip
    parser.add_argument("--repeats", type=whole_number(1), default=3, metavar="N",
                        help="the fastest of N runs counts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no-others", dest="others", action="store_false",
                        help="leave out other methods")  # fmt: skip
    parser.add_argument("--no-table", dest="table", action="store_false",
                        help="skip the table, and run only the options below")  # fmt: skip
    parser.add_argument("--photos", nargs="+", type=Path, default=[], metavar="IMAGE",
                        help="also compare the maps in bf16 with those in float32")  # fmt: skip
    parser.add_argument("--image-size", type=whole_number(1), metavar="PIXELS",
                        help="also run TransformerAttribution on one image with this side length, "
                        "with random weights")  # fmt: skip
    parser.add_argument("--scaling", type=Path, metavar="FILE.png",
                        help="also measure how the cost scales, and plot it")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.md",
                        help="also write the output to this file")  # fmt: skip
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    for file in filter(None, (arguments.output, arguments.scaling)):
        check_output_file(file)
    from captum_reflected.cli.run_speed import run_command

    return run_command(arguments)
