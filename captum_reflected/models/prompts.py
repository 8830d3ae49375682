"""Inserts class names into prompts and averages the text features to one vector per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Template = str | Callable[[str], str]
"""A text with ``{}`` for the class name, or a function from the name to the text."""

DEFAULT_TEMPLATES: tuple[Template, ...] = ("a photo of a {}.",)
"""The default prompt of Radford et al. 2021, section 3.1.4."""

FEW_TEMPLATES: tuple[Template, ...] = (
    *DEFAULT_TEMPLATES,
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
)
"""A small prompt ensemble: framing, size and medium vary, so that their mean represents the class.

For ImageNet's classes, use CLIP's 80 prompts, ``open_clip.OPENAI_IMAGENET_TEMPLATES``.
"""

_TEXTS_PER_FORWARD = 256


def check_names(names: Sequence[str], allow_duplicates: bool) -> tuple[str, ...]:
    """Checks that class names are texts, not blank, and unique unless duplicates are allowed."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"the class names are {names!r}; wanted: a list of texts")
    if not names:
        raise ValueError("the list of class names is empty; wanted: one name per class")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class name {name!r} is a {type(name).__name__}; wanted: a text")
        if not name.strip():
            raise ValueError(f"class name {name!r} is blank; wanted: a text")
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates and not allow_duplicates:
        raise ValueError(
            f"class name(s) {', '.join(map(repr, duplicates))} given more than once; wanted: each "
            "once, or allow_duplicates=True"
        )
    return tuple(names)


def check_templates(templates: Sequence[Template]) -> tuple[Template, ...]:
    """Checks that there is at least one template, and that each is a function or has ``{}``."""
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        raise TypeError(f"templates is {templates!r}; wanted: a list of texts or functions")
    if not templates:
        raise ValueError("templates is empty; wanted: at least one text with {}")
    for template in templates:
        if not isinstance(template, str) and not callable(template):
            raise TypeError(f"template {template!r}; wanted: a text with {{}}, or a function")
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"template {template!r}; wanted: a text with {{}} for the class name")
    return tuple(templates)


def class_features(
    encode: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[Template]
) -> Tensor:
    """Encodes every class name in every template.

    Args:
        encode: a function from texts to features (number of texts, D).
        names: C class names.
        templates: as :func:`check_templates` returns them.

    Returns:
        Tensor: (C, D), for each class the normalised mean of the normalised text features.
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
    # Not str.format, since a text may contain other braces.
    return template.replace("{}", name) if isinstance(template, str) else template(name)
