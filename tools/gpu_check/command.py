"""The command: chooses the checks, runs them one after the other, and writes the figures."""

from __future__ import annotations

import argparse
import configparser
import faulthandler
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from captum_reflected._writing import write_whole
from gpu_check import simulated
from gpu_check.pack import check_size, pack
from gpu_check.registry import CHECKS, ROOT, Check, Context, Result, perform

# In the order in which their checks run: if time runs out, the last are left out.
_MODULES = ("accuracy", "waiting", "speed", "kernels", "memory", "state", "suites", "processes",
            "speed_command", "differential")  # fmt: skip
_SPEED_MODELS = (
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_large_patch16_224",
    "vit_large_patch16_384",
)
_SECONDS = 480.0
# A process that hangs says where, and ends, this long after the time of all checks.
_GRACE = 60.0
# Statistics and two reference methods use it, and no check.
_NOT_USED = ("scipy",)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_check",
        description="Runs what the documentation says of GPUs on a device. Prints a line a check, "
        "writes all figures to a file, and fails if a check fails.",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu; simulated is the CPU "
                        "as a device of its own, which shows where a GPU would be waited for "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), metavar="FILE.json",
                        help="where the figures are written (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", metavar="NAME,...", help="run only these checks")
    parser.add_argument("--list", action="store_true", help="list the checks, and run none")
    parser.add_argument("--reference", type=Path, metavar="DIR",
                        default=os.environ.get("CAPTUM_REFLECTED_REFERENCE"),
                        help="pretrained weights, photos and golden tensors (default: "
                        "$CAPTUM_REFLECTED_REFERENCE)")  # fmt: skip
    parser.add_argument("--golden-demo", type=Path, metavar="FILE.npz",
                        default=ROOT / "tests" / "data" / "golden_demo.npz",
                        help="golden tensors of the bundled model")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=_SECONDS, metavar="S",
                        help="start no check that would not end by this time (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--models", type=int, metavar="N",
                        help="random models of the differential test (default: 500, on a CPU "
                        "20)")  # fmt: skip
    parser.add_argument("--speed-models", metavar="NAME,...",
                        help=f"timm models whose speed is measured (default: "
                        f"{', '.join(_SPEED_MODELS)}; on a CPU test_vit)")  # fmt: skip
    parser.add_argument("--pack", type=Path, metavar="DIR",
                        help="run no check, and make a folder that runs them all on a machine "
                        "without network that has torch")  # fmt: skip
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}",
                        metavar="X.Y", help="with --pack: the version of Python there (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--torch", default=torch.__version__.partition("+")[0], metavar="X.Y.Z",
                        help="with --pack: the version of torch there (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--without", default="", metavar="NAME,...",
                        help="with --pack: packages that the machine has")  # fmt: skip
    parser.add_argument("--packages", default="", metavar="NAME,...",
                        help="with --pack: all packages that it lacks (default: all that are "
                        "needed, beside torch and NumPy)")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.pack is not None:
        reference = None if options.reference is None else Path(options.reference)
        without = frozenset(filter(None, options.without.split(",")))
        only = frozenset(filter(None, options.packages.split(",")))
        pack(options.pack, options.python, options.torch, reference, without, only)
        return check_size(options.pack)
    if unsuitable := unsuitable_packages():
        print("\n".join(unsuitable), file=sys.stderr)
        return 2
    _import_checks()
    if options.list:
        for one in CHECKS.values():
            print(f"{one.name:16}{one.seconds:4.0f} s  {one.description}")
        return 0
    unknown = set((options.only or "").split(",")) - {"", *CHECKS}
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}; wanted: some of {', '.join(CHECKS)}")
    names = list(CHECKS) if options.only is None else options.only.split(",")
    return _run([CHECKS[name] for name in names if name], options)


