"""A run in words, which the page and the Markdown report share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath

from captum_reflected.benchmark.settings import Settings
from captum_reflected.report.ranking import mean_ranks
from captum_reflected.report.results import Results
from captum_reflected.report.tables import Summary, Table, difference, method_title

_SPLITS = {"train", "val", "valid", "validation", "test"}
_METRICS_NAMED = 4

CLEARLY = "Clearly: the 95 % interval of the paired difference excludes zero."
"""What the word means in :func:`verdict`."""


def describe(results: Results) -> list[str]:
    """What a reader must know of a run before its numbers, a sentence each."""
    rows, sentences = results.rows, []
    if results.missing:
        sentences.append(
            f"Unfinished: {len(rows)} of {results.settings.images} images are done; the numbers "
            "are for these images only."
        )
    failed = sum(row.error is not None for row in rows)
    if failed:
        sentences.append(f"{_count(failed, 'image')} could not be evaluated.")
    skipped = sum(row.skipped for row in rows)
    if skipped:
        sentences.append(
            f"{_count(skipped, 'image')} {'was' if skipped == 1 else 'were'} skipped because the "
            "model does not predict the label; the scores are for the other images."
        )
    for method in results.settings.methods:
        count = sum(method in row.method_errors for row in rows)
        if count:
            sentences.append(f"{method_title(method)} failed on {_count(count, 'image')}.")
    if results.torn:
        sentences.append(
            f"{_count(results.torn, 'line')} of the results could not be read and "
            f"{'was' if results.torn == 1 else 'were'} skipped, as happens if a run is stopped."
        )
    if results.unread_examples:
        sentences.append(
            f"{_count(len(results.unread_examples), 'gallery file')} could not be read: "
            f"{', '.join(results.unread_examples[:5])}."
        )
    return sentences


def run_title(settings: Settings) -> str:
    """The model and the data of a run; of folders elsewhere in the file system, only the name."""
    return f"{_short(settings.model)} on {_short(settings.data['name'])}"


def _short(name: str) -> str:
    path = PureWindowsPath(name) if PureWindowsPath(name).drive else PurePosixPath(name)
    if not (path.is_absolute() or path.parts[:1] in (("~",), ("..",))):
        return name
    # The name of a part of a data set says nothing without that of the data set.
    parts = [part for part in path.parts[1:] if part != ".."]
    return "/".join(parts[-2:] if parts and parts[-1].lower() in _SPLITS else parts[-1:]) or name


def verdict(summary: Summary) -> str | None:
    """What is better than what: the first method by mean rank, the reference and the second.

    Returns:
        str: or None if there are less than two methods, or no metric has a direction.
    """
    ranks = mean_ranks(summary.means)
    if len(ranks) < 2 or summary.paired is None or summary.paired.reference is None:
        return None
    first, second = list(ranks)[:2]
    reference = summary.paired.reference
    judged = [metric for metric in summary.means.metrics if metric.low_is_good is not None]
    over = judged[0].title if len(judged) == 1 else f"the {len(judged)} metrics"
    leaders = [method for method, rank in ranks.items() if rank == ranks[first]]
    if len(leaders) > 1:
        sentences = [f"{_listed(map(method_title, leaders))} share the best mean rank over {over}."]
    else:
        sentences = [f"{method_title(first)} has the best mean rank over {over}."]
    subject = "it" if len(leaders) == 1 else method_title(first)
    for other in dict.fromkeys([reference, second]):
        if other != first:
            second_one = ", the second," if other == second and len(leaders) == 1 else ","
            sentences.append(
                f"Compared with {method_title(other)}{second_one} {subject} is "
                f"{_relation(summary, first, other)}."
            )
    return " ".join(sentences)


def _relation(summary: Summary, method: str, other: str) -> str:
    """In which metrics a method is clearly better and worse than another one."""
    named: dict[str, list[str]] = {"better": [], "worse": []}
    judged = [metric for metric in summary.means.metrics if metric.low_is_good is not None]
    for metric in judged:
        mark = difference(summary.results, method, other, metric).mark
        if mark in named:
            named[mark].append(metric.title)
    better, worse = (_counted(titles, len(judged)) for titles in named.values())
    if better:
        return f"clearly better in {better} and worse in {worse or 'none'}"
    if worse:
        return f"clearly worse in {worse} and better in none"
    return "neither clearly better nor clearly worse in any metric"


def _counted(titles: Sequence[str], total: int) -> str:
    """Metrics as a part of all metrics; "" for none."""
    if not titles or total == 1:
        return "".join(titles)
    if len(titles) == total:
        return f"all {total}"
    shown = list(titles[:_METRICS_NAMED])
    if len(titles) > len(shown):
        shown.append(f"{len(titles) - len(shown)} more")
    return f"{len(titles)} ({_listed(shown)})"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def colours(summary: Summary, emphasised: Sequence[str]) -> str | None:
    """Which curves are in colour and why; None if all are."""
    methods = summary.means.rows
    if len(emphasised) == len(methods):
        return None
    reasons = {
        summary.paired.reference if summary.paired else None: "the reference of the differences",
        "reflected_relevance": "the method of Sago & Hotta",
    }
    first = [f"{method_title(one)} ({reasons[one]})" for one in emphasised if one in reasons]
    best = f"the {len(emphasised) - len(first)} others with the best mean rank over all metrics"
    return f"In colour: {_listed([*first, best])}."


def units(table: Table) -> str:
    """What the numbers of a table are in."""
    others = [metric.title for metric in table.metrics if not metric.percent]
    if not others:
        return "in percent"
    return f"in percent except {', '.join(others)}"


def reading(table: Table) -> str:
    """How a table is to be read."""
    if table.reference is None:
        return (
            "Bold: the best mean of a column. ↓: low is better, ↑: high is better. If the number "
            "of images differs between methods, their means are over different images; only the "
            "paired differences compare methods on the same images."
        )
    return (
        "Better, worse: the interval excludes zero. Without any true difference, about one "
        "interval in twenty excludes zero by chance."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
