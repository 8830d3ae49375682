"""The project's own tests, run on the device."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_check.processes import environment
from gpu_check.registry import ROOT, Context, Report, Skipped, check

# Their models and images are on the device that tests/conftest.py is told.
_CONTRACT = ("test_captum_contract.py", "test_golden.py")


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed; wanted: it, or a packed folder")


@check("contract", "the tests of Captum's contract and of the golden tensors pass on the device")
def contract(context: Context, report: Report) -> None:
    """By pytest, in a process of its own."""
    _need("pytest")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "tests.xml"
        variables = {"CAPTUM_REFLECTED_DEVICE": str(context.device)}
        if context.reference is not None:
            variables["CAPTUM_REFLECTED_REFERENCE"] = str(context.reference)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *("-m", "not slow", f"--junitxml={output}"),
                *(str(ROOT / "tests" / name) for name in _CONTRACT),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=environment() | variables,
            timeout=context.seconds_left,
        )
        if not output.is_file():
            raise RuntimeError(f"pytest ended with status {done.returncode}: {done.stdout[-2000:]}")
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


@check("differential", "random models on the device are explained right or not at all")
def differential(context: Context, report: Report) -> None:
    """By the command of tests/test_differential.py."""
    _need("pytest", "hypothesis")
    if context.device.type not in ("cuda", "cpu"):
        raise Skipped("the simulated device is known to this process alone")
    jobs = min(16, os.cpu_count() or 1) if context.on_gpu else 1
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tests" / "test_differential.py")),
            *("--models", str(context.models), "--jobs", str(jobs)),
            *("--device", str(context.device)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        timeout=context.seconds_left,
    )
    found = re.search(r"(\d+) of (\d+) models wrong", done.stdout)
    if found is None:
        raise RuntimeError(f"it ended with status {done.returncode}: {done.stderr[-2000:]}")
    report.measured("models", int(found[2]), least=context.models)
    report.measured("models wrong", int(found[1]), most=0)
    if done.returncode:
        report.problems.append(done.stdout[:4000])
    else:
        report.notes.append(done.stdout.split("\n\n")[0])
