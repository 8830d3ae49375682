"""Imports go one way, as the architecture page says; modules are short enough to read."""

import pytest
from architecture import ROOT, allowed_imports, imported, main

PACKAGE = ROOT / "captum_reflected"
ALLOWED = allowed_imports(ROOT / "docs" / "architecture.md")
MODULES = sorted(PACKAGE.rglob("*.py"))
BESIDE = {"errors", "_captum", "_writing", "_extras", "_suggestions"}
# Started as programs: `python -m captum_reflected`, and `torchrun -m captum_reflected.benchmark`.
PROGRAMS = {"__main__.py", "benchmark/__main__.py"}
MOST_LINES = 400

each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)


def test_every_folder_is_on_the_page():
    assert set(ALLOWED) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_the_table_has_no_circle():
    above = set()
    for folder, may_import in ALLOWED.items():
        assert may_import <= above, f"{folder} imports what stands below it"
        above.add(folder)


@each_module
def test_imports(path):
    place = path.relative_to(PACKAGE)
    names = set(imported(path)) - {"__version__"}
    if place.as_posix() in PROGRAMS:
        return
    if len(place.parts) == 1:
        assert place.stem == "__init__" or (place.stem in BESIDE and not names)
        return
    folder = place.parts[0]
    assert names <= ALLOWED[folder] | BESIDE | {folder}


@each_module
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.slow
def test_the_shape_is_printed(capsys):
    assert main([str(ROOT)]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert int(printed["modules"]) == len(MODULES)
    assert float(printed["import ours (user s)"]) > 0
