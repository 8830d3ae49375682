"""Brings the repository's notebooks into the site, where Sphinx finds its sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

_FOLDER = "tutorials"


def copy_notebooks(docs: Path) -> None:
    """Copies notebooks and their README, which becomes the page that leads to them."""
    source, site = docs.parent / _FOLDER, docs / _FOLDER
    site.mkdir(exist_ok=True)
    index = (source / "README.md").read_text(encoding="utf-8")
    pages = sorted(path.stem for path in source.glob("*.ipynb"))
    lines = ["", "```{toctree}", ":hidden:", "", *pages, "```", ""]
    _write(site / "index.md", (index + "\n".join(lines)).encode())
    for name in pages:
        notebook = (source / f"{name}.ipynb").read_bytes()
        # On GitHub, the documentation is beside the notebooks; here, it is above them.
        _write(site / f"{name}.ipynb", notebook.replace(b"](../docs/", b"](../"))
    for old in site.glob("*.ipynb"):
        if old.stem not in pages:
            old.unlink()


def _write(path: Path, content: bytes) -> None:
    # A file that is written anew is built anew.
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Copies before Sphinx looks for sources."""
    app.connect("builder-inited", lambda app: copy_notebooks(Path(app.srcdir)))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
