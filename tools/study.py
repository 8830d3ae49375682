"""Compares methods on images that were used to choose between them, and on others.

``python tools/study.py RUN [RUN ...]`` reads one or more folders that
``captum-reflected benchmark`` wrote for the same model and data, each with methods of its
own. Images of even number (0, 2, ...) are for choosing, those of odd number for confirming;
``--half all`` takes all images as one set, if they were held back together. It prints, for each
half, the means and the paired differences to every ``--against``, and draws what each method
achieves on the confirming half against what it costs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image
from torch import nn

from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import REFERENCE_METHODS, find_method, method_key
from captum_reflected.benchmark.data import HALVES
from captum_reflected.benchmark.rows import Row
from captum_reflected.benchmark.settings import Settings
from captum_reflected.cli.measuring import flops_of
from captum_reflected.cli.options import resolve_device
from captum_reflected.cli.parsing import EXIT_BAD_INPUT, EXIT_OK
from captum_reflected.errors import BenchmarkError, UnsupportedModelError, UsageError
from captum_reflected.models import load_model
from captum_reflected.report.page import markdown_table
from captum_reflected.report.results import Results, read_results
from captum_reflected.report.tables import differences, interval, means, method_title
from captum_reflected.report.text import units
from captum_reflected.visualization.curves import line_style
from captum_reflected.visualization.notebook_figure import figure_bytes
from captum_reflected.visualization.text import printable

_PANELS_A_ROW = 3
_COLOURS = 7
_LINEAR_TO = 8.0
_ALL = "all"
_AGAINST = ("transformer_attribution", "reflected_relevance")


def merge(runs: Sequence[Results]) -> Results:
    """One run of all methods, on the metrics that all runs have.

    Args:
        runs: of the same model, data, target and precision. Where a method occurs in
            several, the last of them counts, on all images.

    Returns:
        Results: every image that any run has; a method that did not see it has no scores there.

    Raises:
        BenchmarkError: settings, pictures or masks differ; both are told.
    """
    first = runs[0].settings
    for run in runs[1:]:
        for name, ours in _compared(first).items():
            theirs = _compared(run.settings)[name]
            if ours != theirs:
                raise _differs(f"{name} is {ours!r} in one run and {theirs!r} in another")
    rows: dict[int, Row] = {}
    for run in runs:
        rows = {index: _without(row, run.settings.methods) for index, row in rows.items()}
        for row in run.rows:
            before = rows.get(row.index)
            if before is None or before.error is not None:
                rows[row.index] = row
            elif row.error is None:
                if before.content != row.content and before.content and row.content:
                    raise _differs(f"{row.file} is one picture in one run and another in another")
                if before.mask != row.mask and before.mask and row.mask:
                    raise _differs(f"{row.file} has one mask in one run and another in another")
                rows[row.index] = replace(
                    before,
                    figures={**before.figures, **row.figures},
                    mask=before.mask or row.mask,  # a run without masks may come first
                )
    methods = dict.fromkeys(method for run in runs for method in run.settings.methods)
    metrics = [one for one in first.metrics if all(one in run.settings.metrics for run in runs)]
    if not metrics:
        raise BenchmarkError("the runs have no metric in common; wanted: one or more")
    return replace(
        runs[0],
        settings=replace(first, methods=list(methods), metrics=metrics),
        rows=tuple(rows[index] for index in sorted(rows)),
    )


def _compared(settings: Settings) -> dict[str, object]:
    """What has to be the same for figures to be compared."""
    return {
        "model": settings.model,
        "weights": settings.weights,
        "target": settings.target,
        "precision": settings.precision,
        "data": settings.data["fingerprint"],
        "correct_only": settings.correct_only,
    }


def _differs(what: str) -> BenchmarkError:
    return BenchmarkError(f"{what}; wanted: runs of the same model on the same data")


def _without(row: Row, methods: Sequence[str]) -> Row:
    return replace(
        row, figures={name: row.figures[name] for name in row.figures if name not in methods}
    )


def halves(results: Results) -> dict[str, Results]:
    """The images of even and of odd number, under the names of what they are for."""
    return {
        half: replace(results, rows=tuple(row for row in results.rows if row.index % 2 == place))
        for place, half in enumerate(HALVES)
    }


def costs(model: nn.Module, methods: Sequence[str], image_size: torch.Size) -> dict[str, float]:
    """What an explanation of one image costs, in forwards of that image, by FLOPs.

    FLOPs of matrix products and convolutions are counted, backwards included, so that the
    figure depends on neither machine nor precision.

    Args:
        model: explained in float32.
        methods: keys, see :func:`~captum_reflected.attr.methods.find_method`.
        image_size: (C, H, W).

    Returns:
        dict[str, float]: by name, without methods that run no forward.
    """
    device = next(model.parameters()).device
    image = torch.randn(1, *image_size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        forward = flops_of(lambda: model(image))
        target = model(image).argmax(dim=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map of a random image may be zero
        found = {}
        for name in methods:
            explain = partial(find_method(name).explain, model, image, target)
            if name.partition(":")[0] not in REFERENCE_METHODS:
                explain()  # the first call checks the model, which later calls need not
            found[name] = flops_of(explain) / forward
    return {name: cost for name, cost in found.items() if cost > 0}


def report(parts: Mapping[str, Results], against: Sequence[str], cost: Mapping[str, float]) -> str:
    """The study's tables in Markdown.

    Args:
        parts: of :func:`halves`, one of them, or all images under the name "all".
        against: methods that the others are compared with.
        cost: of :func:`costs`; may be empty.
    """
    lines = []
    if cost:
        lines += ["| Method | Cost in forwards, by FLOPs |", "| --- | ---: |"]
        lines += [f"| {method_title(name)} | {value:.3g} |" for name, value in cost.items()]
        lines += [""]
    for name, half in parts.items():
        if not half.rows:
            continue
        table, model = means(half), printable(half.settings.model)
        count = sum(row.error is None and not row.skipped for row in half.rows)
        images = f"{count} images" if name == _ALL else f"{count} images for {name}"
        lines += [f"{model}, {images}. {table.caption}, {units(table)}."]
        lines += ["", markdown_table(table), ""]
        for reference in against:
            paired = differences(half, reference)
            if paired is not None:
                lines += [f"{paired.caption}, {units(paired)}.", "", markdown_table(paired), ""]
    return "\n".join(lines)


def figure(results: Results, cost: Mapping[str, float], reference: str) -> Figure:
    """What methods achieve beyond a reference against what they cost, a panel a metric.

    Args:
        results: the images to show.
        cost: of :func:`costs`.
        reference: the method whose scores are subtracted, image by image.

    Returns:
        Figure: one point a method, with 95 % intervals; squares are reference methods.
    """
    metrics = results.metrics
    rows = -(-len(metrics) // _PANELS_A_ROW)
    canvas = Figure(figsize=(13, 3.6 * rows + 1.4), layout="constrained")
    panels = canvas.subplots(rows, _PANELS_A_ROW, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics, strict=False):
        axes.axhline(0, color="gray", linewidth=0.8)
        base = results.scores(reference, metric.key)
        for place, name in enumerate(cost):
            found = interval(100 * (results.scores(name, metric.key) - base))
            if found is not None:
                axes.errorbar(
                    cost[name],
                    found.mean,
                    found.half_width if found.count > 1 else 0,
                    marker="s" if name.partition(":")[0] in REFERENCE_METHODS else "o",
                    fillstyle=("full", "none", "left")[place // _COLOURS % 3],
                    color=line_style(place)[0],
                    linestyle="none",
                    capsize=2,
                    label=printable(method_title(name)),
                )
        axes.set_xscale("log")
        # Controls and baselines may lie tens of points off, the others within a few.
        axes.set_yscale("symlog", linthresh=_LINEAR_TO)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("cost in forwards, by FLOPs")
        axes.set_title(f"{metric.title}: {metric.hint}", fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    canvas.supylabel(
        f"difference to {printable(method_title(reference))}, percentage points", fontsize=10
    )
    shown = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    canvas.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return canvas


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python tools/study.py",
        description="Compares the methods of benchmark runs on choosing and confirming images.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a benchmark's folder")
    parser.add_argument(
        "--methods",
        metavar="NAME,...",
        help="only these, in this order (default: all that the runs have)",
    )
    parser.add_argument(
        "--half",
        choices=(*HALVES, _ALL),
        help="only this half, or all images as one set (default: both halves)",
    )
    parser.add_argument(
        "--against",
        metavar="NAME,...",
        help=f"methods that the others are compared with (default: {','.join(_AGAINST)})",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="of the model, for what methods cost (default: its pretrained ones, downloaded)",
    )
    parser.add_argument(
        "--no-costs", dest="costs", action="store_false", help="leave out what methods cost"
    )
    parser.add_argument("--device", default="auto", help="where costs are counted")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for study.md and study.png"
    )
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except (UsageError, OSError) as error:
        print(f"captum-reflected: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(given: argparse.Namespace) -> int:
    results = merge([read_results(folder) for folder in given.runs])
    known = results.settings.methods
    chosen = [*map(method_key, given.methods.split(","))] if given.methods else list(known)
    against = [*map(method_key, given.against.split(",") if given.against else _AGAINST)]
    for name in chosen:
        if name not in known:
            raise UsageError(f"{name!r} is in none of the runs; wanted: some of {', '.join(known)}")
    for name in against if given.against else ():
        if name not in chosen:
            raise UsageError(
                f"{name!r} is none of the methods; wanted: some of {', '.join(chosen)}"
            )
    against = [name for name in against if name in chosen] or chosen[:1]
    results = replace(results, settings=replace(results.settings, methods=chosen))
    cost: dict[str, float] = {}
    if given.costs:
        try:
            loaded = load_model(
                results.settings.model,
                weights=given.weights,
                device=resolve_device(given.device),
            )
            size = loaded.transform(Image.new("RGB", (512, 512))).shape
            cost = costs(loaded.model, chosen, size)
        except (UnsupportedModelError, ValueError) as error:
            raise UsageError(f"{error}; --no-costs does without the model") from error
    parts = {**halves(results), _ALL: results}
    parts = {name: parts[name] for name in ([given.half] if given.half else HALVES)}
    text = report(parts, against, cost)
    print(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        write_whole(given.output / "study.md", text.encode())
        if cost:
            canvas = figure(list(parts.values())[-1], cost, against[0])
            write_whole(given.output / "study.png", figure_bytes(canvas, "png", dpi=110))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
