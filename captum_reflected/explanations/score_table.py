"""Tables of metrics by method: means, and differences from the first method."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from captum_reflected.metrics import mean_interval
from captum_reflected.metrics.registry import Metric

Scores: TypeAlias = Mapping[str, Mapping[str, Tensor]]

# Intervals of fewer leave the range of a metric, or hold the true mean far less often than stated.
FEWEST_IMAGES = 10
# Those of a metric that is 0 or 1 for each image need more.
_FEWEST_OF_SHARES, _SHARE = 30, "average_increase"
_UNKNOWN = "–"


@dataclass(frozen=True)
class ScoreTable:
    """A table of texts.

    Attributes:
        caption: what it shows, in sentences.
        rows: the cells; the first row and the first column are heads. ``**text**`` is bold.
    """

    caption: str
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """In Markdown, with columns of one width, so that it can be read as it is."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        rules = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        lines = [
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
            for line in (self.rows[0], rules, *self.rows[1:])
        ]
        return f"{self.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    @property
    def html(self) -> str:
        """In HTML."""
        lines = []
        for place, line in enumerate(self.rows):
            kinds = ["th", *["th" if place == 0 else "td"] * (len(line) - 1)]
            cells = zip(kinds, map(_html, line), strict=True)
            lines.append("".join(f"<{kind}>{cell}</{kind}>" for kind, cell in cells))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<p>{html.escape(self.caption)}</p><table>{body}</table>"


def score_tables(scores: Scores, metrics: Sequence[Metric]) -> list[ScoreTable]:
    """The table of means, and that of paired differences if there are enough images.

    Args:
        scores: by method and metric, one number for each image, (B,).
        metrics: the columns.
    """
    reference = next(iter(scores))
    count = len(next(iter(scores[reference].values())))
    images = "1 image" if count == 1 else f"{count} images"
    if count < FEWEST_IMAGES:
        caption = (
            f"Mean of {images}, in percent. This is too few for intervals: what holds for {images} "
            f"need not hold for others. From {FEWEST_IMAGES} images on, the table has 95 % "
            "intervals; small differences between methods need 50 or more."
        )
    else:
        caption = f"Mean of {images}, in percent, ± 95 % interval."
        shares = [metric.title for metric in metrics if metric.key == _SHARE]
        if shares and count < _FEWEST_OF_SHARES:
            caption += (
                f" Intervals of {shares[0]}, which is 0 or 1 for each image, are too narrow with "
                f"fewer than {_FEWEST_OF_SHARES} images."
            )
    means = _rows(metrics, {title: scores[title] for title in scores})
    tables = [ScoreTable(caption + _notes(means, count), means)]
    if count >= FEWEST_IMAGES and len(scores) > 1:
        of_reference = scores[reference]
        differences = _rows(
            metrics,
            {
                title: {key: found[key] - of_reference[key] for key in found}
                for title, found in scores.items()
                if title != reference
            },
            signed=True,
        )
        caption = (
            f"Difference from {reference} on the same images, ± 95 % interval; bold: the interval "
            "excludes 0."
        )
        tables.append(ScoreTable(caption + _notes(differences, count), differences))
    return tables


def _rows(metrics: Sequence[Metric], scores: Scores, *, signed: bool = False) -> list[list[str]]:
    head = ["", *(f"{metric.title} {metric.arrow}" for metric in metrics)]
    lines = [
        [title, *(_cell(found[metric.key], metric, signed=signed) for metric in metrics)]
        for title, found in scores.items()
    ]
    return [head, *lines]


def _cell(values: Tensor, metric: Metric, *, signed: bool) -> str:
    if not bool(values.isfinite().all()):
        return _UNKNOWN
    found = mean_interval(values)
    text = metric.format(found.mean, signed=signed)
    if found.count < FEWEST_IMAGES or found.half_width == 0:
        return text
    text += f" ± {metric.format(found.half_width)}"
    return f"**{text}**" if signed and abs(found.mean) > found.half_width else text


def _notes(rows: Sequence[Sequence[str]], count: int) -> str:
    """What has to be said of single cells."""
    cells = [cell for line in rows[1:] for cell in line[1:]]
    notes = ""
    if _UNKNOWN in cells:
        notes += f" {_UNKNOWN}: the model's output for parts of an image is not finite."
    if count >= FEWEST_IMAGES and any("±" not in cell and cell != _UNKNOWN for cell in cells):
        notes += " Without ±: the same number for all images, which has no interval."
    return notes


def _html(cell: str) -> str:
    text = html.escape(cell.strip("*"))
    return f"<b>{text}</b>" if cell.startswith("**") else text
