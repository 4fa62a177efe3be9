"""Training learns, and a run that is killed continues as if it had not been."""

import functools

import jax
import numpy as np
import pytest

from lm import data, losses, mesh, metrics, params, presets, train
from lm.optimizer import OptimizerConfig

CONFIG = presets.tiny(257)
DOCUMENTS = [bytes([97 + i % 7, 98, 99 + i % 3]) * 40 for i in range(20)]


def as_ids(document: bytes) -> np.ndarray:
    return np.frombuffer(document, np.uint8).astype(np.int32)


def batches():
    return data.training_batches(
        DOCUMENTS, as_ids, batch_size=4, length=16, bos=256, seed=1
    )  # fmt: skip


def loss(weights, batch, key):
    return losses.next_token_loss(weights, CONFIG, batch)


def run(folder, dataset, steps=12, name='adamw'):
    config = train.TrainConfig(
        steps=steps, batch_size=4, length=16, log_every=2, checkpoint_every=5,
        optimizer=OptimizerConfig(name, warmup_steps=2, learning_rate=1e-2),
    )  # fmt: skip
    init = functools.partial(params.init, CONFIG)
    return train.run(config, init, loss, dataset, folder, mesh.make(devices=jax.devices()[:1]))


def kill_after(monkeypatch, batches_read):
    """The process gets no further than so many batches, from now on."""
    put, read = train.put, []

    def dying(batch, mesh):
        read.append(1)
        if len(read) > batches_read:
            raise KeyboardInterrupt
        return put(batch, mesh)

    monkeypatch.setattr(train, 'put', dying)


def without_speed(records):
    return [{k: v for k, v in r.items() if k != 'tokens_per_second'} for r in records]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    return folder, run(folder, batches())


def test_the_loss_falls(undisturbed):
    records = metrics.read_jsonl(undisturbed[0] / 'metrics.jsonl')
    assert [r['step'] for r in records] == [1, 2, 4, 6, 8, 10, 12]
    assert records[-1]['loss'] < 0.8 * records[0]['loss']


def test_a_killed_run_ends_where_the_undisturbed_one_does(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 8)
        run(tmp_path, batches())
    state = run(tmp_path, batches())
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed[1])
    expected = without_speed(metrics.read_jsonl(undisturbed[0] / 'metrics.jsonl'))
    assert without_speed(metrics.read_jsonl(tmp_path / 'metrics.jsonl')) == expected


def test_a_finished_run_is_not_run_again(undisturbed, monkeypatch):
    kill_after(monkeypatch, 0)
    again = run(undisturbed[0], batches())
    jax.tree.map(np.testing.assert_array_equal, again, undisturbed[1])


def test_adafactor_resumes_too(tmp_path, monkeypatch):
    whole = run(tmp_path / 'whole', batches(), steps=7, name='adafactor')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 6)
        run(tmp_path / 'killed', batches(), steps=7, name='adafactor')
    state = run(tmp_path / 'killed', batches(), steps=7, name='adafactor')
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_a_checkpoint_of_another_model_is_refused(undisturbed):
    other = presets.tiny(300)
    with pytest.raises(ValueError, match='does not fit'):
        train.run(
            train.TrainConfig(steps=12), functools.partial(params.init, other), loss, batches(),
            undisturbed[0], mesh.make(devices=jax.devices()[:1]),
        )  # fmt: skip


def test_evaluation_sums_each_target_once(undisturbed):
    dataset = data.evaluation_batches(DOCUMENTS, as_ids, batch_size=4, length=16, bos=256)
    one = mesh.make(devices=jax.devices()[:1])
    sums = train.evaluate(loss, undisturbed[1].params, dataset, one)
    assert sums['tokens'] == sum(map(len, DOCUMENTS))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(weights, batch, key):
        value, sums = loss(weights, batch, key)
        return value * np.nan, sums

    with pytest.raises(FloatingPointError, match='step 1'):
        train.run(
            train.TrainConfig(steps=3), functools.partial(params.init, CONFIG), broken, batches(),
            tmp_path, mesh.make(devices=jax.devices()[:1]),
        )  # fmt: skip
