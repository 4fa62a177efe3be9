"""SIGTERM: a machine that is about to be taken away asks its programs to end.

A command runs inside `ends_cleanly`, where the signal raises `Preempted` at the next bytecode: all
its parts appear on disk whole or not at all, so it may end anywhere. Training runs inside
`noticed`, where the signal is noted, and acted on between two steps, after a save; until the first
step is done, there is nothing to save, and a compilation may take minutes: it ends the command.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Seconds from the signal to a hard end where the interpreter does not answer, in a compilation,
# say. Machines leave 30 between SIGTERM and SIGKILL.
PATIENCE = 15.0


class Preempted(SystemExit):
    """SIGTERM came and everything worth keeping is on disk. Ends the process with code 0."""

    def __init__(self, message: str = 'stopped by SIGTERM'):
        super().__init__(0)
        self._message = message

    def __str__(self) -> str:
        return f'{self._message}; run the same command again to resume'


class Notice:
    """Whether SIGTERM came, and to which process.

    Attributes:
      given: whether it came.
      begun: whether a step is done.
    """

    def __init__(self, begin: Callable[[], Any]):
        self.given = self.begun = False
        self._begin = begin
        self._ask: Callable[[bool], Any] | None = None
        self._asked: Any = False

    def agreed(self) -> bool:
        """Returns whether to stop after this step; all processes call it once per step.

        One process decides by itself. Several must stop after the same step: each tells the
        others in a collective that nothing waits for, and acts on what it learns a step later.
        """
        import jax  # commands that train nothing do not need it

        if not self.begun:
            self.begun = True
            self._begin()
        if jax.process_count() == 1:
            return self.given
        self._ask = self._ask or _anywhere()
        before, self._asked = self._asked, self._ask(self.given)
        stop = bool(before)
        self.given |= stop
        return stop


def _anywhere() -> Callable[[bool], Any]:
    """Returns a function of a flag: whether any process has it set, known to all, in a while."""
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
def noticed() -> Iterator[Notice]:
    """Notes SIGTERM inside the block, instead of acting on it; raises `Preempted` at its end.

    From the first call of `agreed` on: before it, the signal acts as outside of the block.
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


@contextlib.contextmanager
def ends_cleanly(patience: float = PATIENCE) -> Iterator[None]:
    """Raises `Preempted` from inside the block when SIGTERM comes.

    Where the interpreter has not left the block `patience` seconds later, the process ends with
    code 0 and no more ado.
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
        os.write(write, b'\0')  # wakes the watch
        watch.join()
        os.close(write)
        os.close(read)


def leave(stop: Preempted) -> NoReturn:
    """Ends the process with code 0 and a line, from where `stop` is caught, and frees nothing.

    A compilation that was left goes on in a thread of XLA's, with what its frames hold: an ordinary
    end waits for it, for minutes, or crashes.
    """
    sys.stdout.flush()
    print(stop, file=sys.stderr, flush=True)
    os._exit(0)


def _watch(read: int, left: threading.Event, patience: float) -> None:
    """Ends the process `patience` seconds after SIGTERM, unless the block is left by then."""
    while not left.is_set():
        if signal.SIGTERM in os.read(read, 64) and not left.wait(patience):
            print(Preempted(), file=sys.stderr, flush=True)
            os._exit(0)


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
    """Writes the number of each signal to a descriptor, even while no bytecode runs."""
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
