"""Checks the finished site: internal links lead somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)

# What a browser fetches by itself, as opposed to links that a reader follows.
_FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag in _FETCHED and values.get(_FETCHED[tag]) and values.get("rel") != "canonical":
            self.fetched.append(str(values[_FETCHED[tag]]))


def problems(folder: Path) -> list[str]:
    """One line for each link of a site that leads nowhere, or that the browser fetches."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    found = []
    for path, page in sorted(pages.items()):
        name = path.relative_to(folder)
        for address in page.fetched:
            if urlsplit(address).netloc:
                found.append(f"{name} loads {address}; wanted: a file of the site")
        for address in page.links + page.fetched:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            goal = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            anchor = unquote(parts.fragment)
            if not goal.exists():
                found.append(f"{name} links to {address}, which is not there")
            elif anchor and goal in pages and anchor not in pages[goal].anchors:
                found.append(f"{name} links to {address}, and the page has no such anchor")
    return found


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        for problem in problems(Path(app.outdir).resolve()):
            _logger.warning(problem)


def setup(app: Sphinx) -> dict[str, Any]:
    """Runs the check when a build is finished."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
