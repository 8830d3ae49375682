"""How the documentation is built: ``sphinx-build --fail-on-warning docs docs/_build``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from sphinx.application import Sphinx

import captum_reflected

project = "captum_reflected"
author = "the captum_reflected developers"
copyright = author
version = release = captum_reflected.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    # Of this folder:
    "captum_docstrings",
    "check_links",
    "command_help",
    "native_math",
    "notebooks",
]
exclude_patterns = ["_build", "results"]

# Pages of the navigation that may not be there.
_OPTIONAL = ("speed",)

# Docstrings are in Captum's form, which gives the types: signatures need not repeat them.
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# What is named as captum_reflected's must be there; other libraries' documentation is not at hand.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!captum_reflected\b).*")]

# Notebooks are stored with their pictures.
nb_execution_mode = "off"
nb_output_stderr = "remove"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"captum_reflected {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def _without_missing_pages(app: Sphinx, name: str, source: list[str]) -> None:
    if name == "index":
        missing = {page for page in _OPTIONAL if page not in app.project.docnames}
        source[0] = "".join(
            line for line in source[0].splitlines(keepends=True) if line.strip() not in missing
        )


def setup(app: Sphinx) -> None:
    """Leaves out of the navigation what is not there."""
    app.connect("source-read", _without_missing_pages)
