"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from conftest import make_vit

import captum_reflected

MODULES = [
    module.name
    for module in pkgutil.walk_packages(captum_reflected.__path__, "captum_reflected.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    names = {"model": make_vit(num_classes=300), "images": torch.randn(2, 3, 32, 32)}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    examples = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(examples) >= 3
