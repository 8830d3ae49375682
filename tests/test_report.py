"""The report of a benchmark's folder, from folders written here with known numbers."""

import base64
import csv
import json
import re
import shutil
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from captum_reflected.cli.main import main
from captum_reflected.report import drawing
from captum_reflected.report.figures import curves_figure, gallery_figure, mean_curves
from captum_reflected.report.page import escape_markdown, html_page, markdown_report
from captum_reflected.report.ranking import emphasised_methods, mean_ranks
from captum_reflected.report.results import BenchmarkError, read_results
from captum_reflected.report.tables import (
    differences,
    excludes_zero,
    interval,
    means,
    method_title,
    summarize,
)
from captum_reflected.report.text import verdict
from captum_reflected.report.writing import write_report
from captum_reflected.visualization.curves import GREY, line_style

METHODS = ("reflected_relevance", "transformer_attribution", "attention_grad_cam")
METRICS = (
    "deletion",
    "insertion",
    "insertion_zero",
    "average_drop",
    "average_drop_normalized",
    "average_increase",
)
CURVES = ("deletion", "insertion", "insertion_zero")
POINTS = 9


def make_rows(count, *, methods=METHODS, metrics=METRICS, seed=0):
    """Rows as a run writes them: curves between 0 and 1, and scores that go with them."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        probability = random.uniform(0.3, 0.95)
        entries = {}
        for place, method in enumerate(methods):
            steepness = random.uniform(2, 5) * (1 - 0.15 * place)
            falling = probability * np.exp(-steepness * np.linspace(0, 1, POINTS))
            rising = probability * (1 - np.exp(-steepness * np.linspace(0, 1, POINTS)))
            curves = {"deletion": falling, "insertion": rising, "insertion_zero": 0.8 * rising}
            drop = min(max(0.0, random.normal(0.1 + 0.05 * place, 0.1)), probability)
            values = {
                name: float((curve[1:] + curve[:-1]).mean() / 2) for name, curve in curves.items()
            }
            values |= {
                "average_drop": drop,
                "average_drop_normalized": drop / probability,
                "average_increase": int(random.random() < 0.2),
                "relevance_mass_accuracy": random.uniform(0.2, 0.9),
                "relevance_rank_accuracy": random.uniform(0.2, 0.9),
                "pointing_game": int(random.random() < 0.8),
                "made_up": random.uniform(0, 40),
            }
            entries[method] = {name: values[name] for name in metrics}
            entries[method] |= {
                f"{name}_curve": curves[name].tolist() for name in CURVES if name in metrics
            }
        rows.append(
            {
                "kind": "row",
                "index": index,
                "file": f"class/{index:05}.JPEG",
                "label": index % 3,
                "prediction": index % 3 if index % 4 else (index + 1) % 3,
                "target": index % 3,
                "probability": probability,
                "methods": entries,
            }
        )
    return rows


HEADER = {
    "kind": "header",
    "version": 1,
    "environment": {"captum_reflected": "0.1.0", "torch": "2.15", "device": "cpu"},
}


def write_folder(
    folder, rows, *, images=None, methods=METHODS, metrics=METRICS, version=1, **settings
):
    """A folder with one process's rows; what is not told is as in a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {
        "captum_reflected": "0.1.0",
        "model": "deit_tiny_patch16_224",
        "weights": "sha256:0123abcd",
        "data": {"name": "photos", "images": 200, "fingerprint": "f00"},
        "methods": list(methods),
        "metrics": list(metrics),
        "target": "predicted",
        "precision": "float32",
        "images": len(rows) if images is None else images,
        "batch_size": 1,
        "gallery": 8,
        **settings,
    }
    (folder / "settings.json").write_text(json.dumps({"version": version, "settings": entries}))
    lines = [json.dumps(entry) for entry in [HEADER, *rows]]
    (folder / "rows-00000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_example(folder, index, *, methods=METHODS, size=(24, 32), mask=True, **names):
    random = np.random.default_rng(index)
    (folder / "gallery").mkdir(exist_ok=True)
    names = {"prediction": "tabby", "label": "cat", "target": "tabby"} | names
    maps = random.normal(size=(len(methods), *size)).astype(np.float32)
    maps[0] = 0
    np.savez(
        folder / "gallery" / f"{index:08}.npz",
        picture=random.integers(0, 255, (*size, 3), dtype=np.uint8),
        maps=maps,
        methods=np.array(methods),
        titles=np.array([name.title() for name in methods]),
        **({"mask": maps[-1] > 0} if mask else {}),
        **{key: np.array(value) for key, value in names.items()},
    )


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def page_of(results):
    return html_page(summarize(results), mean_curves(results), results.gallery)


def cells(markdown, title):
    """The row of a Markdown table that starts with this title, as texts; first table first."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")][1:]
        for line in markdown.splitlines()
        if line.startswith(f"| {title} ")
    ]


def test_means_and_half_widths_equal_students_t(tmp_path):
    rows = make_rows(12)
    results = read_results(write_folder(tmp_path, rows))
    table = means(results)
    assert [metric.key for metric in table.metrics] == list(METRICS)
    for method in METHODS:
        for entry, metric in zip(table.rows[method], METRICS, strict=True):
            values = [row["methods"][method][metric] for row in rows]
            low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            assert entry.interval.count == 12
            assert entry.interval.mean == pytest.approx(np.mean(values), abs=1e-12)
            assert entry.interval.half_width == pytest.approx((high - low) / 2, abs=1e-12)


def test_differences_equal_the_paired_t_test_and_are_marked_as_it_says(tmp_path):
    rows = make_rows(25)
    table = differences(read_results(write_folder(tmp_path, rows)))
    assert table.reference == "transformer_attribution"
    assert list(table.rows) == ["reflected_relevance", "attention_grad_cam"]
    marks = set()
    for method, entries in table.rows.items():
        for entry, metric in zip(entries, table.metrics, strict=True):
            ours, other = (
                [row["methods"][name][metric.key] for row in rows]
                for name in (method, "transformer_attribution")
            )
            test = stats.ttest_rel(ours, other)
            low, high = test.confidence_interval(0.95)
            assert entry.interval.mean == pytest.approx((high + low) / 2, abs=1e-12)
            assert entry.interval.half_width == pytest.approx((high - low) / 2, abs=1e-12)
            assert bool(entry.mark) == (test.pvalue < 0.05)
            if entry.mark:
                low_is_good = metric.key in METRICS[0::3] + METRICS[4:5]
                assert entry.mark == ("better" if (low < 0) == low_is_good else "worse")
            marks.add(entry.mark)
    assert marks == {"", "better", "worse"}


def test_a_mean_is_over_the_images_that_have_a_value_and_a_difference_over_those_of_both(tmp_path):
    rows = make_rows(6)
    rows[1]["methods"]["reflected_relevance"] = {"error": "the map holds NaN"}
    rows[2]["methods"]["transformer_attribution"] = {"error": "out of memory"}
    rows[4]["methods"]["reflected_relevance"]["deletion"] = float("nan")
    results = read_results(write_folder(tmp_path, rows))
    own = [rows[k]["methods"]["reflected_relevance"]["insertion"] for k in (0, 2, 3, 5)]
    entry = means(results).rows["reflected_relevance"][1].interval
    assert (entry.mean, entry.count) == (pytest.approx(np.mean(own)), 4)
    both = [
        rows[k]["methods"]["reflected_relevance"]["insertion"]
        - rows[k]["methods"]["transformer_attribution"]["insertion"]
        for k in (0, 3, 5)
    ]
    entry = differences(results).rows["reflected_relevance"][1].interval
    assert (entry.mean, entry.count) == (pytest.approx(np.mean(both)), 3)
    markdown = markdown_report(summarize(results))
    assert "ReflectedRelevance failed on 2 images." in markdown
    assert "- class/00001.JPEG (ReflectedRelevance): the map holds NaN" in markdown
    assert "deletion is nan; wanted: a number from 0 to 1" in markdown
    assert cells(markdown, "Images")[0] == ["4–6"] * 6


def test_the_markdown_table_has_the_papers_form(tmp_path):
    rows = make_rows(3, methods=METHODS[:2])
    deletions = {"reflected_relevance": [0.1, 0.2, 0.3], "transformer_attribution": [0.3, 0.3, 0.6]}
    for method, values in deletions.items():
        for row, value in zip(rows, values, strict=True):
            row["methods"][method]["deletion"] = value
            row["methods"][method]["average_increase"] = 1
    markdown = markdown_report(
        summarize(read_results(write_folder(tmp_path, rows, methods=METHODS[:2], images=3)))
    )
    head = next(line for line in markdown.splitlines() if line.startswith("| Method"))
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "Method",
        "Deletion ↓",
        "Insertion ↑",
        "Insertion from zero ↑",
        "Average drop ↓",
        "Average drop / Y ↓",
        "Average increase ↑",
    ]
    ours, paired = cells(markdown, "ReflectedRelevance")
    (other,) = cells(markdown, "TransformerAttribution")
    # t(2, 0.975) = 4.302653, standard errors 0.057735 and 0.1, of the difference 0.057735.
    assert (ours[0], other[0]) == ("**20.00** ± 24.84", "40.00 ± 43.03")
    assert paired[0] == "−20.00 ± 24.84"
    # All the same: no spread to tell anything by, and both are the best.
    assert ours[5] == other[5] == "**100.00** ± 0.00"
    assert paired[5] == "0.00 ± 0.00"
    assert cells(markdown, "Images") == [["3"] * 6] * 2
    assert markdown.startswith("# deit_tiny_patch16_224 on photos: 3 of 3 images\n")
    assert "Unfinished" not in markdown
    assert "Failures" not in markdown


def test_without_the_papers_baseline_the_first_method_is_the_reference(tmp_path):
    methods = ("attention_rollout", "attention_grad_cam")
    results = read_results(write_folder(tmp_path, make_rows(4, methods=methods), methods=methods))
    assert differences(results).reference == "attention_rollout"
    assert "Difference to AttentionRollout on the same images" in markdown_report(
        summarize(results)
    )


def test_one_method_has_nothing_to_be_compared_with(tmp_path):
    rows = make_rows(4, methods=("reflected_relevance",))
    folder = write_folder(tmp_path, rows, methods=("reflected_relevance",))
    assert differences(read_results(folder)) is None
    written = {path.name for path in write_report(folder)}
    assert "paired.csv" not in written
    text = (folder / "report" / "table.md").read_text(encoding="utf-8")
    assert "**" not in text.split("Bold:")[0]


def test_one_image_has_a_mean_and_no_interval(tmp_path):
    rows = make_rows(1)
    folder = write_folder(tmp_path, rows)
    paths = write_report(folder)
    deletion = 100 * rows[0]["methods"]["attention_grad_cam"]["deletion"]
    (row, difference) = cells(paths[0].read_text(encoding="utf-8"), "AttentionGradCam")
    assert row[0].strip("*") == f"{deletion:.2f}"
    assert "±" not in "".join(row + difference)
    assert "nan" not in (folder / "report" / "report.html").read_text(encoding="utf-8").lower()


def test_interval_leaves_out_nan_and_knows_when_it_has_nothing():
    assert interval([]) is None
    assert interval([float("nan")]) is None
    found = interval([1.0, float("nan"), 3.0])
    assert (found.mean, found.count) == (2.0, 2)
    low, high = stats.ttest_1samp([1.0, 3.0], 0).confidence_interval(0.95)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert interval([0.1] * 7).half_width == 0  # not what rounding leaves
    assert not excludes_zero(interval([0.1] * 7))
    assert not excludes_zero(interval([0.1]))
    assert excludes_zero(interval([0.1, 0.2, 0.3, 0.2]))


def test_a_metric_that_is_not_known_is_shown_as_it_is_and_not_judged(tmp_path):
    metrics = ("made_up", "deletion")
    rows = make_rows(5, metrics=metrics)
    results = read_results(write_folder(tmp_path, rows, metrics=metrics))
    mean = np.mean([row["methods"]["reflected_relevance"]["made_up"] for row in rows])
    markdown = markdown_report(summarize(results))
    assert cells(markdown, "ReflectedRelevance")[0][1].split(" ")[0] == f"{mean:.4g}"
    assert "in percent except made\\_up" not in markdown  # "_" within a word is no emphasis
    assert "in percent except made_up" in markdown
    assert {row[1].mark for row in means(results).rows.values()} == {""}


def test_localisation_is_averaged_over_images_with_a_mask(tmp_path):
    metrics = (*METRICS, "relevance_mass_accuracy", "pointing_game")
    rows = make_rows(5, metrics=metrics)
    for row in rows[:2]:
        for values in row["methods"].values():
            values["relevance_mass_accuracy"] = values["pointing_game"] = None
    results = read_results(write_folder(tmp_path, rows, metrics=metrics))
    assert means(results).counts() == ["5"] * 6 + ["3"] * 2
    assert results.failures == []
    expected = [
        row["methods"]["reflected_relevance"]["relevance_mass_accuracy"] for row in rows[2:]
    ]
    assert means(results).rows["reflected_relevance"][6].interval.mean == pytest.approx(
        np.mean(expected)
    )


@pytest.mark.parametrize("value", [1e308, -1e308, 1.5, -0.2, 10**400, True, "0.5"], ids=range(7))
@pytest.mark.parametrize("name", ["deletion", "deletion_curve", "made_up"])
def test_a_value_that_cannot_be_is_a_failure_and_says_so(tmp_path, name, value):
    metrics = ("deletion", "made_up")
    rows = make_rows(4, metrics=metrics)
    values = rows[2]["methods"]["reflected_relevance"]
    values[name] = [value, 0.1] * 5 if name == "deletion_curve" else value
    results = read_results(write_folder(tmp_path, rows, metrics=metrics))
    page = page_of(results)
    if name == "made_up" and isinstance(value, float):  # nothing is known of its range
        assert results.failures == []
        return
    (failure,) = results.failures
    assert (failure.index, failure.method) == (2, "reflected_relevance")
    assert f"{name.removesuffix('_curve')} is" in failure.reason
    assert "ReflectedRelevance failed on 1 image." in page


def test_torn_lines_are_counted_and_left_out(tmp_path):
    rows = make_rows(4)
    folder = write_folder(tmp_path, rows[:2], images=4)
    torn = json.dumps(rows[2])
    more = [
        torn[: len(torn) // 2] + json.dumps(HEADER),
        "[1, 2]",
        json.dumps({"kind": "row", "index": "7"}),
        json.dumps(rows[2]),
        torn[:-1],
    ]
    (folder / "rows-00001.jsonl").write_bytes("\n".join(more).encode() + b"\n\xff\xfe")
    results = read_results(folder)
    assert [row.index for row in results.rows] == [0, 1, 2]
    assert (results.torn, results.missing) == (5, 1)
    markdown = markdown_report(summarize(results))
    assert "5 lines of the results could not be read and were skipped" in markdown


def test_the_last_row_of_an_image_counts_but_never_an_error_over_scores(tmp_path):
    rows = make_rows(2)
    again, failed = (json.loads(json.dumps(rows[0])) for _ in range(2))
    again["probability"] = 0.125
    failed = {"kind": "row", "index": 0, "file": "class/00000.JPEG", "error": "killed"}
    folder = write_folder(tmp_path, [failed, rows[0], rows[1]], images=2)
    lines = [json.dumps(entry) for entry in (HEADER, again, HEADER, failed)]
    (folder / "rows-00001.jsonl").write_text("\n".join(lines) + "\n")
    results = read_results(folder)
    assert [row.probability for row in results.rows] == [0.125, rows[1]["probability"]]
    assert results.failures == []
    assert results.missing == 0


def test_an_unfinished_run_says_so_first(tmp_path, capsys):
    folder = write_folder(tmp_path, make_rows(3), images=10)
    code, out, _ = run(capsys, "report", folder)
    assert code == 0
    assert out.splitlines()[2] == (
        "**Unfinished: 3 of 10 images are done; the numbers are for these images only.**"
    )
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert page.index("Unfinished: 3 of 10") < page.index("<table")


def test_accuracy_is_told_where_labels_are_known(tmp_path):
    rows = make_rows(8)
    for row in rows[:4]:
        row["label"] = None
    for row, prediction in zip(rows[4:], (True, True, True, False), strict=True):
        row["prediction"] = row["label"] if prediction else row["label"] + 1
    probability = np.mean([row["probability"] for row in rows])
    markdown = markdown_report(summarize(read_results(write_folder(tmp_path / "some", rows))))
    assert "Top-1 accuracy of the model: 75.0% of the 4 images whose label" in markdown
    assert f"Mean probability of the explained class: {probability:.1%}." in markdown
    for row in rows:
        row["label"] = None
    markdown = markdown_report(summarize(read_results(write_folder(tmp_path / "none", rows))))
    assert "accuracy" not in markdown


def test_the_command_prints_the_tables_and_writes_every_file(tmp_path, capsys):
    rows = make_rows(4)
    rows.append({"kind": "row", "index": 4, "file": "x.jpg", "error": "not an image"})
    folder, output = write_folder(tmp_path / "run", rows), tmp_path / "new" / "report"
    write_example(folder, 0)
    code, out, err = run(capsys, "report", folder, "--output", output)
    assert (code, err) == (0, "")
    names = ["table.md", "table.csv", "paired.csv", "failures.csv"]
    names += ["curves.png", "gallery.png", "report.html"]
    assert out.split("Written:\n")[1].split() == [str(output / name) for name in names]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    assert not (folder / "report").exists()
    assert cells(out, "ReflectedRelevance") == cells(
        (output / "table.md").read_text(encoding="utf-8"), "ReflectedRelevance"
    )
    for name in ("curves.png", "gallery.png"):
        assert np.asarray(Image.open(output / name).convert("L")).std() > 10


def test_csv_holds_the_same_at_full_precision(tmp_path):
    rows = make_rows(7)
    rows[3] = {"kind": "row", "index": 3, "file": 'a,"b"\n.jpg', "error": "broken"}
    folder = write_folder(tmp_path, rows)
    write_report(folder)
    read = {
        name: list(csv.DictReader((folder / "report" / name).open(encoding="utf-8", newline="")))
        for name in ("table.csv", "paired.csv", "failures.csv")
    }
    values = [
        100 * row["methods"]["attention_grad_cam"]["insertion"] for row in rows if "methods" in row
    ]
    (found,) = [
        row
        for row in read["table.csv"]
        if (row["method"], row["metric"]) == ("attention_grad_cam", "insertion")
    ]
    assert float(found["mean"]) == pytest.approx(np.mean(values), rel=1e-12)
    assert (found["images"], found["unit"]) == ("6", "percent")
    assert {row["reference"] for row in read["paired.csv"]} == {"transformer_attribution"}
    assert len(read["paired.csv"]) == 2 * len(METRICS)
    assert read["failures.csv"] == [
        {"index": "3", "file": 'a,"b"\\n.jpg', "method": "", "reason": "broken"}
    ]


def test_the_same_run_gives_the_same_report_and_old_files_do_not_stay(tmp_path):
    chosen = {"methods": METHODS[:2], "metrics": METRICS[:1]}
    folder = write_folder(tmp_path / "run", make_rows(3, **chosen), **chosen)
    write_example(folder, 1, methods=METHODS[:2])
    first = {path.name: path.read_bytes() for path in write_report(folder)}
    assert {path.name: path.read_bytes() for path in write_report(folder)} == first
    shutil.rmtree(folder / "gallery")
    write_report(folder)
    assert not (folder / "report" / "gallery.png").exists()
    assert "Gallery" not in (folder / "report" / "report.html").read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Elements, attributes and texts of a page; fails where tags do not match."""

    VOID = ("meta", "link", "img", "br", "wbr", "source", "line")

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def make_whole_folder(folder, *, methods=METHODS):
    """A run with all that can happen in it."""
    metrics = (*METRICS, "relevance_mass_accuracy", "relevance_rank_accuracy", "pointing_game")
    rows = make_rows(6, methods=methods, metrics=metrics)
    rows[2]["methods"][methods[-1]] = {"error": "<b>NaN</b> & worse"}
    name = "<script>alert(1)</script>|ü*_\n\x1b[31m\u202egpj.\udcff.jpg"
    rows[3] = {"kind": "row", "index": 3, "file": name, "error": "cannot | identify"}
    folder = write_folder(
        folder,
        rows,
        images=20,
        methods=methods,
        metrics=metrics,
        model="a<i>model</i>" + "x" * 80,
        data={"name": "photos", "images": 200, "fingerprint": {"deep": [1, 2]}},
    )
    write_example(folder, 0, methods=methods)
    write_example(folder, 4, methods=methods[:-1], mask=False, label="<u>dog</u>, a long one")
    return folder


def test_the_page_stands_alone_and_takes_nothing_of_the_run_for_markup(tmp_path):
    folder = make_whole_folder(tmp_path)
    page = page_of(read_results(folder))
    read = _Reader(page)
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "b", "i", "u", "iframe", "object"}
    for _, attributes in read.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    images = [attributes for tag, attributes in read.elements if tag == "img"]
    assert all(attributes["alt"] for attributes in images)
    # Two pictures, one mask, three and two maps.
    assert len(images) == 2 + 1 + 3 + 2
    for attributes in images:
        data = attributes["src"].removeprefix("data:image/jpeg;base64,")
        assert base64.b64decode(data).startswith(b"\xff\xd8")
    drawings = [a for tag, a in read.elements if tag == "svg" and a.get("role") == "img"]
    assert [one["aria-label"].split(" curves")[0] for one in drawings] == [
        "Deletion",
        "Insertion",
        "Insertion from zero",
    ]
    tables = page.count("<table")
    assert tables == page.count("<caption>") == 6
    assert all(a["scope"] in ("col", "row") for tag, a in read.elements if tag == "th")
    text = "".join(read.texts)
    assert r"<script>alert(1)</script>|ü*_\n\x1b[31m\u202egpj.\udcff.jpg" in text
    assert "<b>NaN</b> & worse" in text
    assert "(label: <u>dog</u>, a long one)" in text
    for wanted in (
        "data.fingerprint.deep",
        "1, 2",
        "sha256:0123abcd",
        "captum_reflected",
        "BMVC 2018",
    ):
        assert wanted in text


