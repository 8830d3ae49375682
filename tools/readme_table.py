"""The table in the README: what each method needs, what it costs and how good its maps are.

``python tools/readme_table.py RUN [RUN ...] --weights FILE.safetensors`` reads folders that
``captum-reflected benchmark`` wrote for the same model and data, measures what an explanation
costs on this machine, and stores the figures in ``docs/results/methods.csv``. Without runs, it
takes the figures from that file. Both write the table into the README, between two comments, and
into ``docs/results/methods.md``.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from study import costs, merge
from torch import Tensor

from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import find_method, method_key
from captum_reflected.cli.parsing import EXIT_BAD_INPUT, EXIT_OK
from captum_reflected.errors import BenchmarkError, ModelLoadError, UsageError
from captum_reflected.metrics import mean_interval
from captum_reflected.models import LoadedModel, load_model
from captum_reflected.report.results import Results, read_results

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs" / "results" / "methods.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- table: python tools/readme_table.py -->", "<!-- end of the table -->"

# Name in the table and what an explanation runs.
METHODS = {
    "balanced_relevance": ("**`BalancedRelevance`**", "1 forward, 1 backward"),
    "mask_regression": ("**`MaskRegression`**", "the same, and 34 forwards of half the tokens"),
    "transformer_attribution": ("`TransformerAttribution`", "1 forward, 1 backward"),
    "integrated_gradients": ("Captum's `IntegratedGradients`", "50 forwards, 50 backwards"),
    "attention_grad_cam": ("`AttentionGradCam`", "1 forward, 1 backward of the last block"),
    "legrad": ("LeGrad", "1 forward, 1 backward of the last blocks"),
    "tis": ("TIS", "1,024 forwards of half the tokens"),
    "rise": ("RISE", "1,024 forwards"),
}
# Shown a second time, on the photos of a method that was run on fewer.
COMPARED = "mask_regression"
_NO_BREAK = "\u00a0"
_WIDTH = 120
# A method is timed for so long, and at least once.
_SECONDS = 4.0
METRICS = ("deletion", "insertion", "average_increase")


@dataclass(frozen=True)
class Figures:
    """A row of the stored file; scores in percent, with half the width of their 95 % interval."""

    model: str
    machine: str
    method: str
    beside: str  # the method on whose photos this row rests, "" for the photos of the others
    photos: int
    forwards: float
    seconds: float
    deletion: float
    deletion_interval: float
    insertion: float
    insertion_interval: float
    average_increase: float
    average_increase_interval: float


def collect(
    results: Results,
    forwards: Mapping[str, float],
    seconds: Mapping[str, float],
    where: str,
    fewer: Sequence[str] = (),
) -> list[Figures]:
    """The figures of all methods, on the same photos.

    Args:
        results: of one or more runs, see :func:`study.merge`.
        forwards: by method, what an explanation costs, see :func:`study.costs`.
        seconds: by method, see :func:`seconds_of`.
        where: the machine that the seconds were measured on.
        fewer: methods that were run on some of these photos only. They get a row on
            those, and ``COMPARED`` a second one.

    Raises:
        BenchmarkError: a method is missing, or fewer than two photos have scores for all methods.
    """
    if missing := [name for name in seconds if name not in results.settings.methods]:
        raise BenchmarkError(f"{', '.join(missing)} is in none of the runs; wanted: a run of it")
    scores = {(name, key): results.scores(name, key) for name in seconds for key in METRICS}

    def seen_by(names: Iterable[str]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = np.all(
            [np.isfinite(scores[name, key]) for name in names for key in METRICS], axis=0
        )
        if found.sum() < 2:
            raise BenchmarkError(
                f"{found.sum()} photos have scores of all methods; wanted: 2 or more"
            )
        return found

    def row(name: str, photos: npt.NDArray[np.bool_], beside: str = "") -> Figures:
        found = [mean_interval(100 * scores[name, key][photos]) for key in METRICS]
        figures = [(round(one.mean, 2), round(one.half_width, 2)) for one in found]
        return Figures(
            results.settings.model,
            where,
            name,
            beside,
            int(photos.sum()),
            *(float(f"{cost:.3g}") for cost in (forwards[name], seconds[name])),
            *(figure for pair in figures for figure in pair),
        )

    usual = [name for name in seconds if name not in fewer]
    rows = [row(name, seen_by([*usual, name] if name in fewer else usual)) for name in seconds]
    return [*rows, *(row(COMPARED, seen_by([*usual, name]), beside=name) for name in fewer)]


def seconds_of(loaded: LoadedModel, methods: Sequence[str]) -> dict[str, float]:
    """The processor time of an explanation of one photo on one core.

    It is the least of as many calls as fit into some seconds. Unlike the time that passes, it
    hardly depends on what else the machine does.
    """
    image = image_of(loaded)
    with torch.no_grad():
        target = loaded.model(image).argmax(dim=-1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the map of a random image may be zero
            return {
                name: _least_time(partial(find_method(name).explain, loaded.model, image, target))
                for name in methods
            }
    finally:
        torch.set_num_threads(threads)


def _least_time(call: Callable[[], object]) -> float:
    least, spent = math.inf, 0.0
    while spent < _SECONDS:
        start = time.process_time()
        call()
        seconds = time.process_time() - start
        least, spent = min(least, seconds), spent + seconds
    return least


def image_of(loaded: LoadedModel) -> Tensor:
    """(1, C, H, W): noise of the size that the model takes."""
    size = loaded.transform(Image.new("RGB", (512, 512))).shape
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def table(rows: Sequence[Figures]) -> str:
    """The table in Markdown, with a note."""
    lines = [
        "| method | needs | seconds per image | deletion ↓ | insertion ↑ | average increase ↑ |",
        "|---|---|---:|---:|---:|---:|",
    ]
    shown = [row for row in rows if not row.beside]
    photos = max(row.photos for row in shown)
    usual = [row for row in shown if row.photos == photos]
    best = {
        "deletion": min(row.deletion for row in usual),
        "insertion": max(row.insertion for row in usual),
        "average_increase": max(row.average_increase for row in usual),
    }
    for row in shown:
        title, needs = METHODS[row.method]
        cells = [
            _joined(f"**{text}**" if row in usual and value == best[key] else text, width)
            for key, value, text, width in _cells(row)
        ]
        lines.append(f"| {' | '.join([title, needs, f'{row.seconds:#.2g}'.rstrip('.'), *cells])} |")
    note = (
        f"{rows[0].model} on {photos} photos that no method was tuned on; in percent, with 95 % "
        "intervals. Deletion: what is left of the probability while the pixels are removed, the "
        "most relevant first. Insertion: the probability while they are inserted into the blurred "
        "photo. Average increase: how often the probability rises when only the more relevant half "
        f"is shown. Seconds: processor time on one core of an {rows[0].machine}."
    )
    for row in rows:
        if row.beside:
            (title, _), (compared, _) = METHODS[row.beside], METHODS[row.method]
            scores = ", ".join(_joined(text, width) for _, _, text, width in _cells(row))
            note += (
                f" {title} was run on {row.photos} of the photos; on these, "
                f"{compared.strip('*')} has {scores}."
            )
    return "\n".join([*lines, "", textwrap.fill(f"*{note}*", _WIDTH)])


def _cells(row: Figures) -> list[tuple[str, float, str, str]]:
    """The metrics of a row: key, value, and value and interval as texts."""
    cells = []
    for key in METRICS:
        value, width = getattr(row, key), getattr(row, f"{key}_interval")
        digits = 0 if key == "average_increase" else 1
        cells.append((key, value, f"{value:.{digits}f}", f"{width:.{digits}f}"))
    return cells


def _joined(text: str, width: str) -> str:
    return f"{text}{_NO_BREAK}±{_NO_BREAK}{width}"


def in_readme(text: str, rows: Sequence[Figures]) -> str:
    """The README with the table between its two comments.

    Raises:
        UsageError: the README has no such comments.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"the README has no {BEGIN} with {END} after it; wanted: both")
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}"


