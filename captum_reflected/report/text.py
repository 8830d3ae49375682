"""A run in words, which the page and the Markdown report share."""

from __future__ import annotations

from captum_reflected.report.results import Results
from captum_reflected.report.tables import Table, method_title


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


def verdict(paired: Table) -> str:
    """What the paired differences show of ReflectedRelevance, or of the first method."""
    method = next((key for key in paired.rows if key == "reflected"), next(iter(paired.rows)))
    same = "no significant difference"
    named: dict[str, list[str]] = {"better": [], "worse": [], same: []}
    for entry, metric in zip(paired.rows[method], paired.metrics, strict=True):
        if entry.interval is not None and entry.mark != "differs":
            named[entry.mark or same].append(metric.title)
    parts = [f"{word} in {', '.join(titles)}" for word, titles in named.items() if titles]
    return (
        f"{method_title(method)} against {method_title(paired.reference or '')}: "
        f"{'; '.join(parts) or 'nothing to compare'}."
    )


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
