"""Random models on the device, against the oracle of the project's tests."""

from __future__ import annotations

import os
import re
import sys

from gpu_check.processes import run
from gpu_check.registry import ROOT, Context, Report, check
from gpu_check.suites import need

# What a process needs to start, and to end once it was told that no time is left.
_RESERVE = 45.0


@check("differential", "random models on the device are explained right or not at all", 150)
def differential(context: Context, report: Report) -> None:
    """By the command of tests/test_differential.py, as many models as the time allows."""
    need("pytest", "hypothesis")
    context.skip_if_simulated("is known to this process alone")
    jobs = min(16, os.cpu_count() or 1) if context.on_gpu else 1
    seconds = max(context.seconds_left - _RESERVE, 1.0)
    command = [
        *(sys.executable, str(ROOT / "tests" / "test_differential.py")),
        *("--models", str(context.models), "--jobs", str(jobs)),
        *("--device", str(context.device), "--seconds", f"{seconds:.0f}"),
    ]
    ended = run(context, command, {"OMP_NUM_THREADS": "1"}, context.seconds_left)
    found = re.search(r"(\d+) of (\d+) models wrong", ended.output)
    if found is None:
        raise RuntimeError(f"it ended with status {ended.status}: {ended.errors[-2000:]}")
    report.measured("models", int(found[2]), least=context.models)
    report.measured("models wrong", int(found[1]), most=0)
    if ended.status:
        report.problems.append(ended.output[:4000])
    report.notes.append(ended.output.split("\n\n")[0])
