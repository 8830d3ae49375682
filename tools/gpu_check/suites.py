"""The project's own tests of Captum's contract and of the golden tensors, run on the device."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_check.processes import run
from gpu_check.registry import ROOT, Context, Report, Skipped, check

# Their models and images are on the device that tests/conftest.py is told.
_CONTRACT = ("test_captum_contract.py", "test_golden.py")


def need(*packages: str) -> None:
    """Skips the check if a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed; wanted: it, or a packed folder")


@check("contract", "the tests of Captum's contract and of golden tensors pass on the device", 90)
def contract(context: Context, report: Report) -> None:
    """By pytest, in a process of its own."""
    need("pytest")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "tests.xml"
        variables = {
            "CAPTUM_REFLECTED_DEVICE": str(context.device),
            # The machine may have plugins of its own.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        if context.reference is not None:
            variables["CAPTUM_REFLECTED_REFERENCE"] = str(context.reference)
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")),
            f"--junitxml={output}",
            *(str(ROOT / "tests" / name) for name in _CONTRACT),
        ]
        ended = run(context, command, variables, context.seconds_left)
        if not output.is_file():
            raise RuntimeError(f"pytest ended with status {ended.status}: {ended.output[-2000:]}")
        cases = list(ElementTree.parse(output).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or _is_error(case)]
    skipped = [case for case in cases if case.find("skipped") is not None]
    report.measured("tests passed", len(cases) - len(failed) - len(skipped), least=1)
    report.measured("tests skipped", len(skipped))
    report.measured("tests failed", len(failed), most=0)
    report.problems += [f"{case.get('name')}: {_message(case)}" for case in failed[:20]]


def _is_error(case: ElementTree.Element) -> bool:
    return case.find("error") is not None


def _message(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    text = "" if found is None else (found.get("message") or found.text or "")
    return text.splitlines()[0][:300] if text else ""
