"""Prints the shape of the package: folders, imports between them, lines, public names, import time.

Run as ``python tools/architecture.py [CHECKOUT ...]``, for this checkout or for others, side by
side. An arrow is one folder (or module at the root) that imports another.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_STARTS = 3


def imported(path: Path) -> Iterator[str]:
    """The first names below ``captum_reflected`` that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "captum_reflected":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("captum_reflected."))


def allowed_imports(page: Path) -> dict[str, set[str]]:
    """Of every folder the folders that the architecture page lets it import, in its order."""
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", text, re.MULTILINE)
    return {folder: set(re.findall(r"`(\w+)`", names)) for folder, names in rows}


def describe(checkout: Path) -> dict[str, str]:
    """What is printed of a checkout, by title."""
    package = checkout / "captum_reflected"
    lines: Counter[str] = Counter()
    arrows = set()
    longest = (0, "")
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        room = place.parts[0] if len(place.parts) > 1 else place.stem
        count = len(path.read_text(encoding="utf-8").splitlines())
        lines[room if len(place.parts) > 1 else "(root)"] += count
        longest = max(longest, (count, place.as_posix()))
        names = (name for name in imported(path) if name != "__version__")
        arrows |= {(room, name) for name in names if name != room}
    found = {
        "modules at the root": str(len(list(package.glob("*.py")))),
        "modules": str(len(list(package.rglob("*.py")))),
        "arrows": str(len(arrows)),
        "longest module": f"{longest[1]}, {longest[0]} lines",
        "lines": str(sum(lines.values())),
    }
    found |= {f"  {room}": str(count) for room, count in sorted(lines.items())}
    code = "import captum_reflected; print(len(captum_reflected.__all__))"
    found["public names"] = _run(code, checkout)
    # User seconds, the least of a few starts: they depend least on what else the machine does.
    clock = "import os; {}; print(os.times().user)"
    for title, module in (
        ("torch", "torch"),
        ("captum.attr", "captum.attr"),
        ("ours", package.name),
    ):
        seconds = [_run(clock.format(f"import {module}"), checkout) for _ in range(_STARTS)]
        found[f"import {title} (user s)"] = min(seconds, key=float)
    return found


def _run(code: str, checkout: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    """Prints one column for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], metavar="CHECKOUT")
    columns = [describe(path.resolve()) for path in parser.parse_args(argv).checkouts]
    for title in dict.fromkeys(title for column in columns for title in column):
        values = "".join(f"{column.get(title, '-'):>42}" for column in columns)
        print(f"{title:<24}{values}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
