"""The directive ``command-help``: what commands print when they are asked for help."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from captum_reflected.cli.main import main


class CommandHelp(SphinxDirective):
    """One section for each line, a command without its ``--help``."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The sections."""
        found: list[nodes.Node] = []
        for command in self.content:
            section = nodes.section(ids=[nodes.make_id(command)])
            section += nodes.title(command, "", nodes.literal(command, command))
            text = _help(command.split()[1:])
            section += nodes.literal_block(text, text, language="text")
            found.append(section)
        return found


def _help(arguments: list[str]) -> str:
    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "90"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return printed.getvalue().strip()


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
