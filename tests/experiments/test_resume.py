"""A folder belongs to one config; runs with different configs are not mixed.

`tests/lm/devices/test_preemption.py` tests that a killed run ends like an undisturbed one.
"""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments import resume
from experiments.pretrain import config
from lm.files import provenance


def command(out, steps):
    return [
        sys.executable, '-m', 'experiments.run', 'pretrain', '--scale', 'tiny', '--out', str(out),
        '--data', str(out.parent / 'text' / '*.txt'), '--train.steps', str(steps),
        '--train.log-every', '1', '--train.checkpoint-every', '50',
    ]  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    (tmp_path / 'text').mkdir()
    for i in range(40):
        (tmp_path / 'text' / f'{i}.txt').write_text(f'the {i} cats sat on {i * i} mats. ' * 30)
    return tmp_path


def test_a_run_of_an_older_version_lacks_settings_and_goes_on(tmp_path):
    now = config.SCALES['tiny']
    resume.claim(tmp_path, now)
    started = json.loads((tmp_path / 'started.json').read_text())
    del started['train']['explodes_at'], started['tfds']
    (tmp_path / 'started.json').write_text(json.dumps(started))
    resume.claim(tmp_path, now)
    longer = dataclasses.replace(now.train, length=now.train.length + 1)
    with pytest.raises(ValueError, match='another train'):
        resume.claim(tmp_path, dataclasses.replace(now, train=longer))


def test_another_config_is_refused_before_anything_is_written(texts):
    done = subprocess.run(command(texts / 'run', 2), cwd=provenance.ROOT)
    assert done.returncode == 0
    before = (texts / 'run' / 'config.json').read_text()
    done = subprocess.run(
        command(texts / 'run', 3), cwd=provenance.ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'another train' in last and 'Traceback' not in done.stderr
    assert (texts / 'run' / 'config.json').read_text() == before
