"""Packs all that the checks need into one folder, for a machine without network that has torch."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpu_check.registry import ROOT

MOST_BYTES = 60 * 2**20
_PHOTOS = 6
_PROJECT = ("captum_reflected", "tools", "tests", "pyproject.toml", "setup.cfg")
_ROOTS = ("captum", "filelock", "hypothesis", "jinja2", "matplotlib", "pillow", "pytest",
          "safetensors", "timm", "torchvision", "tqdm")  # fmt: skip
# What comes with torch; and what others require, and no check uses: it only downloads weights.
_LEFT_OUT = frozenset(["torch", "numpy", "triton", "hf-xet"])
# Packages with wheels in Python alone, which are smaller than compiled ones.
_PURE = ("fonttools",)
# Used even where the machine has its own: the versions that the project is developed with.
_PREFERRED = ("captum", "timm")
# Wheels for the C libraries of most systems with a GPU, the newest first.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def pack(
    folder: Path,
    python: str,
    torch: str,
    reference: Path | None,
    without: frozenset[str],
    only: frozenset[str] = frozenset(),
) -> None:
    """Makes the folder.

    Args:
        folder: new or empty.
        python: version of Python on the machine, such as "3.12".
        torch: version of torch there, to which torchvision's belongs.
        reference: the folder of reference data; None to leave it out.
        without: names of packages that the machine has.
        only: names of all packages that the machine lacks; empty: those of ``without`` count.
    """
    needed = requirements(python)
    if unknown := (without | only) - needed:
        raise SystemExit(f"{', '.join(sorted(unknown))} is not packed; wanted: some of "
                         f"{', '.join(sorted(needed))}")  # fmt: skip
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; wanted: a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _copy_project(folder / "project")
    if reference is not None:
        _copy_reference(reference, folder / "reference")
    wanted = {
        name: torchvision_of(torch) if name == "torchvision" else importlib.metadata.version(name)
        for name in sorted((only or needed) - without)
    }
    _pack_wheels(folder / "packages.tar.xz", python, wanted)
    shutil.copy(Path(__file__).with_name("start.py"), folder / "start.py")
    (folder / "PYTHON").write_text(f"{python}\n", encoding="utf-8")
    script = folder / "run.sh"
    script.write_text(
        "#!/bin/sh\n# Runs the checks on this machine; python tools/gpu_check --help lists options."
        '\nexec "${PYTHON:-python3}" "$(dirname "$0")/start.py" "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)


def check_size(folder: Path) -> int:
    """Prints the size of each part; returns 1 if the folder is too large, else 0."""
    sizes = {
        part.name: sum(file.stat().st_size for file in _files(part))
        for part in sorted(folder.iterdir())
    }
    for file in sorted(_files(folder), key=lambda file: -file.stat().st_size)[:10]:
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.relative_to(folder)}")
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB in all, of {MOST_BYTES / 2**20:.0f}")
    if total > MOST_BYTES:
        print("too large; wanted: --without PACKAGE,... that the machine has", file=sys.stderr)
        return 1
    print(f"there: sh {folder.name}/run.sh --device cuda --output gpu_check.json")
    return 0


def _files(part: Path) -> Iterator[Path]:
    return (file for file in (part, *part.rglob("*")) if file.is_file())


def torchvision_of(torch: str) -> str:
    """The version of torchvision that was built for a version of torch: 0.26.1 for 2.11.1."""
    major, minor, patch = (int(part) for part in torch.split("."))
    if major != 2:
        raise SystemExit(f"torch {torch}: its torchvision is not known; wanted: 2.X.Y")
    return f"0.{minor + 15}.{patch}"


def requirements(python: str) -> set[str]:
    """The packages that the checks need, with all that these need, by the installed versions."""
    there = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }
    with_torch = _closure(["torch"], there) | _LEFT_OUT
    return _closure(_ROOTS, there) - with_torch


def _closure(names: list[str] | tuple[str, ...], there: dict[str, str]) -> set[str]:
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name in found or (name in _LEFT_OUT and name not in names):
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # torch requires packages of CUDA that a CPU's build lacks
        for text in required:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(there):
                pending.append(requirement.name)
    return found


def _copy_project(folder: Path) -> None:
    """What git has at HEAD, with its name."""

    def git(*arguments: str) -> bytes:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True)
        return done.stdout

    changed = git("status", "--porcelain", "--", *_PROJECT).decode()
    if changed:
        print(f"not committed, so not packed:\n{changed}", file=sys.stderr)
    archive = git("archive", "--format=tar", "HEAD", *_PROJECT)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    (folder / "COMMIT").write_bytes(git("rev-parse", "HEAD"))


def _copy_reference(source: Path, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    entries = json.loads((source / "images.json").read_text(encoding="utf-8"))
    names = ["deit_tiny_patch16_224.safetensors", "golden.npz", "images.json"]
    names += [f"images/{entry['file']}" for entry in entries[:_PHOTOS]]
    for name in names:
        shutil.copy(source / name, folder / name)


def _pack_wheels(archive: Path, python: str, wanted: dict[str, str]) -> None:
    """Downloads wheels, and packs their contents, which become a third smaller than wheels."""
    with tempfile.TemporaryDirectory() as place:
        wheels, unpacked = Path(place) / "wheels", Path(place) / "unpacked"
        for platforms in (_PLATFORMS, ["any"]):
            names = [name for name in wanted if (name in _PURE) == (platforms == ["any"])]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", str(wheels)]
            command += ["--python-version", python, "--implementation", "cp"]
            command += [part for platform in platforms for part in ("--platform", platform)]
            if names:
                command += [f"{name}=={wanted[name]}" for name in names]
                subprocess.run(command, check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            is_preferred = canonicalize_name(wheel.name.partition("-")[0]) in _PREFERRED
            with zipfile.ZipFile(wheel) as files:
                files.extractall(unpacked / ("preferred" if is_preferred else "packages"))
        with tarfile.open(archive, "w:xz") as files:
            for part in sorted(unpacked.iterdir()):
                files.add(part, arcname=part.name)
