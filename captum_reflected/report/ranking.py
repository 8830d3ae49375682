"""Which methods of a run the report puts first: in its headline, and in colour among the curves."""

from __future__ import annotations

from collections.abc import Sequence

from captum_reflected.report.tables import Entry, Summary, Table

MOST_EMPHASISED = 6
_PAPERS_METHOD = "reflected_relevance"


def mean_ranks(means: Table) -> dict[str, float]:
    """Every method's mean rank over all metrics that have a direction, the best method first.

    In each metric, methods with equal means share the mean of their ranks. A method whose mean
    is over fewer images than another's is last in that metric, since it is of other images.

    Args:
        means: the mean of every method and metric.

    Returns:
        dict[str, float]: empty if no metric has a direction. Methods of the same mean rank are
        in the order of the run.
    """
    columns = zip(*means.rows.values(), strict=True)
    ranks = [
        _ranks(column, metric.low_is_good)
        for column, metric in zip(columns, means.metrics, strict=True)
        if metric.low_is_good is not None
    ]
    if not ranks:
        return {}
    found = {
        method: sum(column[place] for column in ranks) / len(ranks)
        for place, method in enumerate(means.rows)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _ranks(column: Sequence[Entry], low_is_good: bool) -> list[float]:
    counts = [0 if entry.interval is None else entry.interval.count for entry in column]
    sign = 1 if low_is_good else -1
    values = [
        sign * entry.interval.mean if entry.interval is not None and count == max(counts) else None
        for entry, count in zip(column, counts, strict=True)
    ]
    found = [value for value in values if value is not None]
    return [
        float(len(values))
        if value is None
        else 1 + sum(other < value for other in found) + (found.count(value) - 1) / 2
        for value in values
    ]


def emphasised_methods(summary: Summary) -> list[str]:
    """The methods whose curves are in colour, at most :data:`MOST_EMPHASISED`, in the run's order.

    These are all methods if there are no more; else the reference of the paired differences, the
    paper's method, and the best of the others by their mean rank.
    """
    methods = summary.means.rows
    reference = summary.paired.reference if summary.paired else None
    first = [method for method in (reference, _PAPERS_METHOD) if method in methods]
    by_rank = [*first, *mean_ranks(summary.means), *methods]
    chosen = list(dict.fromkeys(by_rank))[:MOST_EMPHASISED]
    return [method for method in methods if method in chosen]
