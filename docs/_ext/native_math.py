"""Equations as MathML, which browsers draw by themselves: no script, no font, no network."""

from __future__ import annotations

import html
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def _write(writer: HTML5Translator, node: nodes.math | nodes.math_block, display: str) -> None:
    mathml = convert(node.astext(), display=display)
    # The source, for screen readers and for who copies it.
    mathml = mathml.replace("<math ", f'<math alttext="{html.escape(node.astext())}" ', 1)
    writer.body.append(mathml)


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    _write(writer, node, "inline")
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append('<div class="equation">')
    _write(writer, node, "block")
    writer.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer."""
    app.add_html_math_renderer("native", (_inline, None), (_block, None))
    app.config.html_math_renderer = "native"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