def test_hostile_names_stay_one_line_of_markdown(tmp_path):
    markdown = markdown_report(summarize(read_results(make_whole_folder(tmp_path))))
    assert all(c.isprintable() or c == "\n" for c in markdown)
    (line,) = [line for line in markdown.splitlines() if "alert" in line]
    assert line == (
        r"- \<script\>alert(1)\</script\>\|ü\*\_\\n\\x1b\[31m\\u202egpj.\\udcff.jpg: "
        r"cannot \| identify"
    )
    assert escape_markdown("ILSVRC2012_val_00000001.JPEG") == "ILSVRC2012_val_00000001.JPEG"
    assert escape_markdown("_a_") == r"\_a\_"


def test_failures_beyond_the_first_are_counted_in_the_report_and_listed_in_csv(tmp_path):
    rows = make_rows(150)
    for index in range(130):
        rows[index] = {"kind": "row", "index": index, "file": f"{index}.jpg", "error": "gone"}
    folder = write_folder(tmp_path, rows)
    write_report(folder)
    report = folder / "report"
    assert "- and 110 more, in failures.csv" in (report / "table.md").read_text(encoding="utf-8")
    assert "30 more are in failures.csv" in (report / "report.html").read_text(encoding="utf-8")
    assert len((report / "failures.csv").read_text(encoding="utf-8").splitlines()) == 131


