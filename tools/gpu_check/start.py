"""Runs packed checks with the machine's Python; needs nothing but it and torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Unpacks the packages, and runs the command; returns its exit status."""
    packed, running = (HERE / "PYTHON").read_text().strip(), "{}.{}".format(*sys.version_info)
    if packed != running:
        return refuse(f"packed for Python {packed}, and this is {running}; wanted: --python")
    for name in ("torch", "numpy"):
        if importlib.util.find_spec(name) is None:
            return refuse(f"{sys.executable} has no {name}; wanted: PYTHON=... of one that has it")
    site = Path(tempfile.mkdtemp(prefix="gpu_check"))
    try:
        with tarfile.open(HERE / "packages.tar.xz") as files:
            files.extractall(site, filter="data")
        # Other packages of the machine come first: its torch, and all that was built for it.
        packages = str(site / "packages")
        (site / "sitecustomize.py").write_text(f"import sys\nsys.path.append({packages!r})\n")
        paths = [str(site), str(HERE / "project"), str(site / "preferred")]
        paths.append(os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if (HERE / "reference").is_dir():
            environment["CAPTUM_REFLECTED_REFERENCE"] = str(HERE / "reference")
        command = [sys.executable, str(HERE / "project" / "tools" / "gpu_check"), *sys.argv[1:]]
        return subprocess.run(command, env=environment, check=False).returncode
    finally:
        shutil.rmtree(site, ignore_errors=True)


def refuse(message: str) -> int:
    """Says why nothing was run."""
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