def stored(rows: Sequence[Figures]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Figures)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def read_stored(path: Path) -> list[Figures]:
    """The rows that :func:`stored` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Figures(
                row["model"],
                row["machine"],
                row["method"],
                row["beside"],
                int(row["photos"]),
                *(float(row[field.name]) for field in fields(Figures)[5:]),
            )
            for row in csv.DictReader(file)
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python tools/readme_table.py", description="Writes the table in the README."
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="a benchmark's folder (default: stored)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE.safetensors", help="of the model of the runs"
    )
    parser.add_argument(
        "--methods",
        metavar="NAME,...",
        default=",".join(METHODS),
        help="the table's rows (default: %(default)s)",
    )
    parser.add_argument(
        "--fewer",
        metavar="NAME,...",
        default="",
        help="methods that were run on fewer photos than the others",
    )
    parser.add_argument("--machine", default="", metavar="TEXT", help="this one: AMD EPYC (AVX2)")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except (BenchmarkError, ModelLoadError, UsageError, OSError) as error:
        print(f"captum-reflected: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(given: argparse.Namespace) -> int:
    if given.runs:
        names = [method_key(name) for name in given.methods.split(",")]
        if not given.machine:
            raise UsageError("machine is not given; wanted: what the seconds are measured on")
        if unknown := [name for name in names if name not in METHODS]:
            raise UsageError(f"methods are {unknown}; wanted: some of {', '.join(METHODS)}")
        results = merge([read_results(folder) for folder in given.runs])
        loaded = load_model(results.settings.model, weights=given.weights)
        forwards = costs(loaded.model, names, image_of(loaded).shape[1:])
        seconds = seconds_of(loaded, names)
        fewer = [method_key(name) for name in given.fewer.split(",") if name]
        rows = collect(results, forwards, seconds, given.machine, fewer)
        write_whole(STORED, stored(rows).encode())
    rows = read_stored(STORED)
    write_whole(README, in_readme(README.read_text(encoding="utf-8"), rows).encode())
    write_whole(STORED.with_suffix(".md"), f"{table(rows)}\n".encode())
    print(table(rows))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
