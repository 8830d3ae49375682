"""Class names put into texts, and the texts' features averaged to one vector per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Template = str | Callable[[str], str]
"""A text with ``{}`` where the class name goes, or a function from the name to the text."""

DEFAULT_TEMPLATES: tuple[Template, ...] = ("a photo of a {}.",)
"""The default prompt of Radford et al. 2021, section 3.1.4."""

FEW_TEMPLATES: tuple[Template, ...] = (
    *DEFAULT_TEMPLATES,
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
)
"""A small ensemble: framing, size and medium vary, so that their mean is the class itself.

For ImageNet's classes take CLIP's own 80, ``open_clip.OPENAI_IMAGENET_TEMPLATES``.
"""

_TEXTS_PER_FORWARD = 256


def check_names(names: Sequence[str], allow_duplicates: bool) -> tuple[str, ...]:
    """The class names, each a text that is not blank, and none twice unless that is allowed."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"the class names are {names!r}; wanted: a list of texts")
    if not names:
        raise ValueError("the list of class names is empty; wanted: one name a class")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class name {name!r} is a {type(name).__name__}; wanted: a text")
        if not name.strip():
            raise ValueError(f"class name {name!r} is blank; wanted: a text")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice and not allow_duplicates:
        raise ValueError(
            f"class name(s) {', '.join(map(repr, twice))} given more than once; wanted: each "
            "once, or allow_duplicates=True"
        )
    return tuple(names)


def check_templates(templates: Sequence[Template]) -> tuple[Template, ...]:
    """The templates, at least one, each a function or a text with ``{}``."""
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        raise TypeError(f"templates is {templates!r}; wanted: a list of texts or functions")
    if not templates:
        raise ValueError("templates is empty; wanted: at least one text with {}")
    for template in templates:
        if not isinstance(template, str) and not callable(template):
            raise TypeError(f"template {template!r}; wanted: a text with {{}}, or a function")
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name")
    return tuple(templates)


def class_features(
    encode: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[Template]
) -> Tensor:
    """Encodes every class name in every template.

    Args:
        encode: from texts to features (number of texts, D).
        names: C class names.
        templates: as :func:`check_templates` returns them.

    Returns:
        Tensor: (C, D), for each class the mean of its texts' unit features, scaled to length 1.
    """
    classes_per_forward = max(1, _TEXTS_PER_FORWARD // len(templates))
    features = []
    with torch.no_grad():
        for start in range(0, len(names), classes_per_forward):
            chunk = names[start : start + classes_per_forward]
            texts = [_fill(template, name) for name in chunk for template in templates]
            encoded = F.normalize(encode(texts), dim=-1)
            features.append(encoded.unflatten(0, (len(chunk), len(templates))).mean(dim=1))
    return F.normalize(torch.cat(features), dim=-1)


def _fill(template: Template, name: str) -> str:
    # Not str.format: other braces in a text are just text.
    return template.replace("{}", name) if isinstance(template, str) else template(name)
