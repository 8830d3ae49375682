"""Imports go one way, as the architecture page says; modules are short enough to read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captum_reflected"
MODULES = sorted(PACKAGE.rglob("*.py"))
BESIDE = {"errors", "_captum", "_writing", "_extras"}
# Started as programs: `python -m captum_reflected`, and `torchrun -m captum_reflected.benchmark`.
PROGRAMS = {"__main__.py", "benchmark/__main__.py"}
MOST_LINES = 400


def allowed():
    """Of every folder the folders that it may import, in the order of the page."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", text, re.MULTILINE)
    return {folder: set(re.findall(r"`(\w+)`", names)) for folder, names in rows}


def imported(path):
    """The names below captum_reflected that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module]
            if node.module == "captum_reflected":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("captum_reflected."))


def test_every_folder_is_on_the_page():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(allowed()) == folders


def test_the_table_has_no_circle():
    above = set()
    for folder, may_import in allowed().items():
        assert may_import <= above, f"{folder} imports what stands below it"
        above.add(folder)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports(path):
    place = path.relative_to(PACKAGE)
    names = set(imported(path)) - {"__version__"}
    if place.as_posix() in PROGRAMS:
        return
    if len(place.parts) == 1:
        assert place.stem == "__init__" or (place.stem in BESIDE and not names)
        return
    folder = place.parts[0]
    assert names <= allowed()[folder] | BESIDE | {folder}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
