"""Training learns, and a killed run resumes as if undisturbed."""

import functools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lm.checkpoints import restore
from lm.data import batches as batches_lib
from lm.devices import mesh
from lm.losses import next_token as losses
from lm.model import params, presets
from lm.training import divergence, metrics, train
from lm.training.optimizer import OptimizerConfig

CONFIG = presets.tiny(257)
DOCUMENTS = [bytes([97 + i % 7, 98, 99 + i % 3]) * 40 for i in range(20)]


def as_ids(document: bytes) -> np.ndarray:
    return np.frombuffer(document, np.uint8).astype(np.int32)


def batches():
    return batches_lib.training_batches(
        DOCUMENTS, as_ids, batch_size=4, length=16, bos=256, seed=1
    )  # fmt: skip


def loss(weights, batch, key):
    return losses.next_token_loss(weights, CONFIG, batch)


def run(folder, dataset, steps=12, name='adamw', objective=loss, frozen=()):
    config = train.TrainConfig(
        steps=steps, batch_size=4, length=16, log_every=2, checkpoint_every=5,
        optimizer=OptimizerConfig(name, warmup_steps=2, learning_rate=1e-2),
    )  # fmt: skip
    init = functools.partial(params.init, CONFIG)
    one = mesh.make(devices=jax.devices()[:1])
    return train.run(
        config, init, objective, dataset, folder, one, frozen=frozen, leaves=params.leaves(CONFIG)
    )


def kill_after(monkeypatch, batches_read):
    """Kills the process after this many batches, from now on."""
    put, read = train.put, []

    def dying(batch, mesh):
        read.append(1)
        if len(read) > batches_read:
            raise KeyboardInterrupt
        return put(batch, mesh)

    monkeypatch.setattr(train, 'put', dying)


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
    expected = (undisturbed[0] / 'metrics.jsonl').read_bytes()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == expected


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
            undisturbed[0], mesh.make(devices=jax.devices()[:1]), leaves=params.leaves(other),
        )  # fmt: skip


def test_evaluation_sums_each_target_once(undisturbed):
    dataset = batches_lib.evaluation_batches(DOCUMENTS, as_ids, batch_size=4, length=16, bos=256)
    one = mesh.make(devices=jax.devices()[:1])
    sums = train.evaluate(loss, undisturbed[1].params, dataset, one)
    assert sums['nats_per_token'].count == sum(map(len, DOCUMENTS))


def spoiled_run(folder, step, factor):
    """Runs with the loss of one step multiplied; the factor is data, so the program is the same."""

    def spoiled(weights, batch, key, key_data, factor):
        # the loss knows its step only by its key
        value, sums = loss(weights, batch, key)
        here = (jax.random.key_data(key) == key_data).all()
        return jax.lax.cond(here, lambda x: x * factor, lambda x: x, value), sums

    key_data = jax.random.key_data(jax.random.fold_in(jax.random.key(0), step - 1))
    return run(folder, batches(), objective=spoiled, frozen=(key_data, np.float32(factor)))


@pytest.fixture(scope='module')
def unspoiled(tmp_path_factory):
    """The folder and the state of a run whose loss is multiplied by 1."""
    folder = tmp_path_factory.mktemp('unspoiled')
    return folder, spoiled_run(folder, 11, 1.0)


def stopped_at(folder, step, factor):
    """Runs until the loss of `step` is spoiled; returns the error line and the folder it names."""
    with pytest.raises(FloatingPointError) as error:
        spoiled_run(folder, step, factor)
    return str(error.value), folder / 'stopped' / f'step_{step}'


@pytest.mark.parametrize('factor', [np.nan, np.inf, 100.0])
def test_a_diverging_loss_stops_the_run_and_keeps_the_state_before(unspoiled, tmp_path, factor):
    error, kept = stopped_at(tmp_path, 11, factor)
    eleventh = [batch for _, batch in zip(range(11), batches())][-1]
    documents = np.unique(eleventh['documents'][eleventh['weights'] > 0]).tolist()
    assert error.startswith('step 11: ') and str(kept) in error
    assert f'(documents {", ".join(map(str, documents))})' in error
    why = json.loads((kept / 'why_process_0.json').read_text())
    assert (why['step'], why['documents']) == (11, documents)
    for name, array in np.load(kept / 'batch_process_0.npz').items():
        np.testing.assert_array_equal(array, eleventh[name])
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, unspoiled[1])
    before = epath.Path(unspoiled[0]) / 'checkpoints' / '10' / 'state'
    state, expected = (restore.leaves(epath.Path(x), like) for x in (kept / 'state', before))
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_batch_of_unknown_documents_stops_the_run_too():
    values = {'loss': float('nan'), 'gradient_norm': 1.0}
    failure = divergence.Failure(3, values, {'tokens': np.zeros((2, 4), np.int32)})
    assert 'does not report documents' in divergence.describe(failure, 'somewhere')