def unsuitable_packages() -> list[str]:
    """What setup.cfg requires and is not installed, or in another version; in words."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    found = []
    for line in config["options"]["install_requires"].split():
        requirement = Requirement(line)
        if requirement.name in _NOT_USED:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement.name} is not installed; wanted: {line}, or a packed folder")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} is {version}; wanted: {line}")
    return found


def _import_checks() -> None:
    """Registers all checks, and puts them into the order in which they run."""
    for name in _MODULES:
        importlib.import_module(f"gpu_check.{name}")

    def place(one: Check) -> int:
        return _MODULES.index(one.run.__module__.rpartition(".")[2])

    ordered = sorted(CHECKS.values(), key=place)
    CHECKS.clear()
    CHECKS.update((one.name, one) for one in ordered)


def _run(checks: list[Check], options: argparse.Namespace) -> int:
    device = _device(options.device)
    on_gpu = device.type == "cuda"
    speed_models = options.speed_models.split(",") if options.speed_models else None
    context = Context(
        device=device,
        reference=None if options.reference is None else Path(options.reference).resolve(),
        golden_demo=options.golden_demo,
        deadline=time.monotonic() + options.seconds,
        models=options.models or (500 if on_gpu else 20),
        speed_models=tuple(speed_models or (_SPEED_MODELS if on_gpu else ("test_vit",))),
    )
    began = time.monotonic()
    machine = _machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    results: list[Result] = []

    def write(*unfinished: Result) -> None:
        _write(options.output, machine, [*results, *unfinished], time.monotonic() - began)

    with _ending_if_it_hangs(options.seconds + _GRACE if on_gpu else None):
        for one in checks:
            results.append(perform(one, context, write))
            print(_line(results[-1]), flush=True)
            write()
    counts = {
        outcome: sum(result.outcome == outcome for result in results)
        for outcome in ("passed", "failed", "skipped")
    }
    spent = time.monotonic() - began
    print(
        f"{', '.join(f'{count} {outcome}' for outcome, count in counts.items())} in {spent:.0f} s; "
        f"figures: {options.output}"
    )
    return int(counts["failed"] > 0)


@contextmanager
def _ending_if_it_hangs(seconds: float | None) -> Iterator[None]:
    """Ends the process after so many seconds, with a traceback of all its threads."""
    if seconds is None or sys.__stderr__ is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _device(name: str) -> torch.device:
    if name == simulated.NAME:
        return simulated.device()
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is available; wanted: one, or --device cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _line(result: Result) -> str:
    lines = [f"{result.outcome:8}{result.seconds:7.1f} s  {result.check.name}"]
    if result.reason:
        lines[0] += f": {result.reason}"
    lines += [f"{'':20}{figure}" for figure in result.report.figures]
    lines += [f"{'':20}! {problem}" for problem in result.problems]
    return "\n".join(lines)


def _write(path: Path, machine: dict[str, str], results: list[Result], seconds: float) -> None:
    """Written after every figure, so that an interrupted run leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        "machine": machine,
        "seconds": round(seconds, 1),
        "passed": all(result.outcome in ("passed", "skipped") for result in results),
        "checks": [result.as_json() for result in results],
    }
    write_whole(path, (json.dumps(text, indent=1) + "\n").encode())


def _machine(device: torch.device) -> dict[str, str]:
    """Versions of all that the figures depend on."""
    machine: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for name in ("torch", "torchvision", "timm", "captum", "numpy"):
        try:
            machine[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine[name] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["name"] = properties.name
        machine["memory (GiB)"] = round(properties.total_memory / 2**30, 1)
        machine["cuda"] = torch.version.cuda
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        machine[query] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        machine["cudnn"] = torch.backends.cudnn.version()
    else:
        machine["name"] = platform.processor() or platform.machine()
    return {key: str(value) for key, value in machine.items()}


def _commit() -> str:
    packed = ROOT / "COMMIT"
    if packed.is_file():
        return packed.read_text(encoding="utf-8").strip()
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
