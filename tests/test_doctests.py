"""The examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import tokenization

PACKAGES = (tokenization,)
MODULES = sorted(
    found.name
    for package in PACKAGES
    for found in pkgutil.walk_packages(package.__path__, f'{package.__name__}.')
)


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed
