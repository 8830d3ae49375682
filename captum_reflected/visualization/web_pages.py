"""What the web pages of the package share: their base style, and how their files are read."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

_PACKAGE = "captum_reflected.visualization"


def page_file(package: str, name: str) -> str:
    """The text of a file that is part of a page, such as ``page.js``."""
    return resources.files(package).joinpath(name).read_text("utf-8")


def page_style(package: str) -> str:
    """The style that all pages share, and after it that of one page, its ``page.css``."""
    return page_file(_PACKAGE, "page.css") + page_file(package, "page.css")


def template_environment(package: str, *, autoescape: bool = True) -> Environment:
    """Reads the templates of a package; lines that hold only a tag leave no trace."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def percent(share: float) -> Markup:
    """A share in percent; no line ends between the number and its unit."""
    return Markup("{:.1f}&nbsp;%").format(100 * share)
