"""Packages that only some parts need, which an extra of this package installs."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(
    module: str, package: str, *, extra: str, error: type[Exception] = ImportError
) -> Any:
    """Imports a module of an optional package.

    Args:
        module: of the package, or of this one where that imports the package.
        package: its name, as pip takes it.
        extra: the extra that installs it.
        error: what is raised.

    Raises:
        Exception: ``error``, where the module cannot be imported; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise error(
            f"this needs the package {package}, which cannot be imported ({cause}): "
            f'pip install "captum-reflected[{extra}]"'
        ) from cause
