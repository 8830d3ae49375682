"""Writes the report of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from captum_reflected._writing import write_whole
from captum_reflected.errors import BenchmarkError
from captum_reflected.report.figures import curves_figure, gallery_figure, mean_curves
from captum_reflected.report.page import html_page, markdown_report
from captum_reflected.report.ranking import emphasised_methods
from captum_reflected.report.results import read_results
from captum_reflected.report.tables import csv_failures, csv_table, summarize
from captum_reflected.visualization.notebook_figure import figure_bytes

_EXAMPLES_SHOWN = 8


def write_report(folder: Path | str, output: Path | str | None = None) -> list[Path]:
    """Reports a benchmark run, finished or not.

    Writes ``table.md`` (both tables and what must be said with them), ``table.csv`` and
    ``paired.csv`` (the same at full precision), ``failures.csv``, ``curves.png``,
    ``gallery.png`` and ``report.html``, one page that needs no other file. What the run has
    nothing for is not written, and removed where an earlier report left it.

    Args:
        folder: where the run was written.
        output: where the report goes, made if missing; ``folder/report`` if None.

    Returns:
        list[Path]: the files, ``table.md`` first.

    Raises:
        BenchmarkError: the folder is no benchmark's, or holds no scores yet.
        OSError: something cannot be read or written.
    """
    folder = Path(folder)
    results = read_results(folder)
    if all(row.error is not None or row.skipped for row in results.rows):
        first = results.rows[0]
        reason = first.error or "skipped because the model does not predict the label"
        raise BenchmarkError(
            f"none of the {len(results.rows)} images of {folder} so far could be evaluated; "
            f"the first, {first.file!r}: {reason}"
        )
    output = folder / "report" if output is None else Path(output)
    examples = results.gallery[:_EXAMPLES_SHOWN]
    summary, curves = summarize(results), mean_curves(results)
    emphasised = emphasised_methods(summary)
    contents = {
        "table.md": markdown_report(summary).encode(),
        "table.csv": csv_table(summary.means).encode(),
        "paired.csv": csv_table(summary.paired).encode() if summary.paired else None,
        "failures.csv": csv_failures(results.failures).encode() if results.failures else None,
        "curves.png": _png(curves_figure(results, curves, emphasised), dpi=150),
        "gallery.png": _png(gallery_figure(results, examples), dpi=120),
        "report.html": html_page(summary, curves, examples).encode(),
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in contents.items():
        path = output / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, content)
            written.append(path)
    return written


def _png(figure: Figure | None, *, dpi: int) -> bytes | None:
    return None if figure is None else figure_bytes(figure, "png", dpi=dpi)
