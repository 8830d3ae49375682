"""The table of the README: photos in common, figures stored and read, the README up to date."""

import numpy as np
import pytest
import readme_table
from study import merge
from test_report import make_rows, write_folder

from captum_reflected.errors import BenchmarkError, UsageError
from captum_reflected.metrics import mean_interval
from captum_reflected.report.results import read_results

CHEAP = ("balanced_relevance", "mask_regression")


def make_results(folder):
    """Two methods on 12 photos, and a third on the first 5."""
    write_folder(folder / "a", make_rows(12, methods=CHEAP), methods=CHEAP)
    write_folder(folder / "b", make_rows(5, methods=["rise"], seed=1), methods=["rise"])
    return merge([read_results(folder / name) for name in ("a", "b")])


def collect(results, names, **options):
    costs = dict.fromkeys(names, 12.3456)
    return readme_table.collect(results, costs, costs, "a machine", **options)


def test_methods_are_compared_on_the_same_photos(tmp_path):
    results = make_results(tmp_path)
    rows = collect(results, [*CHEAP, "rise"])
    assert [row.photos for row in rows] == [5, 5, 5]
    found = mean_interval(100 * results.scores("mask_regression", "insertion")[:5])
    assert rows[1].insertion == pytest.approx(found.mean, abs=0.005)
    assert rows[1].insertion_interval == pytest.approx(found.half_width, abs=0.005)
    assert rows[1].forwards == rows[1].seconds == 12.3


def test_a_method_on_fewer_photos_has_another_beside_it(tmp_path):
    results = make_results(tmp_path)
    rows = collect(results, [*CHEAP, "rise"], fewer=["rise"])
    assert [(row.method, row.photos, row.beside) for row in rows] == [
        ("balanced_relevance", 12, ""),
        ("mask_regression", 12, ""),
        ("rise", 5, ""),
        ("mask_regression", 5, "rise"),
    ]
    scores = results.scores("mask_regression", "deletion")
    assert rows[1].deletion == pytest.approx(100 * np.mean(scores), abs=0.005)
    assert rows[3].deletion == pytest.approx(100 * np.mean(scores[:5]), abs=0.005)
    text = readme_table.table(rows)
    note = " ".join(text.partition("\n\n")[2].split("\n"))
    assert (
        f"RISE was run on 5 of the photos; on these, `MaskRegression` has {rows[3].deletion:.1f}"
        in note
    )
    assert "on 12 photos" in note
    # Only methods on all photos can be the best of the table.
    (rise,) = [line for line in text.splitlines() if line.startswith("| RISE")]
    assert "**" not in rise


def test_methods_without_a_run_are_named(tmp_path):
    with pytest.raises(BenchmarkError, match="tis is in none of the runs"):
        collect(make_results(tmp_path), [*CHEAP, "tis"])


def test_what_is_stored_is_read(tmp_path):
    rows = collect(make_results(tmp_path), [*CHEAP, "rise"], fewer=["rise"])
    path = tmp_path / "methods.csv"
    path.write_text(readme_table.stored(rows), encoding="utf-8")
    assert readme_table.read_stored(path) == rows


def test_readme_and_documentation_have_the_stored_figures():
    rows = readme_table.read_stored(readme_table.STORED)
    text = readme_table.README.read_text(encoding="utf-8")
    assert readme_table.in_readme(text, rows) == text
    page = readme_table.STORED.with_suffix(".md").read_text(encoding="utf-8")
    assert page == f"{readme_table.table(rows)}\n"


def test_a_readme_without_a_place_for_the_table_is_refused(tmp_path):
    rows = collect(make_results(tmp_path), CHEAP)
    with pytest.raises(UsageError, match="the README has no <!-- table"):
        readme_table.in_readme("# A project\n", rows)
