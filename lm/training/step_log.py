"""Logs a run's steps: means of the loss's sums, and throughput."""

import time
from typing import Any

import jax
import numpy as np

from lm.losses.loss import Sum
from lm.training.divergence import Failure
from lm.training.metrics import ProgressLine, Writer


class StepFailed(Exception):
    """A step's loss is not finite or explodes."""

    def __init__(self, failure: Failure):
        """Takes the failed step with its metrics and batch."""
        super().__init__(f'step {failure.step}')
        self.failure = failure


class StepLog:
    """Reads each step's metrics after dispatching the next step, so that devices never wait."""

    def __init__(self, every: int, last: int, writer: Writer, progress: ProgressLine):
        """Logs the first step, every `every`-th one and the `last`."""
        self._every, self._last, self._writer, self._progress = every, last, writer, progress
        self._pending: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._since, self._tokens = time.monotonic(), 0

    def add(self, step: int, metrics: dict[str, Any], batch: dict[str, Any]) -> None:
        """Takes a step's metrics: scalars and `Sum`s; raises `StepFailed` if the one before failed.

        Args:
          step: its number.
          metrics: `loss`, `gradient_norm` and `failed` (`divergence.guarded`) among them.
          batch: this process's batch, as the pipeline gave it.
        """
        self.finish()
        self._pending = (step, metrics, batch)

    def finish(self) -> None:
        """Waits for the last step added; raises `StepFailed` if it failed."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        values = {name: x.mean if isinstance(x, Sum) else float(x) for name, x in metrics.items()}
        if values.pop('failed'):
            raise StepFailed(Failure(step, values, batch))
        self._tokens += tokens_of(batch)
        self._progress.update(step, f'loss {values["loss"]:.3f}')
        if step % self._every == 0 or step in (1, self._last):
            now = time.monotonic()
            speed = self._tokens / max(now - self._since, 1e-9)
            timings = {'tokens_per_second': speed} if self._tokens else {}
            self._writer.write(step, values, timings)
            self._since, self._tokens = now, 0


def tokens_of(batch: dict[str, Any]) -> int:
    """Returns the number of tokens per step over all processes; 0 for batches without segments.

    Assumes that the other processes pack as many tokens as this one.

    >>> tokens_of({'segments': np.array([[1, 1, 2], [1, 0, 0]])})
    4
    """
    if 'segments' not in batch:
        return 0
    return int(np.count_nonzero(batch['segments'])) * jax.process_count()
