"""What a run's scores come to: means and paired differences, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captum_reflected.metrics import mean_interval
from captum_reflected.report.measures import Measure, format_number, measures, method_title
from captum_reflected.report.results import Results

CONFIDENCE = 0.95

# The method that the paper sets out to improve.
_REFERENCE = "transformer_attribution"


@dataclass(frozen=True)
class Interval:
    """A mean, and how sure it is.

    Attributes:
        mean: of all values.
        half_width: of the interval around it; None for a single value.
        count: how many values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside. Values without any spread do not tell."""
        return bool(self.half_width) and abs(self.mean) > (self.half_width or 0)


@dataclass(frozen=True)
class Entry:
    """One cell: its interval, if any image has a value, and "best", "better", "worse", "differs"
    or nothing.
    """

    interval: Interval | None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Methods against measures.

    Attributes:
        caption: what it shows.
        measures: the columns.
        rows: method to one entry a column.
        reference: the method that the others are compared with; None for a table of means.
    """

    caption: str
    measures: tuple[Measure, ...]
    rows: Mapping[str, tuple[Entry, ...]]
    reference: str | None = None

    def counts(self) -> list[str]:
        """The number of images that each column rests on, "from-to" where methods differ."""
        texts = []
        for column in range(len(self.measures)):
            entries = [row[column].interval for row in self.rows.values()]
            found = sorted({0 if entry is None else entry.count for entry in entries})
            texts.append("–".join(str(n) for n in dict.fromkeys((found[0], found[-1]))))
        return texts


@dataclass(frozen=True)
class Summary:
    """A run and its two tables; ``paired`` is None for a run of one method."""

    results: Results
    means: Table
    paired: Table | None


def summarize(results: Results) -> Summary:
    """All statistics of a run, which every form of the report shows."""
    return Summary(results, means(results), differences(results))


def interval(values: npt.ArrayLike, confidence: float = CONFIDENCE) -> Interval | None:
    """The mean with Student's t interval; NaN is left out.

    Args:
        values: one an image.
        confidence: of the interval.

    Returns:
        Interval: or None where no value is left.
    """
    array = np.asarray(values, dtype=float)
    array = array[~np.isnan(array)]
    if len(array) == 0:
        return None
    found = mean_interval(array, confidence=confidence)
    return Interval(found.mean, found.half_width if found.count > 1 else None, found.count)


def means(results: Results) -> Table:
    """Every method's mean of every measure, the best marked."""
    columns = measures(results)
    intervals = {
        method: [interval(results.scores(method, measure.key)) for measure in columns]
        for method in results.settings.methods
    }
    best = [
        _best([row[column] for row in intervals.values()], measure)
        for column, measure in enumerate(columns)
    ]
    rows = {
        method: tuple(
            Entry(entry, "best" if _is_shown_as(entry, best[column], columns[column]) else "")
            for column, entry in enumerate(row)
        )
        for method, row in intervals.items()
    }
    return Table("Mean over images ± half-width of its 95 % interval", columns, rows)


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
    columns = measures(results)
    rows = {
        method: tuple(_difference(results, method, reference, measure) for measure in columns)
        for method in methods
        if method != reference
    }
    caption = (
        f"Difference to {method_title(reference)} on the same images, mean ± half-width of its "
        "95 % interval"
    )
    return Table(caption, columns, rows, reference)


def _best(entries: Sequence[Interval | None], measure: Measure) -> float | None:
    # Of methods that saw fewer images, who knows.
    most = max((entry.count for entry in entries if entry is not None), default=0)
    found = [entry.mean for entry in entries if entry is not None and entry.count == most]
    if len(found) < 2 or measure.low_is_good is None:
        return None
    return min(found) if measure.low_is_good else max(found)


def _is_shown_as(entry: Interval | None, best: float | None, measure: Measure) -> bool:
    """Whether it reads like the best: two equal numbers are not told apart by a mark."""
    if entry is None or best is None:
        return False
    return format_number(entry.mean, measure) == format_number(best, measure)


def _difference(results: Results, method: str, reference: str, measure: Measure) -> Entry:
    entry = interval(results.scores(method, measure.key) - results.scores(reference, measure.key))
    if entry is None or not entry.excludes_zero:
        return Entry(entry)
    if measure.low_is_good is None:
        return Entry(entry, "differs")
    return Entry(entry, "better" if (entry.mean < 0) == measure.low_is_good else "worse")


def accuracy(results: Results) -> Interval | None:
    """Top-1 accuracy on the images whose label is known."""
    return interval(
        [
            float(row.prediction == row.label)
            for row in results.rows
            if row.error is None and row.label is not None and row.prediction is not None
        ]
    )


def mean_probability(results: Results) -> Interval | None:
    """Mean probability of the explained class."""
    return interval(
        [
            row.probability
            for row in results.rows
            if row.error is None and row.probability is not None
        ]
    )
