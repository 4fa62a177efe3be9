"""The log of a step: the loss's own names, and throughput in tokens."""

import numpy as np
import pytest

from lm.losses.loss import Sum
from lm.training.metrics import ProgressLine
from lm.training.step_log import StepFailed, StepLog, tokens_of

METRICS = {'loss': 1.5, 'gradient_norm': 2.0, 'failed': False}


class Written(list):
    """A fake `metrics.Writer`."""

    def write(self, step, values, timings):
        self.append((step, values, timings))


def test_sums_are_reported_as_means_under_the_names_that_the_loss_gives():
    written = Written()
    log = StepLog(10, 30, written, ProgressLine('test', 30))
    batch = {'ids': np.arange(3)}  # no text: no speed
    for step in (1, 2, 10):
        log.add(step, {**METRICS, 'apples_per_basket': Sum(np.float32(6), np.float32(4))}, batch)
    assert [step for step, *_ in written] == [1]  # the last one added is still running
    log.finish()
    assert [step for step, *_ in written] == [1, 10]
    expected = {'loss': 1.5, 'gradient_norm': 2.0, 'apples_per_basket': 1.5}
    assert written[-1][1:] == (expected, {})


def test_speed_counts_the_tokens_of_the_batch():
    batch = {'segments': np.array([[1, 1, 2, 0], [1, 0, 0, 0]]), 'weights': np.zeros((2, 4))}
    assert tokens_of(batch) == 4
    written = Written()
    log = StepLog(1, 1, written, ProgressLine('test', 1))
    log.add(1, METRICS, batch)
    log.finish()
    assert written[0][2]['tokens_per_second'] > 0


def test_a_failed_step_is_raised_with_its_batch():
    log = StepLog(1, 2, Written(), ProgressLine('test', 2))
    batch = {'segments': np.ones((1, 2))}
    log.add(1, {**METRICS, 'failed': True}, batch)
    with pytest.raises(StepFailed, match='step 1') as error:
        log.add(2, METRICS, batch)
    assert error.value.failure.batch is batch
    assert error.value.failure.values == {'loss': 1.5, 'gradient_norm': 2.0}