def test_processes_that_differ_are_all_told(tmp_path):
    folder = write_folder(tmp_path, make_rows(2))
    for number in range(7):
        header = {**HEADER, "environment": {"torch": "2.15", "device": f"gpu {number}"}}
        (folder / f"rows-{number + 1:05}.jsonl").write_text(json.dumps(header) + "\n")
    results = read_results(folder)
    text = "".join(_Reader(html_page(summarize(results), mean_curves(results), ())).texts)
    assert "gpu 3" in text
    assert "and 3 more" in text  # cpu and gpu 0 to 6 are eight
    assert text.count("2.15") == 1


def test_curves_are_means_with_their_intervals_and_told_apart_by_more_than_colour(tmp_path):
    fractions = np.linspace(0, 1, POINTS)
    rows = make_rows(9)
    results = read_results(write_folder(tmp_path, rows))
    figure = curves_figure(results, mean_curves(results))
    panels = figure.axes
    assert len(panels) == 3
    for axes, metric in zip(panels, CURVES, strict=True):
        for line, band, method in zip(axes.lines, axes.collections, METHODS, strict=True):
            curves = np.array([row["methods"][method][f"{metric}_curve"] for row in rows])
            np.testing.assert_allclose(line.get_xdata(), fractions)
            np.testing.assert_allclose(line.get_ydata(), curves.mean(axis=0), rtol=1e-6)
            low, high = stats.ttest_1samp(curves, 0).confidence_interval(0.95)
            corners = band.get_paths()[0].vertices
            for bounds in (low, high):
                points = np.stack([fractions, bounds], axis=1)
                distances = np.abs(corners[None] - points[:, None]).sum(axis=-1)
                assert distances.min(axis=1).max() < 1e-6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "ReflectedRelevance",
        "TransformerAttribution",
        "AttentionGradCam",
    ]
    styles = [line_style(place) for place in range(42)]
    assert len(set(styles)) == 42
    assert len({dashes for _, dashes in styles[:6]}) == 6


