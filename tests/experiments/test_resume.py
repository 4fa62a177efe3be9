"""A folder belongs to one config; runs with different configs are not mixed.

`tests/lm/devices/test_preemption.py` tests that a killed run ends like an undisturbed one.
"""

import dataclasses
import json

import pytest

from experiments import resume, run
from experiments.pretrain import config


def pretrain(out, steps):
    """Runs the command; returns its exit code."""
    return run.main([
        'pretrain', '--scale', 'tiny', '--out', str(out), '--mesh', 'one',
        '--data', str(out.parent / 'text' / '*.txt'), '--train.steps', str(steps),
        '--train.log-every', '1', '--train.checkpoint-every', '50',
    ])  # fmt: skip


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


def test_another_config_is_refused_before_anything_is_written(texts, capsys):
    assert pretrain(texts / 'run', 2) == 0
    before = (texts / 'run' / 'config.json').read_text()
    capsys.readouterr()
    assert pretrain(texts / 'run', 3) == 1
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'another train' in last and 'Traceback' not in error
    assert (texts / 'run' / 'config.json').read_text() == before
