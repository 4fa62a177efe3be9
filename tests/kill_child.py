"""Runs an experiment and kills it at a chosen moment: a process that `tests.kill_harness` starts.

    python -m tests.kill_child LOG '{"signal": 9, "phase": "save", "entry": 2, "delay": 0.01}' \
        pretrain --scale tiny --out OUT

The signal comes `delay` seconds after a phase has been entered for the `entry`-th time; an entry
of 0 is never. Phases are entered where the functions below are called: nothing in the product
knows of them. LOG gets a line of JSON for each phase entered and for each step, with the digest of
its batch.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
import threading
import time
from collections import Counter
from typing import Any

from orbax.checkpoint._src.path import atomicity

from experiments import corpora, run
from lm.checkpoints import bundle, checkpoint
from lm.data import packing
from lm.data.documents import EncodedDocuments
from lm.devices import preemption
from lm.training import train
from lm.training.step_log import StepLog

# Where each phase begins.
PHASES: dict[str, list[tuple[Any, str]]] = {
    'loading': [
        (corpora, 'open_corpus'), (EncodedDocuments, 'write'),
        (packing._PackedIterator, '_pack_buffer'),
    ],
    'step': [(StepLog, 'add')],
    'save': [(checkpoint.Checkpoints, 'save')],
    # writes the step's last file and renames its folder; then older steps are deleted
    'commit': [(atomicity.AtomicRenameTemporaryPath, 'finalize')],
    # the model is saved after it
    'evaluation': [(train, 'evaluate'), (bundle, 'save'), (bundle, 'digest')],
}  # fmt: skip


class Watch:
    """Logs what happens, and sends the signal when its moment has come."""

    def __init__(self, log: pathlib.Path, moment: dict[str, Any]):
        self._file = log.open('ab', buffering=0)
        self._moment = moment
        self._entered: Counter[str] = Counter()

    def say(self, **fields: Any) -> None:
        """Appends a line to the log, in one write."""
        self._file.write(json.dumps(fields).encode() + b'\n')

    def enter(self, phase: str) -> None:
        """Notes that a phase has been entered."""
        self._entered[phase] += 1
        self.say(phase=phase, entry=self._entered[phase], time=time.time())
        if (phase, self._entered[phase]) == (self._moment['phase'], self._moment['entry']):
            threading.Timer(self._moment['delay'], self._send).start()

    def _send(self) -> None:
        self.say(signal=self._moment['signal'], time=time.time())
        os.kill(os.getpid(), self._moment['signal'])


def hook(watch: Watch, phase: str, owner: Any, name: str) -> None:
    """Makes each call of `owner.name` an entry into a phase."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def entering(*args, **kwargs):
        watch.enter(phase)
        return function(*args, **kwargs)

    # a class method stays one: it is bound already
    setattr(owner, name, staticmethod(entering) if hasattr(function, '__self__') else entering)


def log_steps(watch: Watch) -> None:
    """Logs the digest of every batch that a step is given."""
    add = StepLog.add

    def logging(self, step, metrics, batch):
        digest = hashlib.sha256()
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
        watch.say(step=step, batch=digest.hexdigest())
        return add(self, step, metrics, batch)

    StepLog.add = logging  # type: ignore[method-assign]


if __name__ == '__main__':
    watching = Watch(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
    log_steps(watching)
    for phase, places in PHASES.items():
        for owner, name in places:
            hook(watching, phase, owner, name)
    try:
        code = run.main(sys.argv[3:])
    except preemption.Preempted as stopped:
        watching.say(exit=0, time=time.time())
        preemption.leave(stopped)
    watching.say(exit=code, time=time.time())
    sys.exit(code)
