"""What importing the library brings in: torch, captum and what captum itself imports."""

import subprocess
import sys

import pytest

from captum_reflected._extras import import_extra

SLOW_TO_IMPORT = (
    "filelock",
    "open_clip",
    "safetensors",
    "scipy",
    "timm",
    "torchvision",
    "transformers",
)


@pytest.mark.parametrize(
    "module",
    [
        "captum_reflected",
        "captum_reflected.models",
        "captum_reflected.demo",
        "captum_reflected.cli.main",
    ],
)
def test_what_is_slow_to_import_is_not_imported_with_the_library(module):
    assert not imported_by(f"import {module}") & {*SLOW_TO_IMPORT}


def test_of_matplotlib_no_more_is_imported_than_captum_imports():
    assert plotting(imported_by("import captum_reflected")) <= plotting(
        imported_by("import captum.attr")
    )


def plotting(modules):
    return {name for name in modules if name.partition(".")[0] == "matplotlib"}


def imported_by(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n"))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    wanted = r'package open_clip_torch.*: pip install "captum-reflected\[clip\]"'
    with pytest.raises(ImportError, match=wanted):
        import_extra("open_clip", "open_clip_torch", extra="clip")
