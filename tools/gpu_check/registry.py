"""What a check is, what it is given, and what it reports."""

from __future__ import annotations

import gc
import math
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).parents[2]

Outcome = Literal["passed", "failed", "skipped", "unfinished"]


class Skipped(Exception):  # noqa: N818 - it is no error
    """Raised by a check that cannot run here; its message says why."""


@dataclass(frozen=True)
class Context:
    """Where the checks run.

    Attributes:
        device: the device.
        reference: the folder of weights, photos and golden tensors; None if there is none.
        golden_demo: the golden tensors of the bundled model.
        deadline: the time, by ``time.monotonic``, at which all checks have to have ended.
        models: number of random models of the differential test.
        speed_models: names of the models whose speed is measured.
    """

    device: torch.device
    reference: Path | None
    golden_demo: Path
    deadline: float
    models: int
    speed_models: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a real GPU."""
        return self.device.type == "cuda"

    def skip_if_simulated(self, reason: str) -> None:
        """Raises :class:`Skipped` on the simulated device."""
        if self.device.type not in ("cuda", "cpu"):
            raise Skipped(f"the simulated device {reason}")

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, at least 1."""
        return max(self.deadline - time.monotonic(), 1.0)


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        name: what was measured, with its unit.
        value: the number.
        least: the aim is at least this; None if there is no such aim.
        most: the aim is at most this; None if there is no such aim.
    """

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is met; None if there is no aim. NaN meets none."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )

    def __str__(self) -> str:
        aim = "".join(
            f", wanted: {words} {bound:g}"
            for words, bound in (("at least", self.least), ("at most", self.most))
            if bound is not None
        )
        return f"{self.name}: {self.value:.4g}{aim}"


@dataclass
class Report:
    """What a check found.

    Attributes:
        figures: the numbers, in the order in which they were measured.
        notes: further findings, as text.
        problems: why the check failed, beside figures that miss their aims.
        on_figure: called after every figure.
    """

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    on_figure: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def measured(
        self, name: str, value: float, *, least: float | None = None, most: float | None = None
    ) -> None:
        """Adds a figure, with its aim if it has one."""
        self.figures.append(Figure(name, float(value), least, most))
        self.on_figure()


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: by which ``--only`` selects it.
        description: what it proves, in one sentence.
        run: the function.
        seconds: how long it is expected to take on an H100.
    """

    name: str
    description: str
    run: Callable[[Context, Report], None]
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """A check that ended.

    Attributes:
        check: the check.
        outcome: ``"failed"`` if a figure misses its aim, or there is another problem;
            ``"unfinished"`` while it runs.
        seconds: how long it took.
        report: what it found.
        reason: why it was skipped.
    """

    check: Check
    outcome: Outcome
    seconds: float
    report: Report
    reason: str = ""

    @property
    def problems(self) -> list[str]:
        """All reasons for which it failed."""
        missed = [str(figure) for figure in self.report.figures if figure.is_met is False]
        return [*missed, *self.report.problems]

    def as_json(self) -> dict[str, Any]:
        """The entry in the file of figures."""
        return {
            "name": self.check.name,
            "description": self.check.description,
            "outcome": self.outcome,
            "reason": self.reason,
            "seconds": round(self.seconds, 2),
            "figures": [
                {
                    **asdict(figure),
                    "value": figure.value if math.isfinite(figure.value) else str(figure.value),
                    "is_met": figure.is_met,
                }
                for figure in self.report.figures
            ],
            "notes": self.report.notes,
            "problems": self.problems,
        }


CHECKS: dict[str, Check] = {}


def check(
    name: str, description: str, seconds: float
) -> Callable[[Callable[[Context, Report], None]], Callable[[Context, Report], None]]:
    """Registers a function as a check."""

    def register(run: Callable[[Context, Report], None]) -> Callable[[Context, Report], None]:
        CHECKS[name] = Check(name, description, run, seconds)
        return run

    return register


def perform(
    one: Check, context: Context, progress: Callable[[Result], None] = lambda _: None
) -> Result:
    """Runs a check; whatever it raises is its result, so that the others still run.

    Args:
        one: the check.
        context: where it runs.
        progress: called with the unfinished result after every figure, so that a process that is
            killed leaves what it has measured.
    """
    began = time.monotonic()
    reason = _lack_of_time(one, context)

    def result(outcome: Outcome) -> Result:
        return Result(one, outcome, time.monotonic() - began, report, reason)

    report = Report(on_figure=lambda: progress(result("unfinished")))
    if reason:
        return result("skipped")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those that matter are looked for
            one.run(context, report)
    except Skipped as skipped:
        reason = str(skipped)
    except Exception as error:
        report.problems.append(f"{type(error).__name__}: {error}")
        report.notes.append(traceback.format_exc())
    if context.on_gpu:
        _free(context.device, report)
    failed = result("failed")
    return failed if failed.problems else result("skipped" if reason else "passed")


def _lack_of_time(one: Check, context: Context) -> str:
    """Why a check would not end in time, in words; empty if it would."""
    if time.monotonic() >= context.deadline:
        return "no time is left; wanted: a larger --seconds, or --only"
    if context.on_gpu and context.seconds_left < one.seconds:  # how long a CPU takes is not known
        return (
            f"it takes about {one.seconds:.0f} s, and {context.seconds_left:.0f} s are left; "
            "wanted: a larger --seconds, or --only"
        )
    return ""


def _free(device: torch.device, report: Report) -> None:
    """Returns memory, which checks in other processes need; notices a GPU that has failed."""
    gc.collect()
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        report.problems.append(f"the GPU cannot be used any more: {error}")
