"""Every experiment runs at its tiny scale as a user runs it: in a new process, on one device."""

import importlib
import json
import math
import subprocess
import sys

import pytest

from experiments import run
from lm.files import provenance


def tiny(name: str) -> bool:
    """Returns whether `name` has a tiny scale; tools with required files have their own tests."""
    return 'tiny' in importlib.import_module(f'experiments.{name}.config').SCALES


@pytest.mark.parametrize('name', [name for name in run.folders() if tiny(name)])
def test_runs_at_tiny_scale(name, tmp_path):
    command = [sys.executable, '-m', 'experiments.run', name, '--scale', 'tiny', '--out', tmp_path]
    done = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / 'result.json').read_text())
    assert metrics and all(math.isfinite(value) for value in metrics.values())
    assert json.loads((tmp_path / 'config.json').read_text())['scale'] == 'tiny'
