"""Every experiment runs at its tiny scale.

A process of its own costs an experiment the imports, and the compilation of what others have
compiled. So of the quick ones only `pretrain` runs as a user runs it, in a process with one device
and all of XLA's optimisations; the others run in this one. The long ones have processes.
"""

import importlib
import json
import math
import subprocess
import sys

import pytest

from experiments import run
from lm.files import provenance

# A minute or more of CPU each, but for bench_decode with half of that.
LONG = ('bench_decode', 'equal_info', 'lexinvariant', 'speculative', 'transfer')
ALONE = ('pretrain', *LONG)


def tiny(name: str) -> bool:
    """Returns whether `name` has a tiny scale; tools with required files have their own tests."""
    return 'tiny' in importlib.import_module(f'experiments.{name}.config').SCALES


def start(name, arguments):
    if name in ALONE:
        command = [sys.executable, '-m', 'experiments.run', name, *arguments]
        done = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if hasattr(importlib.import_module(f'experiments.{name}.config'), 'MESH'):
        arguments = [*arguments, '--mesh', 'one']  # as there
    assert run.main([name, *arguments]) == 0


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name in run.folders()
        if tiny(name)
    ],
)
def test_runs_at_tiny_scale(name, tmp_path):
    start(name, ['--scale', 'tiny', '--out', str(tmp_path)])
    metrics = json.loads((tmp_path / 'result.json').read_text())
    assert metrics and all(math.isfinite(value) for value in metrics.values())
    assert json.loads((tmp_path / 'config.json').read_text())['scale'] == 'tiny'
