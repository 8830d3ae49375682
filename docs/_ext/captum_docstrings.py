"""Makes "Returns:" in Captum's form one description, which napoleon would take apart at its colon.

Captum names the result
(``*Tensor* or *tuple[Tensor]* of **attributions**:``), then describes it in a list of one item,
deeply indented.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

# The result's type up to the first colon that is not inside parentheses.
_TYPE = re.compile(r"^((?:[^():]|\([^()]*\))*):(?:\s+|$)(.*)$")


def one_description(lines: list[str]) -> list[str]:
    """The lines of a docstring, the one section rewritten."""
    if "Returns:" not in lines:
        return lines
    start = lines.index("Returns:") + 1
    end = next(
        (n for n in range(start, len(lines)) if lines[n] and not lines[n].startswith(" ")),
        len(lines),
    )
    found = [line.strip() for line in lines[start:end] if line.strip()]
    if found and (named := _TYPE.match(found[0])):
        kind, text = named.groups()
        if "*" not in kind:
            kind = f"*{kind}*"
        rest = found[1:]
        if rest and rest[0].startswith("- **"):
            rest = rest[1:]
        # Two lines, since napoleon looks for a colon in the first.
        found = [f"{kind} --", *([text] if text else []), *rest]
    return [*lines[:start], *(f"    {line}" for line in found), "", *lines[end:]]


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = one_description(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Runs before napoleon."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