def test_of_many_methods_six_are_in_colour(tmp_path):
    """The reference, the paper's method and the best of the others."""
    methods = (
        "random",
        "saliency",
        "attention_rollout",
        "attention_grad_cam",
        "legrad",
        *METHODS[:2],
    )
    rows = make_rows(30, methods=methods)
    summary = summarize(read_results(write_folder(tmp_path, rows, methods=methods)))
    ranks = mean_ranks(summary.means)
    assert list(ranks.values()) == sorted(ranks.values())
    assert set(ranks) == set(methods)
    assert list(ranks).index("random") < list(ranks).index("legrad")  # as make_rows makes them
    others = [method for method in ranks if method not in METHODS[:2]][:4]
    emphasised = emphasised_methods(summary)
    assert emphasised == [one for one in methods if one in (*METHODS[:2], *others)]
    curves = mean_curves(summary.results)
    page = html_page(summary, curves, ())
    grey = re.findall(r'<li class="curve k(\d) grey"', page)
    coloured = re.findall(r'<li class="curve k(\d)"[^>]* style="--curve: (#\w+)"', page)
    assert {methods[int(place)] for place, _ in coloured} == set(emphasised)
    assert {methods[int(place)] for place in grey} == set(methods) - set(emphasised)
    assert len({colour for _, colour in coloured}) == 6
    for place in range(len(methods)):
        assert len(re.findall(rf'<g class="curve k{place}[ "]', page)) == 3
    text = "".join(_Reader(page).texts)
    assert (
        "In colour: ReflectedRelevance (the method of Sago & Hotta), TransformerAttribution (the "
        "reference of the differences) and the 4 others with the best mean rank" in text
    )
    figure = curves_figure(summary.results, curves, emphasised)
    for axes in figure.axes:
        assert sum(line.get_color() == GREY for line in axes.lines) == 1
        assert len(axes.collections) == 6
    titles = [text.get_text() for text in figure.legends[0].get_texts()]
    assert titles == [*map(method_title, emphasised), "other methods"]


