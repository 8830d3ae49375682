"""The Python blocks of the README and of the documentation's pages run."""

import importlib
import re
import warnings
from itertools import takewhile
from pathlib import Path

import captum.attr
import matplotlib
import pytest
import torch
from conftest import make_vit

import captum_reflected.metrics
from captum_reflected import ReflectedRelevance
from captum_reflected.attr.methods import METHODS, REFERENCE_METHODS
from captum_reflected.metrics.registry import METRICS

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts
)
NOT_RUN = "<!-- not run: "
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(line, code) of each Python block of a page that is not marked as one that cannot run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip("\n")
        if not before.rpartition("\n")[2].startswith(NOT_RUN):
            found.append((before.count("\n") + 2, match[1]))
    return found


def what_unrun_blocks_make():
    """Names that the README goes on with after its first block, which downloads weights."""
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return {
        "ReflectedRelevance": ReflectedRelevance,
        "model": make_vit(img_size=224, patch_size=16, num_classes=300),
        "images": images,
        "attributions": images,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation"}
    if page == "README.md":
        names |= what_unrun_blocks_make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line, code in blocks(page):
            # Line numbers of errors are those of the page.
            exec(compile("\n" * line + code, ROOT / page, "exec"), names)


def rows_of(page, *head):
    """The first cells of the rows of the table whose head begins like this."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    assert any(line.startswith(f"| {' | '.join(head)} |") for line in lines)
    next(lines)  # the line below the head
    table = takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]][: len(head)] for line in table]


def test_the_table_of_methods_is_the_registry():
    expected = []
    for method in [*METHODS.values(), *REFERENCE_METHODS.values()]:
        name = method.title
        if method.attributor is not None:
            name = f"{{doc}}`{name} <{method.key}>"
        elif hasattr(captum.attr, name):
            name = f"Captum's `{name}"
        else:
            name = "–"
        expected.append([name, method.key, method.title])
    assert rows_of("docs/methods/index.md", "class", "key", "title") == expected


def test_the_table_of_metrics_is_the_registry():
    rows = rows_of("docs/metrics.md", "key", "title")
    assert [row for row in rows if row[1] != "–"] == [
        [metric.key, metric.title] for metric in METRICS.values()
    ]
    assert all(hasattr(captum_reflected.metrics, key) for key, title in rows if title == "–")


def test_blocks_are_found():
    assert len([page for page in PAGES if blocks(page)]) >= 10


def test_unrun_blocks_are_marked_so_that_the_reason_shows():
    for page in PAGES:
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            assert not line.startswith("<!-- not run") or re.fullmatch(
                r"<!-- not run: .+ -->", line
            ), (page, line)


@pytest.fixture
def extension(monkeypatch):
    """Loads one of the documentation's own extensions."""
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    return importlib.import_module


def test_links_that_lead_nowhere_are_found(extension, tmp_path):
    check = extension("check_links")
    (tmp_path / "there.html").write_text('<p id="here">')
    page = tmp_path / "page.html"
    page.write_text('<a href="there.html#here"><a href="#up" id="up"><a href="https://captum.ai">')
    assert check.problems(tmp_path) == []
    page.write_text(
        '<a href="gone.html"><a href="there.html#gone"><a href="#gone">'
        '<script src="https://example.org/x.js"></script><img src="gone.png">'
    )
    assert [problem.partition(" ")[2] for problem in check.problems(tmp_path)] == [
        "loads https://example.org/x.js; wanted: a file of the site",
        "links to gone.html, which is not there",
        "links to there.html#gone, and the page has no such anchor",
        "links to #gone, and the page has no such anchor",
        "links to gone.png, which is not there",
    ]


def test_notebooks_become_pages(extension, tmp_path):
    copy = extension("notebooks").copy_notebooks
    docs, tutorials = tmp_path / "docs", tmp_path / "tutorials"
    docs.mkdir()
    tutorials.mkdir()
    (tutorials / "README.md").write_text("# Tutorials\n")
    (tutorials / "first.ipynb").write_text("[metrics](../docs/metrics.md)")
    (tutorials / "second.ipynb").write_text("[first](first.ipynb)")
    copy(docs)
    pages = docs / "tutorials"
    assert "\nfirst\nsecond\n" in (pages / "index.md").read_text()
    assert (pages / "first.ipynb").read_text() == "[metrics](../metrics.md)"
    before = (pages / "second.ipynb").stat().st_mtime_ns
    (tutorials / "first.ipynb").unlink()
    copy(docs)
    assert sorted(path.name for path in pages.iterdir()) == ["index.md", "second.ipynb"]
    assert (pages / "second.ipynb").stat().st_mtime_ns == before  # is not built anew


def test_what_a_function_returns_is_one_description(extension):
    rewrite = extension("captum_docstrings").one_description
    captum = """Args:

    inputs (Tensor): Images.

Returns:
    *Tensor* or *tuple[Tensor]* of **attributions**:
    - **attributions** (*Tensor*):
                Shape of the
                inputs.

Raises:
    ValueError: shapes do not fit."""
    assert rewrite(captum.splitlines()) == [
        *captum.splitlines()[:5],
        "    *Tensor* or *tuple[Tensor]* of **attributions** --",
        "    Shape of the",
        "    inputs.",
        "",
        "Raises:",
        "    ValueError: shapes do not fit.",
    ]
    assert rewrite(["Returns:", "    Tensor: (B, N); R[:, 0]."]) == [
        "Returns:",
        "    *Tensor* --",
        "    (B, N); R[:, 0].",
        "",
    ]
    assert rewrite(["No section."]) == ["No section."]
