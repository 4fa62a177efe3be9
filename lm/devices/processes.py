"""Several processes of one run: how they join, who writes, and what is said when one is lost.

Each host of a pod starts the same command, and all of them compute. What is no checkpoint, the
first process writes, into a folder that all of them see; the others wait for it, and read.
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
# Set to the number of processes by what starts them; JAX finds out the rest.
_LAUNCHERS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
# A process that is silent for so long counts as lost. Threads of JAX's own keep in touch.
_HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 40
_SHARED_SECONDS = 30.0  # in which a new file is seen by other hosts, which may cache folders
# What an error of JAX speaks of when the reason is another process.
_SIGNS = ('gloo', 'coordination', 'heartbeat', 'barrier', 'connection', 'socket')
_START_AGAIN = 'start all of them again: the run goes on from what it has saved'


def named(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what `jax.distributed.initialize` is to know; None for a process by itself.

    Several processes are named by JAX_COORDINATOR_ADDRESS (host:port of the first one),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0); or by what JAX reads by itself: the variables of
    a TPU slice's VMs, of a Slurm step, of Open MPI.

    Raises:
      ValueError: some of the three variables are set and others not, or they are no such address
        and numbers.
    """
    given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
    # libtpu writes a warning into this variable on machines that are no TPU VM
    hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
    found = len(hosts) > 1 and not any(' ' in host for host in hosts)
    found |= any(environment.get(name, '1') not in ('', '1') for name in _LAUNCHERS)
    if not given:
        return {} if found else None
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing and not found:
        raise ValueError(
            f'{", ".join(given)} set, but not {", ".join(missing)}: set all three on each host, '
            'or none for one process'
        )
    for name in (COUNT, INDEX):
        if name in given and not given[name].isdecimal():
            raise ValueError(f'{name}={given[name]!r}: expected a number')
    count, index = (int(given[name]) if name in given else None for name in (COUNT, INDEX))
    if count == 0:
        raise ValueError(f'{COUNT}=0: expected at least 1')
    if count is not None and index is not None and index >= count:
        raise ValueError(f'{INDEX}={index}: expected 0 to {COUNT} - 1, which is {count - 1}')
    host, _, port = given.get(ADDRESS, 'host:1').rpartition(':')
    # JAX would try for minutes to reach what is no address
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f'{ADDRESS}={given[ADDRESS]!r}: expected host:port of the first process')
    return {'coordinator_address': given.get(ADDRESS), 'num_processes': count, 'process_id': index}


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes of a run where the environment names several (`named`).

    Call it once, before any other use of JAX. If one of the processes is lost, the others end
    within a minute, with an exit code of 1 or that of an abort, and a last line on stderr that
    says so: JAX aborts a process that cannot reach the first one.

    Raises:
      SystemExit: an error of JAX whose reason is another process.
    """
    arguments = named(os.environ)
    if arguments is None:
        yield
        return
    keeper = _keeper()
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
    count = arguments.get('num_processes')
    print(f'waiting for {"the" if count is None else count} processes', file=sys.stderr)
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
        yield
        wait('the end')  # for as long as it takes; the shutdown waits for seconds only
        jax.distributed.shutdown()
    except Preempted:
        _tell(keeper, 'ended')  # what comes is no atexit: `preemption.leave`
        raise
    except BaseException as error:
        # Before JAX's own: it would wait for processes that wait for this one.
        atexit.register(_leave, keeper, _exit_code(error))
        if isinstance(error, jax.errors.JaxRuntimeError) and _is_of_another(error):
            # Not printed here: until the end JAX's threads print, and abort this process.
            _tell(
                keeper,
                f'error: {_me()} lost another one, whose own error says why; {_START_AGAIN} '
                f'({str(error).partition(chr(10))[0][:200]})',
            )
            raise SystemExit(1) from error
        raise
    keeper.communicate(b'ended\n')


def _me() -> str:
    return f'process {jax.process_index()} of {jax.process_count()}'


def _is_of_another(error: BaseException) -> bool:
    return any(sign in str(error).lower() for sign in _SIGNS)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _keeper() -> subprocess.Popen:
    """Starts a shell that outlives this process, and then says the first line it was told.

    'ended' keeps it silent. Where it was told nothing, JAX aborted this process, or the system
    killed it for memory: no Python ran any more.
    """
    line = (
        f'error: process {os.getpid()} on {socket.gethostname()} ended in the middle: killed, or '
        f'stopped by JAX because another process of the run is lost; {_START_AGAIN}'
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


def is_first() -> bool:
    """Returns whether this process is the one that writes."""
    return jax.process_index() == 0


def wait(place: str) -> None:
    """Returns once all processes are at the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def agree(value: bool) -> bool:
    """Returns what the first process says, to all."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def whole(x: jax.Array) -> np.ndarray:
    """Returns an array on this host; parts that other processes hold are fetched by all of them."""
    if jax.process_count() > 1 and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a folder that all processes fill, and that then takes the place of `path`.

    See `atomic.new_folder`, which the first process goes through.
    """
    place = os.fspath(path)
    with atomic.new_folder(path) if is_first() else contextlib.nullcontext() as mine:
        wait(f'{place} begun')
        yield atomic.being_filled(path) if mine is None else mine
        wait(f'{place} filled')
    wait(f'{place} renamed')


def check_together(folder: epath.Path, command: str) -> None:
    """Makes sure that all processes were started alike, and see what the first one writes.

    Args:
      folder: where it writes.
      command: what the processes were asked to do; the same text in each.

    Raises:
      ValueError: they were not, or do not; names the processes. In all of them.
    """
    if jax.process_count() == 1:
        return
    of_each = _gathered(zlib.crc32(command.encode()))
    _none_of(
        np.flatnonzero(of_each != of_each[0]),
        'other arguments than process 0 was given',
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
        f'{folder} is not what process 0 has there',
        'give an --out that all hosts share, on a network disk or gs://',
    )


def _gathered(value: int) -> np.ndarray:
    """Returns a number of 32 bits of each process."""
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