def test_all_of_few_methods_are_in_colour(tmp_path):
    summary = summarize(read_results(write_folder(tmp_path, make_rows(3))))
    assert emphasised_methods(summary) == list(METHODS)
    page = html_page(summary, mean_curves(summary.results), ())
    assert "In colour" not in page
    assert ' grey"' not in page


def test_drawn_curves_are_the_means(tmp_path):
    """From the coordinates of the picture back to the numbers."""
    rows = make_rows(5)
    results = read_results(write_folder(tmp_path, rows))
    panel = mean_curves(results)["insertion"]
    drawn = drawing.draw(panel, METHODS, (0.0, 0.9))
    assert [shape.method for shape in drawn.shapes] == list(METHODS)
    for shape in drawn.shapes:
        points = np.array([pair.split() for pair in shape.line[1:].split("L")], dtype=float)
        across = drawing.WIDTH - drawing.LEFT - drawing.RIGHT
        up = drawing.HEIGHT - drawing.TOP - drawing.BOTTOM
        shares = (points[:, 0] - drawing.LEFT) / across
        values = 0.9 * (drawing.HEIGHT - drawing.BOTTOM - points[:, 1]) / up
        np.testing.assert_allclose(shares, panel.fractions, atol=1e-3)
        np.testing.assert_allclose(values, panel.bands[shape.method].mean, atol=1e-3)
        assert shape.band.count("L") == 2 * len(points) - 1
    assert [text for _, text in drawn.x_ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert [text for _, text in drawn.y_ticks] == ["0%", "20%", "40%", "60%", "80%"]


def scored(scores, metrics=("deletion", "insertion")):
    """Rows with these scores: method to one list a metric."""
    count = len(next(iter(scores.values()))[0])
    rows = make_rows(count, methods=tuple(scores), metrics=metrics)
    for index, row in enumerate(rows):
        for method, lists in scores.items():
            for metric, values in zip(metrics, lists, strict=True):
                row["methods"][method][metric] = values[index]
    return rows


LOW, MIDDLE, HIGH = [0.10, 0.12, 0.11, 0.13], [0.20, 0.23, 0.22, 0.21], [0.3, 0.32, 0.35, 0.31]
WIDE = [0.0, 0.4, 0.1, 0.3]  # its mean is 0.2, and its interval holds all the others


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (
            {
                "attention_grad_cam": (LOW, HIGH),
                "transformer_attribution": (HIGH, LOW),
                "attention_rollout": (MIDDLE, MIDDLE),
            },
            "AttentionGradCam has the best mean rank over the 2 metrics. Compared with "
            "TransformerAttribution, it is clearly better in all 2 and worse in none. Compared "
            "with AttentionRollout, the second, it is clearly better in all 2 and worse in none.",
        ),
        (
            {"transformer_attribution": (LOW, HIGH), "reflected_relevance": (MIDDLE, WIDE)},
            "TransformerAttribution has the best mean rank over the 2 metrics. Compared with "
            "ReflectedRelevance, the second, it is clearly better in 1 (Deletion) and worse in "
            "none.",
        ),
        (
            {"transformer_attribution": (LOW, LOW), "reflected_relevance": (MIDDLE, MIDDLE)},
            "TransformerAttribution and ReflectedRelevance share the best mean rank over the 2 "
            "metrics. Compared with ReflectedRelevance, TransformerAttribution is clearly better "
            "in 1 (Deletion) and worse in 1 (Insertion).",
        ),
        (
            {"transformer_attribution": (MIDDLE, LOW), "reflected_relevance": (WIDE, WIDE)},
            "ReflectedRelevance has the best mean rank over the 2 metrics. Compared with "
            "TransformerAttribution, the second, it is neither clearly better nor clearly worse "
            "in any metric.",
        ),
        (
            {"transformer_attribution": ([0.2], [0.4]), "reflected_relevance": ([0.1], [0.5])},
            "ReflectedRelevance has the best mean rank over the 2 metrics. Compared with "
            "TransformerAttribution, the second, it is neither clearly better nor clearly worse "
            "in any metric.",
        ),
    ],
    ids=["two others", "the reference is first", "equal ranks", "wide intervals", "one image"],
)
def test_the_headline_claims_what_the_intervals_allow(tmp_path, scores, expected):
    folder = write_folder(tmp_path, scored(scores), methods=tuple(scores), metrics=METRICS[:2])
    summary = summarize(read_results(folder))
    assert verdict(summary) == expected
    assert f"{expected} Clearly: the 95 % interval" in markdown_report(summary)


