"""Runs of several processes: how they join, which one writes, and how a lost one is reported.

Each host of a pod starts the same command, and all processes compute. Process 0 writes everything
except checkpoints to a shared folder; the other processes wait and then read it.
"""

import atexit
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm.devices.preemption import Preempted
from lm.files import atomic

ADDRESS, COUNT, INDEX = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
# Set by launchers to the number of processes; JAX detects the rest.
_LAUNCHERS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
# A process without a heartbeat for this long is lost. JAX sends them from its own threads.
_HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 40
_SHARED_SECONDS = 30.0  # for a new file to appear on other hosts, which may cache directories
# Words in errors of JAX that are caused by another process.
_SIGNS = ('gloo', 'coordination', 'heartbeat', 'barrier', 'connection', 'socket')
_START_AGAIN = 'restart all of them: the run resumes from its last checkpoint'


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes of a run if the environment configures several (`named`).

    Call it once, before any other use of JAX. If a process is lost, the others exit within a
    minute, with exit code 1 or that of an abort, and report it on the last line of stderr: JAX
    aborts a process that cannot reach process 0.

    Raises:
      SystemExit: JAX raised an error that was caused by another process.
    """
    arguments = named(os.environ)
    if arguments is None:
        yield
        return
    keeper = _keeper()
    jax.config.update('jax_enable_preemption_service', False)  # it would handle SIGTERM itself
    count = arguments.get('num_processes')
    print(f'waiting for {"the" if count is None else count} processes', file=sys.stderr)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
        yield
        wait('the end')  # without a time limit; the shutdown waits for seconds only
        jax.distributed.shutdown()
    except Preempted:
        _tell(keeper, 'ended')  # `preemption.leave` follows and runs no atexit handlers
        raise
    except BaseException as error:
        # Runs before JAX's handler, which would wait for processes that wait for this one.
        atexit.register(_leave, keeper, _exit_code(error))
        if isinstance(error, jax.errors.JaxRuntimeError) and _is_of_another(error):
            # Not printed here: JAX's threads may still print, or abort this process.
            _tell(
                keeper,
                f'error: {_me()} lost another process, whose own error says why; {_START_AGAIN} '
                f'({str(error).partition(chr(10))[0][:200]})',
            )
            raise SystemExit(1) from error
        raise
    keeper.communicate(b'ended\n')


def named(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a single process.

    Several processes are configured by JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0); or JAX detects them, from the variables of a TPU
    slice's VMs, of a Slurm step or of Open MPI.

    Raises:
      ValueError: only some of the three variables are set, or their values are invalid.
    """
    given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
    # libtpu writes a warning into this variable on machines that are not TPU VMs
    hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
    found = len(hosts) > 1 and not any(' ' in host for host in hosts)
    found |= any(environment.get(name, '1') not in ('', '1') for name in _LAUNCHERS)
    if not given:
        return {} if found else None
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing and not found:
        raise ValueError(
            f'{", ".join(given)} set, but not {", ".join(missing)}: set all three on each host, '
            'or none for a single process'
        )
    for name in (COUNT, INDEX):
        if name in given and not given[name].isdecimal():
            raise ValueError(f'{name}={given[name]!r}: expected a number')
    count, index = (int(given[name]) if name in given else None for name in (COUNT, INDEX))
    if count == 0:
        raise ValueError(f'{COUNT}=0: expected at least 1')
    if count is not None and index is not None and index >= count:
        raise ValueError(f'{INDEX}={index}: expected 0 to {count - 1}, {COUNT} - 1')
    host, _, port = given.get(ADDRESS, 'host:1').rpartition(':')
    # JAX would try for minutes to reach an invalid address
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f'{ADDRESS}={given[ADDRESS]!r}: expected host:port of process 0')
    return {'coordinator_address': given.get(ADDRESS), 'num_processes': count, 'process_id': index}


def is_first() -> bool:
    """Returns whether this is process 0, which writes."""
    return jax.process_index() == 0


def wait(place: str) -> None:
    """Barrier: returns once all processes have reached `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def agree(value: bool) -> bool:
    """Broadcasts the value of process 0 to all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def whole(x: jax.Array) -> np.ndarray:
    """Returns the whole array on this host; all-gathers it if other processes hold shards."""
    if jax.process_count() > 1 and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a folder that all processes fill; a rename then puts it in the place of `path`.

    Process 0 creates and renames it by `atomic.new_folder`.
    """
    place = os.fspath(path)
    with atomic.new_folder(path) if is_first() else contextlib.nullcontext() as mine:
        wait(f'{place} begun')
        yield atomic.being_filled(path) if mine is None else mine
        wait(f'{place} filled')
    wait(f'{place} renamed')


def check_together(folder: epath.Path, command: str) -> None:
    """Checks that all processes run the same command and see the files that process 0 writes.

    Args:
      folder: where process 0 writes.
      command: this process's command, compared with that of process 0.

    Raises:
      ValueError: some do not; names them. Raised by all processes.
    """
    if jax.process_count() == 1:
        return
    of_each = _gathered(zlib.crc32(command.encode()))
    _none_of(
        np.flatnonzero(of_each != of_each[0]),
        'arguments differ from those of process 0',
        'start the same command on each host',
    )
    token = int(_gathered(secrets.randbits(32))[0])
    file = folder / f'.shared.{token:08x}'
    if is_first():
        file.touch()
    wait('a file for all')
    seen = _gathered(_appears(file))
    if is_first():
        file.unlink()
    _none_of(
        np.flatnonzero(seen == 0),
        f'{folder} is not the folder that process 0 writes',
        'give an --out that all hosts share, on a network disk or gs://',
    )


def _me() -> str:
    return f'process {jax.process_index()} of {jax.process_count()}'


def _is_of_another(error: BaseException) -> bool:
    return any(sign in str(error).lower() for sign in _SIGNS)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _keeper() -> subprocess.Popen:
    """Starts a shell that outlives this process and then prints the first line it was sent.

    'ended' keeps it silent. If it was sent nothing, it prints a line of its own: JAX aborted this
    process, or the system killed it for memory, so that no Python code could report it.
    """
    line = (
        f'error: process {os.getpid()} on {socket.gethostname()} ended unexpectedly: killed, or '
        f'aborted by JAX because another process of the run was lost; {_START_AGAIN}'
    )
    script = (
        'read -r line || line=$1; cat >/dev/null; [ "$line" = ended ] || printf "%s\\n" "$line" >&2'
    )
    return subprocess.Popen(
        ['sh', '-c', script, 'sh', line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def _tell(keeper: subprocess.Popen, line: str) -> None:
    assert keeper.stdin is not None
    keeper.stdin.write(f'{line}\n'.encode())
    keeper.stdin.flush()


def _leave(keeper: subprocess.Popen, code: int) -> None:
    _tell(keeper, 'ended')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _gathered(value: int) -> np.ndarray:
    """All-gathers a 32-bit number of each process."""
    return multihost_utils.process_allgather(np.uint32(value))


def _none_of(indices: np.ndarray, problem: str, advice: str) -> None:
    if len(indices):
        raise ValueError(f'process {", ".join(map(str, indices))}: {problem}; {advice}')


def _appears(file: epath.Path) -> bool:
    deadline = time.monotonic() + _SHARED_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
