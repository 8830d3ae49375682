"""A run as one web page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from captum_reflected import __version__
from captum_reflected.report.figures import (
    Curves,
    curve_panel,
    example_label,
    gallery_methods,
    heat_jpeg,
    picture_jpeg,
    save,
)
from captum_reflected.report.measures import Measure, format_number, measures, method_title
from captum_reflected.report.results import Example, Results
from captum_reflected.report.tables import (
    Entry,
    Summary,
    Table,
    accuracy,
    mean_probability,
)
from captum_reflected.report.text import describe, printable, reading, units, verdict
from captum_reflected.visualization.curves import DARK, LIGHT, Theme, line_style

_FAILURES_SHOWN = 100
_HEADER_VALUES_SHOWN = 5

# More columns than these get narrower, so that a wide window shows them all.
_ROOMY_COLUMNS = 6


def html_page(summary: Summary, curves: Curves, examples: Sequence[Example]) -> str:
    """The page.

    Args:
        summary: of a run.
        curves: of the same run.
        examples: the images of its gallery that are shown.

    Returns:
        str: HTML in which everything that the run holds is escaped.
    """
    results, scores, paired = summary.results, summary.means, summary.paired
    settings = results.settings
    title = f"{settings.model} on {settings.data}"
    parts = [
        _header(results, paired, title),
        _section("Scores", _table(scores)),
        _section("Paired differences", _table(paired)) if paired is not None else "",
        _curves(curves, scores),
        _gallery(results, examples),
        _failures(results),
        _definitions(results),
        _settings(results),
    ]
    style = resources.files("captum_reflected.report").joinpath("page.css").read_text("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # An icon of its own, so that no browser asks a server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}: attribution benchmark</title>\n<style>\n{style}</style>\n"
        f"</head>\n<body>\n<main>\n{''.join(parts)}</main>\n"
        f"<footer>captum_reflected {_text(__version__)}</footer>\n</body>\n</html>\n"
    )


def _header(results: Results, paired: Table | None, title: str) -> str:
    notices = "".join(f"<li>{_text(sentence)}</li>" for sentence in describe(results))
    facts = [
        ("Images", f"{len(results.rows):,}", f"of {results.settings.images:,}"),
        ("Methods", str(len(results.settings.methods)), ""),
    ]
    found, sure = accuracy(results), mean_probability(results)
    if found is not None:
        facts.append(("Top-1 accuracy", f"{found.mean:.1%}", f"{found.count:,} labelled"))
    if sure is not None:
        facts.append(("Mean probability", f"{sure.mean:.1%}", "of the explained class"))
    tiles = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)} <small>{_text(note)}</small></dd></div>"
        for name, value, note in facts
    )
    lead = "" if paired is None else f'<p class="lead">{_text(verdict(paired))}</p>\n'
    return (
        f'<header>\n<p class="eyebrow">Attribution benchmark</p>\n<h1>{_text(title)}</h1>\n'
        + (f'<ul class="notices">{notices}</ul>\n' if notices else "")
        + f'{lead}<dl class="facts">{tiles}</dl>\n</header>\n'
    )


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col">{_text(measure.title)}{_arrow(measure)}</th>'
        for measure in table.measures
    )
    body = "".join(
        f'<tr><th scope="row">{_name(method_title(method))}</th>'
        + "".join(
            _cell(entry, measure, signed=table.reference is not None)
            for entry, measure in zip(entries, table.measures, strict=True)
        )
        + "</tr>\n"
        for method, entries in table.rows.items()
    )
    counts = "".join(f"<td>{_text(count)}</td>" for count in table.counts())
    caption = f"{table.caption}, {units(table)}."
    dense = ' class="dense"' if len(table.measures) > _ROOMY_COLUMNS else ""
    return (
        _scrolling(
            f"<table{dense}>\n<caption><span>{_text(caption)}</span></caption>\n"
            f'<thead><tr><th scope="col">Method</th>{heads}</tr></thead>\n'
            f"<tbody>\n{body}</tbody>\n"
            f'<tfoot><tr><th scope="row">Images</th>{counts}</tr></tfoot>\n</table>',
            caption,
        )
        + f'<p class="note">{_text(reading(table))}</p>\n'
    )


def _arrow(measure: Measure) -> str:
    if not measure.arrow:
        return ""
    return (
        f'&nbsp;<span class="arrow" aria-hidden="true">{measure.arrow}</span>'
        f'<span class="spoken"> ({measure.hint})</span>'
    )


def _cell(entry: Entry, measure: Measure, *, signed: bool) -> str:
    found = entry.interval
    if found is None:
        return "<td>–</td>"
    number = _text(format_number(found.mean, measure, signed=signed))
    half = (
        ""
        if found.half_width is None
        else f' <span class="half">±&nbsp;{_text(format_number(found.half_width, measure))}</span>'
    )
    if entry.mark == "best":
        return f'<td class="best"><strong>{number}</strong>{half}</td>'
    mark = f' <span class="mark {entry.mark}">{entry.mark}</span>' if entry.mark else ""
    return f"<td>{number}{half}{mark}</td>"


def _curves(curves: Curves, scores: Table) -> str:
    if not curves.measures:
        return ""
    panels = "".join(
        f"<figure>\n<figcaption>{_text(measure.title)}{_arrow(measure)} "
        f'<span class="half" aria-hidden="true">{measure.hint}</span></figcaption>\n'
        f"<picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_panel(curves, measure, DARK)}">'
        f'<img src="{_panel(curves, measure, LIGHT)}" width="410" height="330" '
        f'alt="{_text(_curve_alt(scores, measure))}"></picture>\n</figure>\n'
        for measure in curves.measures
    )
    legend = "".join(
        f'<li><svg width="40" height="10" aria-hidden="true"><line x1="1" y1="5" x2="39" y2="5" '
        f'stroke="{color}" stroke-width="2.5" '
        f'stroke-dasharray="{" ".join(f"{2 * dash:g}" for dash in dashes) or "none"}"/></svg>'
        f"{_text(method_title(method))}</li>"
        for place, method in enumerate(curves.results.settings.methods)
        for color, dashes in [line_style(place)]
    )
    return _section(
        "Curves",
        f'<ul class="legend">{legend}</ul>\n<div class="panels">\n{panels}</div>\n'
        '<p class="note">Mean over images; bands are 95 % intervals of the mean, point by '
        "point. The scores are the areas under these curves.</p>\n",
    )


def _panel(curves: Curves, measure: Measure, theme: Theme) -> str:
    return _data_uri(save(curve_panel(curves, measure, theme), "svg"), "image/svg+xml")


def _curve_alt(scores: Table, measure: Measure) -> str:
    column = scores.measures.index(measure)
    areas = [
        f"{method_title(method)} {format_number(found.mean, measure)}"
        for method, entries in scores.rows.items()
        if (found := entries[column].interval) is not None
    ]
    return f"{measure.title} curves; area in percent: {', '.join(areas)}"


def _gallery(results: Results, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    methods = gallery_methods(results, examples)
    has_masks = any(example.mask is not None for example in examples)
    names = ["Image", *(["Object"] if has_masks else []), *methods.values()]
    heads = "".join(f'<th scope="col">{_name(name)}</th>' for name in names)
    rows = "".join(
        "<tr>" + "".join(_gallery_row(example, methods, has_masks)) + "</tr>\n"
        for example in examples
    )
    total = len(results.gallery)
    some = "" if total == len(examples) else f" The first {len(examples)} of {total} kept images."
    caption = f"Lit where a map is high.{some}"
    return _section(
        "Gallery",
        _scrolling(
            f'<table class="gallery">\n<caption><span>{caption}</span></caption>\n'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>",
            "Gallery",
        ),
    )


def _gallery_row(example: Example, methods: Mapping[str, str], has_masks: bool) -> Iterable[str]:
    label = example_label(example)
    yield (
        f'<th scope="row">{_image(picture_jpeg(example.picture), f"image {example.index}", "")}'
        f"<span>{_text(label, lines=True)}</span>"
        + (
            f'<span class="half">explained: {_text(example.target)}</span>'
            if example.target != example.prediction
            else ""
        )
        + "</th>"
    )
    if has_masks:
        if example.mask is None:
            yield "<td>–</td>"
        else:
            pixels = example.mask.astype(np.uint8) * 255
            yield f"<td>{_image(picture_jpeg(pixels), 'mask of the object', label)}</td>"
    for method, title in methods.items():
        if method in example.maps:
            yield f"<td>{_image(heat_jpeg(example, method), f'map of {title}', label)}</td>"
        else:
            yield '<td><span class="half">no map</span></td>'


def _image(data: bytes, what: str, label: str) -> str:
    alt = _text(f"{what}: {label}" if label else what)
    return f'<img src="{_data_uri(data, "image/jpeg")}" alt="{alt}">'


def _failures(results: Results) -> str:
    failures = results.failures
    if not failures:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_text(failure.file)}</th>'
        f"<td>{'all' if failure.method is None else _name(method_title(failure.method))}</td>"
        f"<td>{_text(failure.reason)}</td></tr>\n"
        for failure in failures[:_FAILURES_SHOWN]
    )
    more = len(failures) - _FAILURES_SHOWN
    caption = "Not scored, and why" + (f"; {more} more are in failures.csv" if more > 0 else "")
    return _section(
        f"Failures ({len(failures)})",
        _scrolling(
            f'<table class="words">\n<caption><span>{caption}</span></caption>\n'
            '<thead><tr><th scope="col">File</th><th scope="col">Method</th>'
            f'<th scope="col">Reason</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table>',
            "Failures",
        ),
    )


def _definitions(results: Results) -> str:
    entries = "".join(
        f"<div><dt>{_text(measure.title)}{_arrow(measure)}</dt><dd>{_text(measure.meaning)} "
        f"<cite>{_text(measure.source)}</cite></dd></div>\n"
        for measure in measures(results)
    )
    return _section("What is measured", f'<dl class="meanings">\n{entries}</dl>\n')


def _settings(results: Results) -> str:
    settings = [(key, [value]) for key, value in _flat(results.settings.entries)]
    environment: dict[str, list[str]] = {}
    for header in results.headers:
        for key, value in _flat(header):
            known = environment.setdefault(key.removeprefix("environment."), [])
            if value not in known:
                known.append(value)
    listed = _list("Settings", settings) + _list("Environment", list(environment.items()))
    return _section("What was run", f'<div class="lists">\n{listed}</div>\n')


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """All leaves of nested settings, by dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, str(value)


def _list(title: str, entries: Sequence[tuple[str, Sequence[str]]]) -> str:
    if not entries:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_values(values)}</td></tr>\n'
        for name, values in entries
    )
    return f'<table class="list">\n<caption>{title}</caption>\n<tbody>\n{rows}</tbody>\n</table>\n'


def _values(values: Sequence[str]) -> str:
    """Values of several processes, a line each."""
    shown = [_text(value) for value in values[:_HEADER_VALUES_SHOWN]]
    if len(values) > len(shown):
        shown.append(f"and {len(values) - len(shown)} more")
    return "<br>".join(shown)


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}</section>\n"


def _scrolling(content: str, name: str) -> str:
    """Content that scrolls by itself where it is wider than the page, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(name)}">\n'
        f"{content}\n</div>\n"
    )


def _text(text: str, *, lines: bool = False) -> str:
    """A text of the run, or of ours, as HTML."""
    if lines:
        return "<br>".join(map(_text, text.split("\n")))
    return escape(printable(text))


def _name(text: str) -> str:
    """A text that may break inside CamelCase."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", _text(text))


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
