"""A run as a web page that needs nothing else (no network, script or font), and as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from markupsafe import Markup

from captum_reflected import __version__
from captum_reflected.report import drawing
from captum_reflected.report.figures import (
    example_label,
    gallery_methods,
    heat_jpeg,
    picture_jpeg,
)
from captum_reflected.report.ranking import emphasised_methods
from captum_reflected.report.results import Example
from captum_reflected.report.tables import (
    Entry,
    Summary,
    Table,
    accuracy,
    mean_probability,
    method_title,
)
from captum_reflected.report.text import (
    CLEARLY,
    colours,
    describe,
    reading,
    run_title,
    units,
    verdict,
)
from captum_reflected.visualization.curves import CurvePanel, curve_limits, line_style
from captum_reflected.visualization.text import printable
from captum_reflected.visualization.web_pages import page_style, percent, template_environment

_FAILURES_SHOWN = {"page.html.jinja": 100, "report.md.jinja": 20}
_PACKAGE = "captum_reflected.report"


def html_page(
    summary: Summary, curves: Mapping[str, CurvePanel], examples: Sequence[Example]
) -> str:
    """The page.

    Args:
        summary: of a run.
        curves: of the same run, from :func:`~captum_reflected.report.figures.mean_curves`.
        examples: the images of its gallery that are shown.

    Returns:
        str: HTML in which everything that the run holds is escaped.
    """
    results = summary.results

    environment: dict[str, list[str]] = {}
    for header in results.headers:
        for key, value in _flat(header):
            known = environment.setdefault(key.removeprefix("environment."), [])
            if value not in known:
                known.append(value)
    emphasised = emphasised_methods(summary)
    others = [method for method in results.settings.methods if method not in emphasised]
    limits = curve_limits(list(curves.values()))
    return _render(
        "page.html.jinja",
        summary,
        version=__version__,
        style=Markup(page_style(_PACKAGE)),
        # The curves in colour are painted over the grey ones.
        panels={
            metric: drawing.draw(panel, [*others, *emphasised], limits)
            for metric, panel in curves.items()
        },
        frame=drawing,
        legend={method: line_style(place) for place, method in enumerate(emphasised)}
        | dict.fromkeys(others),
        place=results.settings.methods.index,
        colours=colours(summary, emphasised),
        percent=percent,
        examples=[(example, example_label(example)) for example in examples],
        gallery_methods=gallery_methods(results, examples),
        has_masks=any(example.mask is not None for example in examples),
        picture=lambda example: _uri(picture_jpeg(example.picture)),
        mask=lambda example: _uri(picture_jpeg(example.mask.astype(np.uint8) * 255)),
        heat=lambda example, method: _uri(heat_jpeg(example, method)),
        lists={
            "Settings": [(key, [value]) for key, value in _flat(asdict(results.settings))],
            "Environment": list(environment.items()),
        },
    )


def markdown_report(summary: Summary) -> str:
    """Both tables and all that must be said with them, in Markdown."""
    return _render("report.md.jinja", summary, markdown_table=_markdown_table)


def _render(name: str, summary: Summary, **values: Any) -> str:
    """Fills a template; every text that is put in is escaped as HTML, or as Markdown."""
    is_html = name.endswith(".html.jinja")
    environment = template_environment(_PACKAGE, autoescape=is_html)
    environment.finalize = _printable if is_html else _escaped
    environment.filters["lines"] = _lines
    results = summary.results
    return environment.get_template(name).render(
        summary=summary,
        results=results,
        settings=results.settings,
        notices=describe(results),
        heading=run_title(results.settings),
        verdict=verdict(summary),
        clearly=CLEARLY,
        accuracy=accuracy(results),
        probability=mean_probability(results),
        failures_shown=_FAILURES_SHOWN[name],
        title=method_title,
        units=units,
        reading=reading,
        **values,
    )


def _printable(value: Any) -> Any:
    # No line ends between a number and its unit.
    return printable(value).replace(" %", "\u00a0%") if type(value) is str else value


def _escaped(value: Any) -> Any:
    return escape_markdown(value) if type(value) is str else value


def _lines(texts: Iterable[str]) -> Markup:
    return Markup("<br>").join(map(printable, texts))


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """All leaves of nested settings, by dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, str(value)


def _uri(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    head = [f"{escape_markdown(m.title)} {m.arrow}".strip() for m in table.metrics]
    body = [
        [
            escape_markdown(method_title(method)),
            *(
                _markdown_cell(entry, *table.format(entry, metric))
                for entry, metric in zip(entries, table.metrics, strict=True)
            ),
        ]
        for method, entries in table.rows.items()
    ]
    cells = [["Method", *head], *body, ["Images", *table.counts()]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_table(table: Table) -> Markup:
    return Markup(markdown_table(table))


def _markdown_cell(entry: Entry, mean: str, half_width: str) -> str:
    text = f"**{mean}**" if entry.mark == "best" else mean
    if half_width:
        text += f" ± {half_width}"
    return text if entry.mark in ("", "best") else f"{text} ({entry.mark})"


def escape_markdown(text: str) -> str:
    """A text that Markdown shows as it is, in a table too."""
    escaped = re.sub(r"([\\`*\[\]<>|~&#])", r"\\\1", printable(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)
