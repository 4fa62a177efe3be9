"""Every experiment runs at its tiny scale, and one of them as a user runs it.

A process of its own costs each of them the imports and the compilation of what the others have
compiled. So only the first that newcomers meet (`make demo`) runs in one, with all of XLA's
optimisations; the others run in this process, on one device as there.
"""

import importlib
import json
import math
import subprocess
import sys

import pytest

from experiments import run
from lm.files import provenance

ALONE = 'equal_info'


def tiny(name: str) -> bool:
    """Returns whether `name` has a tiny scale; tools with required files have their own tests."""
    return 'tiny' in importlib.import_module(f'experiments.{name}.config').SCALES


def runs(name, out):
    arguments = [name, '--scale', 'tiny', '--out', str(out)]
    if name == ALONE:
        command = [sys.executable, '-m', 'experiments.run', *arguments]
        done = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if hasattr(importlib.import_module(f'experiments.{name}.config'), 'MESH'):
        arguments += ['--mesh', 'one']
    assert run.main(arguments) == 0


@pytest.mark.parametrize('name', [name for name in run.folders() if tiny(name)])
def test_runs_at_tiny_scale(name, tmp_path):
    runs(name, tmp_path)
    metrics = json.loads((tmp_path / 'result.json').read_text())
    assert metrics and all(math.isfinite(value) for value in metrics.values())
    assert json.loads((tmp_path / 'config.json').read_text())['scale'] == 'tiny'
