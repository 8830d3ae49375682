"""The Python blocks of the README and of the documentation's pages run."""

import re
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import make_vit

from captum_reflected import ReflectedRelevance

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
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
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


def test_blocks_are_found():
    assert len([page for page in PAGES if blocks(page)]) >= 10


def test_unrun_blocks_are_marked_so_that_the_reason_shows():
    for page in PAGES:
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            assert not line.startswith("<!-- not run") or re.fullmatch(
                r"<!-- not run: .+ -->", line
            ), (page, line)
