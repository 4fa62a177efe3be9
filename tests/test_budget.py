"""Tests above their budget fail and say how to mend it; others pass, whatever ran before."""

import os
import re
import subprocess
import sys

import pytest

from lm.files import provenance

CONFTEST = """
import pytest
from tests import budget

budget.TEST, budget.FIXTURE = budget.Cost(0.5, 2), budget.Cost(60.0, 2)

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes long')
    config.pluginmanager.register(budget.Budget())

def pytest_terminal_summary(terminalreporter):
    budget.summary(terminalreporter)
"""
TESTS = """
import jax
import jax.numpy as jnp
import pytest
from tests import budget

def compile_three():
    for factor in (2.0, 3.0, 4.0):
        jax.jit(lambda x: x * factor + 1)(1.0)

@pytest.fixture(scope='module')
def expensive():
    compile_three()

@pytest.fixture
def own():
    compile_three()

def test_within():
    jax.jit(lambda x: x + 1)(1.0)

def test_operations():
    x = jnp.zeros(3) + 1
    jnp.where(x > 0, x, -x * 2 - 1), jnp.minimum(x, 2) / 3, jnp.einsum('a,a->', x, x)

def test_cold():
    compile_three()

def test_warm():
    jax.clear_caches()
    compile_three()

def test_busy():
    for _ in range(20):
        budget.fixed_loop()

@pytest.mark.slow
def test_marked():
    compile_three()

def test_first_with_fixture(expensive):
    pass

def test_second_with_fixture(expensive):
    pass

def test_own_fixture(own):
    pass

def test_wrong():
    compile_three()
    assert 1 == 2, 'its own error'
"""
# Test -> what its message says; None where it passes.
EXPECTED = {
    'test_within': None,
    'test_operations': None,
    'test_cold': '3 programs; its budget is 0.5 s of CPU and 2 programs',
    'test_warm': '3 programs; its budget',
    'test_busy': r's at the speed of this machine\)',
    'test_marked': None,
    'test_first_with_fixture': 'the fixture expensive took .* 3 programs',
    'test_second_with_fixture': None,
    'test_own_fixture': 'the test took .* 3 programs',
    'test_wrong': 'its own error',
}


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    """What a run of these tests prints, and compiled programs are kept on disk."""
    folder = tmp_path_factory.mktemp('budget')
    (folder / 'conftest.py').write_text(CONFTEST)
    (folder / 'test_it.py').write_text(TESTS)
    settings = {
        'PYTHONPATH': str(provenance.ROOT), 'JAX_PLATFORMS': 'cpu', 'COLUMNS': '400',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }  # fmt: skip
    command = [
        sys.executable, '-m', 'pytest', '-rA', '-c', os.devnull, '--rootdir', str(folder), '-p',
        'no:cacheprovider', '--tb=short', str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 1 and (folder / 'programs').exists(), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize('name', EXPECTED)
def test_tests_above_their_budget_fail(printed, name):
    outcome = re.search(rf'^(PASSED|FAILED) test_it.py::{name}\b(.*)$', printed, re.M)
    assert outcome, printed
    if EXPECTED[name] is None:
        assert outcome[1] == 'PASSED', printed
    else:
        assert outcome[1] == 'FAILED' and re.search(EXPECTED[name], outcome[2]), printed
        assert ('pytest.mark.slow' in outcome[2]) == (name != 'test_wrong')


def test_the_most_expensive_are_listed(printed):
    listed = printed.partition('the most expensive tests')[2]
    assert re.search(r'^ +\d+\.\d s +0 programs  test_it.py::test_busy$', listed, re.M), printed
    assert 'test_within' not in listed.partition('short test summary')[0]
