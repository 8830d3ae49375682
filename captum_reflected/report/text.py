"""A run in words: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from captum_reflected.report.measures import Measure, format_number, method_title
from captum_reflected.report.results import Failure, Results
from captum_reflected.report.tables import (
    Entry,
    Summary,
    Table,
    accuracy,
    mean_probability,
)


def describe(results: Results) -> list[str]:
    """What a reader must know of a run before its numbers, a sentence each."""
    rows, sentences = results.rows, []
    if results.missing:
        sentences.append(
            f"Unfinished: {len(rows)} of {results.settings.images} images are done; the numbers "
            "rest on those."
        )
    failed = sum(row.error is not None for row in rows)
    if failed:
        sentences.append(f"{_count(failed, 'image')} could not be evaluated.")
    for method in results.settings.methods:
        count = sum(method in row.method_errors for row in rows)
        if count:
            sentences.append(f"{method_title(method)} failed on {_count(count, 'image')}.")
    if results.torn:
        sentences.append(
            f"{_count(results.torn, 'line')} of the results could not be read and "
            f"{'was' if results.torn == 1 else 'were'} left out, as a stopped run leaves them."
        )
    if results.unread_examples:
        sentences.append(
            f"{_count(len(results.unread_examples), 'gallery file')} could not be read: "
            f"{', '.join(results.unread_examples[:5])}."
        )
    return sentences


def verdict(paired: Table) -> str:
    """What the paired differences say of ReflectedRelevance, or of the first method."""
    method = next((key for key in paired.rows if key == "reflected"), next(iter(paired.rows)))
    named: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for entry, measure in zip(paired.rows[method], paired.measures, strict=True):
        if entry.interval is not None and entry.mark != "differs":
            named[entry.mark or "undecided"].append(measure.title)
    parts = [f"{word} in {', '.join(titles)}" for word, titles in named.items() if titles]
    return (
        f"{method_title(method)} against {method_title(paired.reference or '')}: "
        f"{'; '.join(parts) or 'nothing to compare'}."
    )


def markdown_report(summary: Summary, *, failures_shown: int = 20) -> str:
    """Both tables and all that must be said with them, in Markdown."""
    results, paired = summary.results, summary.paired
    settings = results.settings
    done = f"{len(results.rows)} of {settings.images} images"
    lines = [
        f"# {escape_markdown(settings.model)} on {escape_markdown(settings.data)}: {done}",
        "",
    ]
    for sentence in describe(results):
        lines += [f"**{escape_markdown(sentence)}**", ""]
    lines += [sentence + "\n" for sentence in _model_sentences(results)]
    if paired is not None:
        lines += [escape_markdown(verdict(paired)), ""]
    for table in (summary.means, paired):
        if table is not None:
            lines += [escape_markdown(f"{table.caption}, {units(table)}."), ""]
            lines += [markdown_table(table), ""]
            lines += [reading(table), ""]
    failures = results.failures
    if failures:
        lines += [f"Failures ({len(failures)}):", ""]
        lines += [
            f"- {escape_markdown(failure.file)}{_of_method(failure)}: "
            f"{escape_markdown(failure.reason)}"
            for failure in failures[:failures_shown]
        ]
        if len(failures) > failures_shown:
            lines.append(f"- and {len(failures) - failures_shown} more, in failures.csv")
        lines.append("")
    return "\n".join(lines)


def units(table: Table) -> str:
    """What the numbers of a table are in."""
    others = [measure.title for measure in table.measures if not measure.percent]
    if not others:
        return "in percent"
    return f"in percent except {', '.join(others)}"


def reading(table: Table) -> str:
    """How a table is to be read."""
    if table.reference is None:
        return (
            "Bold: the best mean of a column. ↓: low is better, ↑: high is better. Where the "
            "number of images differs between methods, so do the images; the paired "
            "differences do not have that flaw."
        )
    return (
        "Better, worse: the interval excludes zero. About one in twenty does so by chance "
        "where nothing differs."
    )


def _model_sentences(results: Results) -> list[str]:
    found, sure = accuracy(results), mean_probability(results)
    sentences = []
    if found is not None:
        sentences.append(
            f"Top-1 accuracy of the model: {found.mean:.1%} of the {found.count} images whose "
            "label is known."
        )
    if sure is not None:
        sentences.append(f"Mean probability of the explained class: {sure.mean:.1%}.")
    return sentences


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    head = [f"{escape_markdown(m.title)} {m.arrow}".strip() for m in table.measures]
    body = [
        [
            escape_markdown(method_title(method)),
            *(
                _markdown_entry(entry, measure, signed=table.reference is not None)
                for entry, measure in zip(entries, table.measures, strict=True)
            ),
        ]
        for method, entries in table.rows.items()
    ]
    cells = [["Method", *head], *body, ["Images", *table.counts()]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    padded = [
        [
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))


def _markdown_entry(entry: Entry, measure: Measure, *, signed: bool) -> str:
    if entry.interval is None:
        return "–"
    text = format_number(entry.interval.mean, measure, signed=signed)
    if entry.mark == "best":
        text = f"**{text}**"
    if entry.interval.half_width is not None:
        text += f" ± {format_number(entry.interval.half_width, measure)}"
    return text if entry.mark in ("", "best") else f"{text} ({entry.mark})"


def csv_table(table: Table) -> str:
    """A table as CSV, one line for each method and measure, at full precision."""
    rows: list[list[object]] = []
    for method, entries in table.rows.items():
        for entry, measure in zip(entries, table.measures, strict=True):
            scale = 100 if measure.percent else 1
            found = entry.interval
            half = None if found is None else found.half_width
            rows.append(
                [
                    printable(method),
                    *([] if table.reference is None else [printable(table.reference)]),
                    printable(measure.key),
                    "percent" if measure.percent else "",
                    "" if found is None else scale * found.mean,
                    "" if half is None else scale * half,
                    0 if found is None else found.count,
                    entry.mark,
                ]
            )
    reference = [] if table.reference is None else ["reference"]
    value = "mean" if table.reference is None else "difference"
    head = ["method", *reference, "metric", "unit", value, "half_width", "images", "mark"]
    return _csv([head, *rows])


def csv_failures(failures: Iterable[Failure]) -> str:
    """All failures as CSV; ``method`` is empty where the whole image failed."""
    return _csv(
        [
            ["index", "file", "method", "reason"],
            *(
                [f.index, printable(f.file), printable(f.method or ""), printable(f.reason)]
                for f in failures
            ),
        ]
    )


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def printable(text: str) -> str:
    """A text on one line that every file and terminal takes, what it cannot show escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def escape_markdown(text: str) -> str:
    """A text that Markdown shows as it is, in a table too."""
    escaped = re.sub(r"([\\`*\[\]<>|~&#])", r"\\\1", printable(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)


def _of_method(failure: Failure) -> str:
    return "" if failure.method is None else f" ({escape_markdown(method_title(failure.method))})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
