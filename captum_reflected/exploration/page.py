"""The page: one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib

import matplotlib
import numpy as np
from markupsafe import Markup

from captum_reflected import __version__
from captum_reflected.exploration.content import make_content
from captum_reflected.exploration.encoding import pack
from captum_reflected.exploration.measuring import Measurements
from captum_reflected.visualization.overlay import HEAT_COLORS
from captum_reflected.visualization.text import printable
from captum_reflected.visualization.web_pages import (
    page_file,
    page_style,
    percent,
    template_environment,
)

_PACKAGE = "captum_reflected.exploration"

MOST_BYTES = 2_900_000
"""A page has at most as many bytes."""

# For all but the measurements: text, style and script, with room for long names of classes.
_REST = 90_000


def html_page(measured: Measurements, *, title: str) -> str:
    """The page.

    Args:
        measured: what it shows.
        title: its heading.

    Returns:
        str: HTML in which the title, the classes' names and the methods' titles are escaped.

    Raises:
        ValueError: it would be too large.
    """
    content = make_content(measured, MOST_BYTES - _REST)
    style, script = page_style(_PACKAGE), page_file(_PACKAGE, "page.js")
    template = template_environment(_PACKAGE).get_template("page.html.jinja")
    page = template.render(
        title=printable(title),
        classes=list(zip(content.labels, measured.classes, strict=True)),
        methods=[printable(method) for method in measured.methods],
        grid=measured.grid_size,
        steps=len(measured.counts) - 1,
        layers=range(measured.first_layer + 1, measured.first_layer + len(measured.partial) + 1),
        notes=content.notes,
        # In a script element, "<" could end the element, or begin a comment.
        data=Markup(content.data.replace("<", "\\u003c")),
        colors=_colors(),
        style=Markup(style),
        style_hash=_source_hash(style),
        script=Markup(script),
        script_hash=_source_hash(script),
        printable=printable,
        breakable=_breakable,
        percent=percent,
        version=__version__,
    )
    size = len(page.encode("utf-8"))
    if size > MOST_BYTES:
        raise ValueError(
            f"the page has {size:,} bytes; wanted: at most {MOST_BYTES:,}, with shorter names of "
            "classes or a shorter title"
        )
    return page


def _source_hash(text: str) -> str:
    """As the content security policy names a style or a script."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _colors() -> str:
    """The 256 colours of a map, red, green and blue."""
    colors = matplotlib.colormaps[HEAT_COLORS](np.arange(256), bytes=True)
    return pack(np.asarray(colors)[:, :3])


def _breakable(text: str) -> Markup:
    """A text that may break after underscores, as file names and models' names have them."""
    return Markup("_<wbr>").join(text.split("_"))
