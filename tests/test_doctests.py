"""The examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import decoding
import experiments
import lm
import tokenization

# Modules that import packages which the tests do not install, and these packages.
OPTIONAL = {
    'experiments.bench_decode.hugging_face': 'torch, transformers',
    'experiments.bench_train.pytorch': 'torch',
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    found.name
    for package in (lm, tokenization, decoding, experiments)
    for found in pkgutil.walk_packages(package.__path__, f'{package.__name__}.')
    if found.name not in OPTIONAL
)


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert not failed
