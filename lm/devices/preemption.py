"""SIGTERM: a machine about to be preempted asks its programs to stop.

A command runs inside `ends_cleanly`, where the signal raises `Preempted` at the next bytecode: all
its outputs appear on disk complete or not at all, so it may stop anywhere. Training runs inside
`noticed`, where the signal sets a flag, on which the loop acts between two steps, after a save.
Before the first step is done there is nothing to save, and compilation may take minutes, so there
the signal ends the command as well.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Seconds from the signal to a forced exit if the interpreter does not respond, as in a compilation.
# Machines leave 30 between SIGTERM and SIGKILL.
PATIENCE = 15.0


class Preempted(SystemExit):
    """SIGTERM arrived and everything worth keeping is on disk. Exits with code 0."""

    def __init__(self, message: str = 'stopped by SIGTERM'):
        super().__init__(0)
        self._message = message

    def __str__(self) -> str:
        return f'{self._message}; run the same command again to resume'


@contextlib.contextmanager
def ends_cleanly(patience: float = PATIENCE) -> Iterator[None]:
    """Raises `Preempted` inside the block when SIGTERM arrives.

    If the interpreter has not left the block `patience` seconds later, a watchdog thread exits the
    process with code 0.
    """

    def stop(number, frame):
        raise Preempted

    if not _may_handle():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    left = threading.Event()
    watch = threading.Thread(target=_watch, args=(read, left, patience), daemon=True)
    watch.start()
    try:
        with _handler(stop), _waking(write):
            yield
    finally:
        left.set()
        os.write(write, b'\0')  # wakes the watchdog
        watch.join()
        os.close(write)
        os.close(read)


class Notice:
    """Whether SIGTERM arrived, on this process or on any other.

    Attributes:
      given: whether it arrived.
      begun: whether the first step is done.
    """

    def __init__(self, begin: Callable[[], Any]):
        self.given = self.begun = False
        self._begin = begin
        self._ask: Callable[[bool], Any] | None = None
        self._asked: Any = False

    def agreed(self) -> bool:
        """Returns whether to stop after this step; every process calls it once per step.

        A single process decides alone. Several must stop after the same step: each step starts an
        asynchronous all-reduce of their flags, whose result is read one step later.
        """
        import jax  # here, since commands that do not train do without it

        if not self.begun:
            self.begun = True
            self._begin()
        if jax.process_count() == 1:
            return self.given
        self._ask = self._ask or _any_process()
        before, self._asked = self._asked, self._ask(self.given)
        stop = bool(before)
        self.given |= stop
        return stop


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Defers SIGTERM: sets a flag inside the block and raises `Preempted` at its end.

    Deferral starts with the first call of `agreed`; until then the signal raises at once.
    """
    with contextlib.ExitStack() as rest:
        notice = Notice(lambda: rest.enter_context(_waking(-1)))

        def note(number, frame):
            if not notice.begun:
                raise Preempted
            notice.given = True

        rest.enter_context(_handler(note))
        yield notice
    if notice.given:
        raise Preempted


def leave(stop: Preempted) -> NoReturn:
    """Prints `stop`, where it is caught, and exits with code 0 without any cleanup.

    An interrupted compilation continues in a thread of XLA's, which uses what its frames hold: an
    ordinary exit would wait minutes for it, or crash.
    """
    sys.stdout.flush()
    print(stop, file=sys.stderr, flush=True)
    os._exit(0)


def _watch(read: int, left: threading.Event, patience: float) -> None:
    """Exits the process `patience` seconds after SIGTERM, unless the block is left by then."""
    while not left.is_set():
        if signal.SIGTERM in os.read(read, 64) and not left.wait(patience):
            print(Preempted(), file=sys.stderr, flush=True)
            os._exit(0)


def _any_process() -> Callable[[bool], Any]:
    """Returns an asynchronous all-reduce: whether any process has set its flag."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    devices = jax.make_mesh((jax.device_count(),), ('all',), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (('all',), ()))
    any_set = jax.jit(lambda flags: flags.any(), out_shardings=whole)

    def ask(flag: bool):
        flags = np.full(jax.local_device_count(), flag)
        return any_set(jax.make_array_from_process_local_data(split, flags))

    return ask


@contextlib.contextmanager
def _handler(handler) -> Iterator[None]:
    if not _may_handle():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _waking(descriptor: int) -> Iterator[None]:
    """Writes each signal's number to a file descriptor, even while no bytecode runs."""
    if not _may_handle():
        yield
        return
    before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()
