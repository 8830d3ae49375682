"""Means and paired differences of a run, with their confidence intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captum_reflected.attr.methods import find_method
from captum_reflected.metrics import MeanInterval, mean_interval
from captum_reflected.metrics.registry import Metric
from captum_reflected.report.results import Failure, Results
from captum_reflected.visualization.text import printable

# The method that the paper sets out to improve.
_REFERENCE = "transformer_attribution"


@dataclass(frozen=True)
class Entry:
    """One cell: its interval, if any image has a value, and "best", "better", "worse", "differs"
    or nothing.
    """

    interval: MeanInterval | None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Methods against metrics.

    Attributes:
        caption: what it shows.
        metrics: the columns.
        rows: method to one entry a column.
        reference: the method that the others are compared with; None for a table of means.
    """

    caption: str
    metrics: tuple[Metric, ...]
    rows: Mapping[str, tuple[Entry, ...]]
    reference: str | None = None

    def counts(self) -> list[str]:
        """The number of images that each column rests on, "from-to" where methods differ."""
        texts = []
        for column in zip(*self.rows.values(), strict=True):
            found = [0 if entry.interval is None else entry.interval.count for entry in column]
            texts.append("–".join(str(n) for n in dict.fromkeys((min(found), max(found)))))
        return texts

    def format(self, entry: Entry, metric: Metric) -> tuple[str, str]:
        """The mean and the half-width of a cell; "" where a single value has no interval."""
        found = entry.interval
        if found is None:
            return "–", ""
        half_width = metric.format(found.half_width) if found.count > 1 else ""
        return metric.format(found.mean, signed=self.reference is not None), half_width


@dataclass(frozen=True)
class Summary:
    """A run and its two tables; ``paired`` is None for a run of one method."""

    results: Results
    means: Table
    paired: Table | None


def summarize(results: Results) -> Summary:
    """All statistics of a run, which every form of the report shows."""
    return Summary(results, means(results), differences(results))


def interval(values: npt.ArrayLike) -> MeanInterval | None:
    """The mean with its 95 % interval, NaN left out; None where no value is left."""
    array = np.asarray(values, dtype=float)
    array = array[~np.isnan(array)]
    return mean_interval(array) if len(array) else None


def excludes_zero(found: MeanInterval) -> bool:
    """Whether zero lies outside the interval. Values without any spread do not tell."""
    return 0 < found.half_width < abs(found.mean)


def method_title(method: str) -> str:
    """The method's name in tables and figures."""
    try:
        return find_method(method).title
    except ValueError:  # of another version
        return method


def means(results: Results) -> Table:
    """Every method's mean of every metric, the best marked."""
    methods, metrics = results.settings.methods, results.metrics
    columns = [
        _marked([interval(results.scores(method, metric.key)) for method in methods], metric)
        for metric in metrics
    ]
    rows = dict(zip(methods, zip(*columns, strict=True), strict=True))
    return Table("Mean over images ± half-width of its 95 % interval", metrics, rows)


def _marked(column: Sequence[MeanInterval | None], metric: Metric) -> list[Entry]:
    """A column of means, with "best" at all that read like the best one."""
    # Means over fewer images are of other images, and not compared.
    most = max((found.count for found in column if found is not None), default=0)
    compared = [found.mean for found in column if found is not None and found.count == most]
    best = None
    if len(compared) > 1 and metric.low_is_good is not None:
        best = metric.format(min(compared) if metric.low_is_good else max(compared))
    return [
        Entry(found, "best" if found is not None and metric.format(found.mean) == best else "")
        for found in column
    ]


def differences(results: Results, reference: str | None = None) -> Table | None:
    """Every method less the reference, on the images where both have a value.

    Args:
        results: a run.
        reference: one of its methods; None takes TransformerAttribution, or the first.

    Returns:
        Table: or None for a run of one method.
    """
    methods = results.settings.methods
    if len(methods) < 2:
        return None
    if reference is None:
        reference = _REFERENCE if _REFERENCE in methods else methods[0]
    rows = {
        method: tuple(difference(results, method, reference, one) for one in results.metrics)
        for method in methods
        if method != reference
    }
    caption = (
        f"Difference to {method_title(reference)} on the same images, mean ± half-width of its "
        "95 % interval"
    )
    return Table(caption, results.metrics, rows, reference)


def difference(results: Results, method: str, reference: str, metric: Metric) -> Entry:
    """A method less another one, on the images where both have a value."""
    found = interval(results.scores(method, metric.key) - results.scores(reference, metric.key))
    if found is None or not excludes_zero(found):
        return Entry(found)
    if metric.low_is_good is None:
        return Entry(found, "differs")
    return Entry(found, "better" if (found.mean < 0) == metric.low_is_good else "worse")


def accuracy(results: Results) -> MeanInterval | None:
    """Top-1 accuracy on the images whose label is known."""
    return interval(
        [
            float(row.prediction == row.label)
            for row in results.rows
            if row.label is not None and row.prediction is not None
        ]
    )


def mean_probability(results: Results) -> MeanInterval | None:
    """Mean probability of the explained class."""
    return interval([row.probability for row in results.rows if row.probability is not None])


def csv_table(table: Table) -> str:
    """A table as CSV, one line for each method and metric, at full precision."""
    compared = [] if table.reference is None else [table.reference]
    head = ["method", *(["reference"] if compared else []), "metric", "unit"]
    head += ["difference" if compared else "mean", "half_width", "images", "mark"]
    lines: list[Sequence[object]] = [head]
    for method, entries in table.rows.items():
        for entry, metric in zip(entries, table.metrics, strict=True):
            scale = 100 if metric.percent else 1
            found = entry.interval
            numbers: list[object] = ["", "", 0]
            if found is not None:
                half_width = scale * found.half_width if found.count > 1 else ""
                numbers = [scale * found.mean, half_width, found.count]
            unit = "percent" if metric.percent else ""
            lines.append([method, *compared, metric.key, unit, *numbers, entry.mark])
    return _csv(lines)


def csv_failures(failures: Iterable[Failure]) -> str:
    """All failures as CSV; ``method`` is empty where the whole image failed."""
    lines: list[Sequence[object]] = [("index", "file", "method", "reason")]
    lines += [(f.index, f.file, f.method or "", f.reason) for f in failures]
    return _csv(lines)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [printable(cell) if isinstance(cell, str) else cell for cell in line] for line in lines
    )
    return text.getvalue()