def test_the_headline_names_some_of_many_metrics_and_the_only_one(tmp_path):
    metrics = (*METRICS, "pointing_game")
    good, bad = [0.1, 0.12, 0.11, 0.13], [0.4, 0.5, 0.45, 0.47]
    sides = [(good, bad) if name != "insertion" else (good, good) for name in metrics]
    best, other = ([pair[k] for pair in sides] for k in (0, 1))
    for place, name in enumerate(metrics):
        if name in ("insertion_zero", "average_increase", "pointing_game"):
            best[place], other[place] = other[place], best[place]
    for chosen in (metrics, metrics[:1]):
        scores = {
            "reflected_relevance": best[: len(chosen)],
            "attention_grad_cam": other[: len(chosen)],
        }
        folder = tmp_path / str(len(chosen))
        write_folder(folder, scored(scores, chosen), methods=tuple(scores), metrics=chosen)
        text = verdict(summarize(read_results(folder)))
        assert (
            text
            == {
                7: "ReflectedRelevance has the best mean rank over the 7 metrics. Compared with "
                "AttentionGradCam, the second, it is clearly better in 6 (Deletion, Insertion from "
                "zero, Average drop, Average drop / Y and 2 more) and worse in none.",
                1: "ReflectedRelevance has the best mean rank over Deletion. Compared with "
                "AttentionGradCam, the second, it is clearly better in Deletion and worse in none.",
            }[len(chosen)]
        )


