"""SIGTERM ends a command with its work saved; SIGKILL costs time and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from lm.checkpoints import restore
from lm.devices import preemption
from lm.files import provenance
from tests import kill_harness


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler_stays():
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_interrupts_a_long_loop():
    again = pytest.raises(preemption.Preempted, match='run the same command again')
    with again as stop, preemption.ends_cleanly():
        terminate()
        while True:
            time.sleep(0.001)
    assert stop.value.code == 0


def test_sigterm_during_training_is_deferred_to_the_end_of_a_step():
    reached = []
    with pytest.raises(preemption.Preempted), preemption.ends_cleanly():
        with preemption.noticed() as notice:
            assert not notice.agreed()
            terminate()
            time.sleep(0.001)
            assert notice.agreed()
            reached.append('save')
        reached.append('after')
    assert reached == ['save']


def test_sigterm_before_the_first_step_acts_at_once():
    with pytest.raises(preemption.Preempted), preemption.ends_cleanly(), preemption.noticed():
        terminate()
        while True:
            time.sleep(0.001)


def test_sigterm_does_not_hide_an_error():
    with pytest.raises(ValueError, match='disk'), preemption.noticed() as notice:
        notice.agreed()
        terminate()
        raise ValueError('disk full')


def test_threads_other_than_the_main_one_may_train():
    done = []

    def work():
        with preemption.ends_cleanly(), preemption.noticed() as notice:
            done.append(notice.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]


# Runs no bytecode for a minute, as a compilation does.
STUCK = """
import hashlib, sys
from lm.devices import preemption
with preemption.ends_cleanly(patience=0.3), {block}:
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)
"""


@pytest.mark.parametrize('block', ['preemption.noticed()', 'open(sys.executable)'])
def test_a_call_that_does_not_return_is_interrupted_too(block):
    with subprocess.Popen(
        [sys.executable, '-c', STUCK.format(block=block)], cwd=provenance.ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == 'ready\n'
        time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=10) == 0
        assert 'run the same command again' in process.stderr.read()


# Compiles for a minute, on threads that the interpreter waits for when it exits.
COMPILES = """
import os, runpy, signal, sys, threading
import jax
from experiments.pretrain import main

def deep(x):
    for i in range(400):
        x = jax.numpy.sin(x @ x) + i * jax.numpy.cos(x).sum(axis=i % 2)
    return x.sum()

def compiles(config, out, mesh):
    lowered = jax.jit(jax.grad(deep)).lower(jax.numpy.ones((32, 32)))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    lowered.compile()

main.main = compiles
sys.argv[1:] = ['pretrain', '--scale', 'tiny']
runpy.run_module('experiments.run', run_name='__main__')
"""


def test_sigterm_during_compilation_exits_with_code_0(tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(provenance.ROOT)}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    done = subprocess.run(
        [sys.executable, '-c', COMPILES], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=40,
    )  # fmt: skip
    assert done.returncode == 0
    assert 'run the same command again' in done.stderr


def test_hosts_stop_after_the_same_step_when_one_gets_sigterm(tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, '-m', 'tests.preempted_host', str(port), str(index),
             str(tmp_path / 'run'), str(step)],
            cwd=provenance.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index, step in enumerate((0, 20))
    ]  # fmt: skip
    said = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    (step,) = restore.steps(epath.Path(tmp_path / 'run' / 'checkpoints'))
    assert step in (20, 21)


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_like_an_undisturbed_one(tmp_path):
    whole = kill_harness.Run(tmp_path, 'whole')
    whole.finish()
    tally = kill_harness.disturbed(tmp_path, whole, 'killed', seed=0)
    assert sum(tally.kills.values()) == 8 and set(tally.kills) == set(kill_harness.KILLS)
    assert not any(tally.differing.values()) and len(tally.differing) == 7
    assert not tally.torn and not tally.too_many_lost
    # SIGTERM: the current step is completed and saved
    assert tally.terms == 2 and tally.term_steps_lost == [0, 0] and not tally.term_codes
    assert max(tally.term_seconds) < 30
