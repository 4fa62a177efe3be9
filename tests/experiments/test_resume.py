"""A run that is killed with SIGKILL and started again ends as if nothing had happened."""

import json
import subprocess
import sys
import time

import pytest

from lm import metrics, provenance


def command(out, steps):
    return [
        sys.executable, '-m', 'experiments.run', 'pretrain', '--scale', 'tiny', '--out', str(out),
        '--data', str(out.parent / 'text' / '*.txt'), '--train.steps', str(steps),
        '--train.log-every', '1', '--train.checkpoint-every', '50',
    ]  # fmt: skip


def finish(out, steps=400):
    done = subprocess.run(command(out, steps), cwd=provenance.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / 'result.json').read_text())['bits_per_byte/model']
    return result, (out / 'metrics.jsonl').read_bytes()


@pytest.fixture
def texts(tmp_path):
    (tmp_path / 'text').mkdir()
    for i in range(40):
        (tmp_path / 'text' / f'{i}.txt').write_text(f'the {i} cats sat on {i * i} mats. ' * 30)
    return tmp_path


def test_sigkill_changes_nothing(texts):
    run = subprocess.Popen(
        command(texts / 'killed', 400), cwd=provenance.ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(metrics.read_jsonl(texts / 'killed' / 'metrics.jsonl')) < 120:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert not (texts / 'killed' / 'result.json').exists()
    assert finish(texts / 'killed') == finish(texts / 'whole')


def test_another_config_is_refused_before_anything_is_written(texts):
    finish(texts / 'run', steps=2)
    before = (texts / 'run' / 'config.json').read_text()
    done = subprocess.run(
        command(texts / 'run', 3), cwd=provenance.ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'another train' in last and 'Traceback' not in done.stderr
    assert (texts / 'run' / 'config.json').read_text() == before
