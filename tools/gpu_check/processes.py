"""Runs in processes of their own: torchrun with nccl; a benchmark that is killed and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from captum_reflected.benchmark.rows import read_entries
from gpu_check.registry import ROOT, Context, Report, check

_BENCHMARK = """
    --preset scenes --methods transformer_attribution,balanced_relevance,mask_regression
    --metrics average_drop,deletion --batch-size 1 --workers 0
""".split()  # noqa: SIM905
_POLL = 0.05
# On a GPU, a process that takes longer hangs; the checks after it still get their time.
_MOST_SECONDS = 150.0
# Between two runs of the same images; the same kernels give the same numbers.
_SAME = 1e-6


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that finds the package and these tools."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**os.environ, **found, **(variables or {})}


class Ended(NamedTuple):
    """A process that ended.

    Attributes:
        status: its exit status.
        output: what it printed.
        errors: what it printed to stderr.
    """

    status: int
    output: str
    errors: str


def run(
    context: Context,
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    most_seconds: float | None = None,
) -> Ended:
    """Runs a command, and ends it with all processes that it started if it takes too long.

    Args:
        context: of the check; its deadline is kept.
        command: the program and its arguments.
        variables: of its environment, beside those of this process.
        most_seconds: how long it may take; None: what is usual on a GPU, any time on a CPU.

    Raises:
        RuntimeError: it took too long; the message has the end of what it printed.
    """
    if most_seconds is None:
        most_seconds = _MOST_SECONDS if context.on_gpu else context.seconds_left
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(variables),
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=min(most_seconds, context.seconds_left))
    except subprocess.TimeoutExpired:
        _kill(process)
        said = "".join(process.communicate())[-2000:]
        raise RuntimeError(f"{' '.join(command)} did not end in time: {said}") from None
    except BaseException:
        _kill(process)
        raise
    return Ended(process.returncode, output, errors)


def output_of(
    context: Context, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> str:
    """What a command printed.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    ended = run(context, command, variables)
    if ended.status:
        said = (ended.output + ended.errors)[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with status {ended.status}: {said}")
    return ended.output


def _kill(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The finished images of a benchmark, by their number."""
    return {
        entry["index"]: entry["methods"]
        for entry in read_entries(folder)
        if entry is not None and entry["kind"] == "row" and "error" not in entry
    }


def largest_difference(left: Any, right: Any) -> float:
    """Between two nested structures of numbers; infinite where they have another form."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return math.inf
        return max((largest_difference(left[key], right[key]) for key in left), default=0.0)
    if isinstance(left, list) and isinstance(right, list):
        if len(left) != len(right):
            return math.inf
        return max(map(largest_difference, left, right), default=0.0)
    numbers = (int, float)
    if isinstance(left, numbers) and isinstance(right, numbers):
        return 0.0 if left == right else abs(left - right)
    return 0.0 if left == right else math.inf


def _torchrun(*command: str) -> tuple[str, ...]:
    # Without a network, the machine's own name may have no address.
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("--local-addr", "127.0.0.1", *command),
    )


_LOCAL = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


@check("torchrun", "under torchrun, inside a process group, maps and rows are the same", 60)
def torchrun(context: Context, report: Report) -> None:
    """With nccl on a GPU, with gloo on a CPU."""
    context.skip_if_simulated("is known to this process alone")
    script = str(Path(__file__).with_name("distributed.py"))
    printed = output_of(context, _torchrun(script, context.device.type), _LOCAL)
    found = json.loads(printed.strip().splitlines()[-1])
    backend = found.pop("backend")
    report.measured(f"DistributedDataParallel with {backend}: off by", found["off"], most=1e-4)
    benchmark = [*_BENCHMARK, "--device", str(context.device), "--limit", "2", "--output"]
    with tempfile.TemporaryDirectory() as folder:
        plain, distributed = Path(folder) / "plain", Path(folder) / "torchrun"
        command = ["-m", "captum_reflected.benchmark", *benchmark]
        output_of(context, [sys.executable, *command, str(plain)])
        output_of(context, _torchrun(*command, str(distributed)), _LOCAL)
        expected, rows = rows_of(plain), rows_of(distributed)
    report.measured("rows of the benchmark", len(rows), least=2)
    report.measured("rows off by", largest_difference(rows, expected), most=_SAME)


@check("killed", "a benchmark that is killed and resumed gives the rows of an undisturbed one", 50)
def killed(context: Context, report: Report) -> None:
    """Killed with SIGKILL as soon as two images are finished."""
    context.skip_if_simulated("is known to this process alone")
    limit = 20 if context.on_gpu else 6
    options = [*_BENCHMARK, "--device", str(context.device), "--limit", str(limit)]
    command = [sys.executable, "-m", "captum_reflected.benchmark", *options, "--output"]
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        output_of(context, [*command, str(whole)])
        process = subprocess.Popen(
            [*command, str(broken)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            for _ in _until(context, process):
                if broken.is_dir() and len(rows_of(broken)) >= 2:
                    break
        finally:
            if process.poll() is None:
                _kill(process)
            process.wait()
        kept = len(rows_of(broken))
        report.measured("images finished when it was killed", kept, least=1, most=limit - 1)
        report.measured("exit status of the killed process", process.returncode, most=-1)
        output_of(context, [*command, str(broken)])
        rows, expected = rows_of(broken), rows_of(whole)
    report.measured("images finished after it was resumed", len(rows), least=limit)
    report.measured("rows off by", largest_difference(rows, expected), most=_SAME)


def _until(context: Context, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Waits until the process ends or no time is left."""
    while process.poll() is None:
        if context.seconds_left <= 1:
            raise RuntimeError("no image was finished in time")
        time.sleep(_POLL)
        yield
