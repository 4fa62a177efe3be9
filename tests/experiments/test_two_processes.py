"""Two real processes train together: undisturbed, and with one killed and both restarted.

Each runs `python -m experiments.run pretrain --scale tiny ...`, told apart by the environment.
"""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments import corpora, language_model
from experiments.language_model import Fitted
from lm.checkpoints import bundle
from lm.devices import mesh, processes
from lm.files import provenance
from lm.losses import next_token as losses
from lm.training import metrics
from tokenization import loading

STEPS = 40
MINUTE = 60


def start(folder, out, port, *more):
    """Starts the two processes of a run; their stderr goes to files."""
    command = [
        sys.executable, '-m', 'experiments.run', 'pretrain', '--scale', 'tiny',
        '--data', str(folder / 'text' / '*.txt'), '--out', str(out), '--train.steps', str(STEPS),
        '--train.log-every', '1', '--train.checkpoint-every', '10',
    ]  # fmt: skip
    shared = {**os.environ, processes.ADDRESS: f'localhost:{port}', processes.COUNT: '2'}
    started = []
    for i, extra in enumerate(more or ([], [])):
        with (out.parent / f'{out.name}.{i}').open('w') as errors:
            started.append(subprocess.Popen(
                [*command, *extra], cwd=provenance.ROOT, env={**shared, processes.INDEX: str(i)},
                stdout=subprocess.DEVNULL, stderr=errors,
            ))  # fmt: skip
    return started


def error_of(out, index):
    return (out.parent / f'{out.name}.{index}').read_text().strip().splitlines()[-1]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp('two')
    (made / 'text').mkdir()
    for i in range(40):
        (made / 'text' / f'{i}.txt').write_text(f'the {i} cats sat on {i * i} mats. ' * 30)
    return made


def finish(started):
    try:
        return [process.wait(timeout=5 * MINUTE) for process in started]
    finally:
        for process in started:
            process.kill()


def results(out):
    """Returns what kills must not change: the exact parameters and the metrics."""
    described = json.loads((out / 'bundle' / 'config.json').read_text())
    return described['digest'], json.loads((out / 'result.json').read_text())['bits_per_byte/model']


def lose(started, lost, out, steps):
    """Kills one of two processes after `steps` steps; the other must stop with an error."""
    deadline = time.monotonic() + 5 * MINUTE
    while len(metrics.read_jsonl(out / 'metrics.jsonl')) < steps:
        assert time.monotonic() < deadline and [one.poll() for one in started] == [None, None]
        time.sleep(0.02)
    started[lost].kill()
    began, other = time.monotonic(), 1 - lost
    assert started[other].wait(timeout=2 * MINUTE) not in (0, None)
    while not error_of(out, other).startswith('error: process'):  # printed by the survivor
        assert time.monotonic() - began < MINUTE, error_of(out, other)
        time.sleep(0.1)
    assert time.monotonic() - began < MINUTE
    assert 'start all' in error_of(out, other)
    started[lost].wait()


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_as_if_nothing_had_happened(folder, port):
    whole, killed = folder / 'whole', folder / 'killed'
    assert finish(start(folder, whole, port)) == [0, 0]
    assert json.loads((whole / 'config.json').read_text())['process_count'] == 2
    assert sorted(p.name for p in (whole / 'bundle' / 'params').glob('ocdbt.process_*')) == [
        'ocdbt.process_0', 'ocdbt.process_1',
    ]  # fmt: skip

    # process 0 is the coordinator of all others
    for lost, steps in ((1, 13), (0, 16)):
        lose(start(folder, killed, port), lost, killed, steps)
        assert not (killed / 'result.json').exists()

    assert finish(start(folder, killed, port)) == [0, 0]
    assert results(killed) == results(whole)

    # one process can load the bundle that two have written
    loaded = bundle.load(whole / 'bundle', mesh.make(devices=jax.devices()[:1]))
    text = corpora.first_bytes(corpora.open_corpus(str(folder / 'text' / '*.txt')).valid, 2_000)
    ids = loading.load(loaded.tokenizer_path).encode_batch(text)
    here = mesh.make(devices=jax.devices()[:1])
    fitted = Fitted(loaded.config, loaded.params, 0.0)
    nats = language_model.nats(fitted, language_model.evaluation(ids, 256, 2, 16), here)
    bits = losses.bits_per_byte(nats, sum(map(len, text)))
    assert bits == pytest.approx(results(whole)[1], abs=1e-5)


def test_processes_that_were_started_differently_are_named(folder, port):
    out = folder / 'different'
    codes = finish(start(folder, out, port, ['--train.seed', '1'], ['--train.seed', '2']))
    assert 0 not in codes
    assert 'process 1: arguments differ from those of process 0' in error_of(out, 0)