def test_no_headline_where_nothing_can_be_better(tmp_path):
    metrics = ("made_up",)
    folder = write_folder(tmp_path / "a", make_rows(4, metrics=metrics), metrics=metrics)
    assert verdict(summarize(read_results(folder))) is None
    rows = make_rows(4, methods=("reflected_relevance",))
    folder = write_folder(tmp_path / "b", rows, methods=("reflected_relevance",))
    assert verdict(summarize(read_results(folder))) is None


def test_a_method_that_failed_on_images_is_last_by_rank(tmp_path):
    rows = scored({"transformer_attribution": (HIGH, LOW), "reflected_relevance": (LOW, HIGH)})
    rows[0]["methods"]["reflected_relevance"] = {"error": "the map holds NaN"}
    methods = ("transformer_attribution", "reflected_relevance")
    folder = write_folder(tmp_path, rows, methods=methods, metrics=METRICS[:2])
    summary = summarize(read_results(folder))
    assert mean_ranks(summary.means) == {"transformer_attribution": 1, "reflected_relevance": 2}
    assert "clearly worse in all 2 and better in none" in verdict(summary)


@pytest.mark.parametrize(
    ("model", "data", "title"),
    [
        ("demo", "scenes", "demo on scenes"),
        ("hf:google/vit", "/srv/data/photos", "hf:google/vit on photos"),
        (
            "open_clip:ViT-B-32/openai",
            "/data/imagenet/val",
            "open_clip:ViT-B-32/openai on imagenet/val",
        ),
        ("/home/me/my-vit", "photos/cats", "my-vit on photos/cats"),
        ("~/my-vit", "../data/cats", "my-vit on cats"),
        ("demo", "C:\\data\\cats", "demo on cats"),
        ("demo", "/", "demo on /"),
    ],
)
def test_titles_do_not_name_the_folders_of_a_machine(tmp_path, model, data, title):
    data = {"name": data, "images": 2, "fingerprint": "f00"}
    folder = write_folder(tmp_path, make_rows(2), model=model, data=data)
    summary = summarize(read_results(folder))
    page = html_page(summary, {}, ())
    assert re.search("<h1>(.*)</h1>", page)[1] == title
    assert f"<title>{title}: attribution benchmark</title>" in page
    assert markdown_report(summary).startswith(f"# {escape_markdown(title)}: 2 of 2 images")


def test_a_run_without_curves_or_gallery_is_reported_without(tmp_path):
    metrics = ("average_drop", "average_increase")
    folder = write_folder(tmp_path, make_rows(3, metrics=metrics), metrics=metrics)
    names = {path.name for path in write_report(folder)}
    assert names == {"table.md", "table.csv", "paired.csv", "report.html"}


def test_the_gallery_takes_other_sizes_missing_maps_and_masks_and_says_what_is_broken(tmp_path):
    folder = write_folder(tmp_path, make_rows(3))
    write_example(folder, 0)
    write_example(folder, 1, size=(40, 20), methods=METHODS[1:], mask=False, label="")
    write_example(folder, 2, label="tabby")
    (folder / "gallery" / "00000003.npz").write_bytes(b"PK\x03\x04 cut off")
    (folder / "gallery" / "00000004.npz").write_bytes(b"")
    with np.load(folder / "gallery" / "00000002.npz") as arrays:
        changed = dict(arrays)
    changed["maps"][1, 0, 0] = np.nan
    np.savez(folder / "gallery" / "00000002.npz", **changed)
    results = read_results(folder)
    assert results.unread_examples == ("00000003.npz", "00000004.npz")
    assert list(results.gallery[2].maps) == ["reflected_relevance", "attention_grad_cam"]
    figure = gallery_figure(results, results.gallery)
    grid = np.array(figure.axes).reshape(3, 2 + len(METHODS))
    drawn = [[bool(axes.images) for axes in row] for row in grid]
    assert drawn == [
        [True, True, True, True, True],
        [True, False, False, True, True],
        [True, True, True, False, True],
    ]
    assert [row[0].get_xlabel() for row in grid] == ["tabby\n(label: cat)", "tabby", "tabby"]
    assert "2 gallery files could not be read" in page_of(results)


def test_a_gallery_of_many_shows_the_first(tmp_path):
    folder = write_folder(
        tmp_path, make_rows(2, methods=("reflected_relevance",)), methods=("reflected_relevance",)
    )
    for index in range(11):
        write_example(folder, index, methods=("reflected_relevance",), size=(8, 8), mask=False)
    write_report(folder)
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "The first 8 of 11 stored images." in page
    assert page.count("data:image/jpeg") == 16


def _change_settings(folder, **changes):
    content = json.loads((folder / "settings.json").read_text())
    content["settings"].update(changes)
    (folder / "settings.json").write_text(json.dumps(content))


def _shorten_a_curve(folder):
    rows = make_rows(2)
    rows[1]["methods"]["attention_grad_cam"]["deletion_curve"] = [1, 0]
    write_folder(folder, rows)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "has no settings.json; wanted: a benchmark's"),
        (lambda folder: (folder / "settings.json").unlink(), "has no settings.json"),
        (
            lambda folder: (folder / "settings.json").write_text('{"vers'),
            "settings.json does not hold a",
        ),
        (lambda folder: (folder / "settings.json").write_text("[]"), "settings.json does not hold"),
        (
            lambda folder: write_folder(folder, make_rows(2), version=2),
            "version 2; wanted: version 1",
        ),
        (lambda folder: _change_settings(folder, methods=[]), r"methods is \[\]; wanted: names"),
        (lambda folder: _change_settings(folder, metrics="all"), "metrics is 'all'; wanted: names"),
        (lambda folder: _change_settings(folder, images=True), "images is True; wanted: a number"),
        (lambda folder: _change_settings(folder, data={}), "does not hold a benchmark's settings"),
        (lambda folder: _change_settings(folder, other=1), "unexpected keyword argument 'other'"),
        (_shorten_a_curve, "have 2 and 9 points"),
        (
            lambda folder: (folder / "rows-00001.jsonl").write_text(
                json.dumps({**HEADER, "version": 3})
            ),
            "rows-00001.jsonl is of version 3; wanted: version 1",
        ),
        (lambda folder: (folder / "rows-00000.jsonl").unlink(), "no evaluated image yet"),
        (
            lambda folder: write_folder(
                folder, [{"kind": "row", "index": 5, "file": "a.jpg", "error": "gone"}]
            ),
            "none of the 1 images of .* 'a.jpg': gone",
        ),
    ],
)
def test_what_is_no_run_is_said_and_nothing_is_written(tmp_path, capsys, spoil, message):
    folder = write_folder(tmp_path / "run", make_rows(2))
    spoil(folder)
    with pytest.raises(BenchmarkError, match=message):
        write_report(folder, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    code, out, err = run(capsys, "report", folder)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"captum-reflected: .*{message}.*\n", err)


def test_an_output_that_cannot_be_written_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "run", make_rows(2))
    (tmp_path / "file").write_text("in the way")
    code, out, err = run(capsys, "report", folder, "--output", tmp_path / "file")
    assert (code, out) == (2, "")
    assert str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "in the way"


# What a page is asked in the browser.
QUESTIONS = r"""(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const lines = (node, from, to) => {
    const range = document.createRange();
    range.setStart(node, from);
    range.setEnd(node, to);
    return new Set([...range.getClientRects()].map(rect => Math.round(rect.top))).size;
  };
  const words = (node) => [...node.data.matchAll(/\S+/g)].map(
    word => [word[0], lines(node, word.index, word.index + word[0].length)]);
  const texts = all('table:not(.words, .list) th').flatMap(cell => [...cell.childNodes]).filter(
    node => node.nodeType === 3);
  const name = document.querySelector('.legend .grey');
  const kind = name.classList[1];
  const stroke = () => getComputedStyle(document.querySelector(`g.${kind} .mean`)).stroke;
  name.blur();
  const before = stroke();
  name.focus();
  const tall = document.querySelector('.tall');
  return {
    width: document.documentElement.scrollWidth,
    facts: all('header dd').map(fact => fact.textContent),
    images: document.images.length,
    loaded: all('img').filter(i => i.complete && i.naturalWidth > 0).length,
    boxes: all('.scroll').length,
    scrolling: all('.scroll').filter(e => e.scrollWidth > e.clientWidth).length,
    tall: tall.scrollHeight > tall.clientHeight && tall.clientHeight < 800,
    words: texts.flatMap(words).length,
    broken: texts.flatMap(words).filter(word => word[1] > 1),
    before,
    after: stroke(),
    ink: getComputedStyle(document.body).color,
    others: all(`g.curve:not(.${kind})`).map(g => getComputedStyle(g).opacity),
  };
})()"""


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(tmp_path):
    """It fits, its gallery scrolls by itself, names are whole, grey curves can be focused."""
    methods = (
        *METHODS,
        "attention_rollout",
        "raw_attention",
        "random",
        "mask_regression:forwards=50",
    )
    folder = make_whole_folder(tmp_path / "run", methods=methods)
    for index in range(5, 9):
        write_example(folder, index, methods=methods, size=(32, 32))
    path = tmp_path / "report.html"
    path.write_text(page_of(read_results(folder)), encoding="utf-8")
    with chromium.Chromium() as browser:
        for dark in (False, True):
            tab = browser.open(path.as_uri(), dark=dark)
            for width in (390, 1280):
                tab.resize(width, 800)
                found = tab.run(QUESTIONS)
                assert found["width"] == width
                assert found["facts"][2] == "60.0\u00a0% 5 labelled"
                assert found["images"] == found["loaded"] == 6 + 5 + 6 * 7 - 1
                assert found["boxes"] == 4
                assert found["scrolling"] >= (3 if width == 390 else 1)  # inside themselves
                assert found["tall"]
                assert found["words"] > 40
                assert found["broken"] == []
                assert found["before"] != found["after"] == found["ink"]
                assert set(found["others"]) == {"0.25"}
            assert tab.lowest_contrast() >= 4.5
            assert tab.events("Log.entryAdded") == []
