"""The hypernetwork: rows depend on their pieces alone and are rescaled; its losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.packing import Shared
from lm.devices import mesh as mesh_lib
from lm.losses import next_token as losses
from lm.model import leaves, params
from lm.model.config import Config, Lexinvariant
from lm.training import train
from tokenization.transfer import hypernetwork
from tokenization.transfer import losses as hypernetwork_losses
from tokenization.transfer.hypernetwork import HypernetworkConfig

KNOWN, P = 300, 5
MODEL = Config(KNOWN + 1, 16, 1, 2, 2, 8, 32, max_length=16)
TIED = dataclasses.replace(MODEL, tied=True)


def _source(model):
    source = params.init(model, jax.random.key(1))
    scale = jnp.linspace(0.1, 3, model.d_model)
    source['tables'] = {name: x * scale + 0.5 * scale for name, x in source['tables'].items()}
    return source


def _network(model, **fields):
    shape = HypernetworkConfig(n_layers=1, head_dim=8, pieces=P, chunk=64, **fields)
    config = hypernetwork.for_model(shape, model, KNOWN)
    source = _source(model)
    return config, source, hypernetwork.init(config, source['tables'], jax.random.key(0))


@pytest.fixture(scope='module')
def untied():
    return _network(MODEL)


def _pieces(count=200, seed=0):
    """Returns tokens of one to P pieces, with bytes that the source lacks."""
    draw = np.random.default_rng(seed)
    ids_UP = draw.integers(0, KNOWN + 256, (count, P))
    length_U1 = draw.integers(1, P + 1, (count, 1))
    return np.where(np.arange(P) < length_U1, ids_UP, -1).astype(np.int32)


@pytest.fixture(scope='module')
def predict():
    return jax.jit(hypernetwork.predict, static_argnums=1)


class TestPredict:
    @pytest.mark.parametrize('call', [1, 70])
    def test_in_any_calls_equals_in_one(self, untied, predict, call):
        config, source, weights = untied
        pieces_UP = _pieces(100)
        whole = predict(weights, config, source['tables'], pieces_UP)
        parts = [
            predict(weights, config, source['tables'], pieces_UP[i : i + call])
            for i in range(0, len(pieces_UP), call)
        ]
        for name in hypernetwork.TABLES:
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, whole[name])

    def test_follows_the_order_of_the_vocabulary(self, untied, predict):
        config, source, weights = untied
        pieces_UP = _pieces(100)
        order = np.random.default_rng(1).permutation(len(pieces_UP))
        one = predict(weights, config, source['tables'], pieces_UP)
        other = predict(weights, config, source['tables'], pieces_UP[order])
        for name in one:
            np.testing.assert_array_equal(one[name][order], other[name])

    def test_reads_every_piece_and_their_order_and_no_other_row(self, untied, predict):
        config, source, weights = untied
        pieces_UP = np.array([[3, 4, 5, -1, -1]], np.int32)
        base = predict(weights, config, source['tables'], pieces_UP)['input_VD']
        for other in ([3, 4, 6, -1, -1], [4, 3, 5, -1, -1], [3, 4, -1, -1, -1]):
            row = predict(weights, config, source['tables'], np.array([other], np.int32))
            assert np.abs(row['input_VD'] - base).max() > 1e-3
        tables = {name: x.at[100:].set(7.0) for name, x in source['tables'].items()}
        same = predict(weights, config, tables, pieces_UP)['input_VD']
        np.testing.assert_array_equal(same, base)

    def test_bytes_that_the_source_lacks_have_rows_of_their_own(self, untied, predict):
        config, source, weights = untied
        a, b = ([[KNOWN + byte, -1, -1, -1, -1]] for byte in (0, 255))
        rows = [predict(weights, config, source['tables'], np.array(x, np.int32)) for x in (a, b)]
        assert np.abs(rows[0]['output_VD'] - rows[1]['output_VD']).max() > 1e-2

    @pytest.mark.parametrize('model', [MODEL, TIED])
    @pytest.mark.parametrize('residual', [False, True])
    def test_starts_with_the_mean_and_deviation_of_the_source(self, predict, model, residual):
        config, source, weights = _network(model, residual=residual)
        ids_U = np.arange(KNOWN)  # fewer than the anchors: all of them
        rows = predict(weights, config, source['tables'], hypernetwork.single(config, ids_U))
        assert set(rows) == set(source['tables'])
        for name, rows_UD in rows.items():
            aim_UD = source['tables'][name][:KNOWN]
            np.testing.assert_allclose(rows_UD.mean(0), aim_UD.mean(0), atol=1e-5)
            np.testing.assert_allclose(rows_UD.std(0), aim_UD.std(0), rtol=1e-4)

    def test_residual_starts_as_the_mean_of_the_pieces(self, predict):
        config, source, weights = _network(MODEL, residual=True)
        pieces_UP = np.array([[5, 9, 20, -1, -1], [7, -1, -1, -1, -1]], np.int32)
        rows = predict(weights, config, source['tables'], pieces_UP)
        for name, table_VD in source['tables'].items():
            np.testing.assert_allclose(
                rows[name][0], table_VD[jnp.array([5, 9, 20])].mean(0), atol=1e-5
            )
            np.testing.assert_allclose(rows[name][1], table_VD[7], atol=1e-5)


class TestForModel:
    def test_refuses_what_has_no_rows(self):
        drawn = dataclasses.replace(TIED, lexinvariant=Lexinvariant())
        with pytest.raises(ValueError, match='learned tables'):
            hypernetwork.for_model(HypernetworkConfig(), drawn, 10)

    def test_refuses_to_read_one_piece_alone(self):
        with pytest.raises(ValueError, match='pieces: 1; expected at least 2'):
            HypernetworkConfig(pieces=1)

    def test_refuses_a_vocabulary_larger_than_the_table(self):
        with pytest.raises(ValueError, match='302 ids, the model rows for 301'):
            hypernetwork.for_model(HypernetworkConfig(), MODEL, KNOWN + 2)


class TestLosses:
    def _batch(self, vocab_size):
        tokens_BL = np.random.default_rng(2).integers(0, vocab_size - 1, (2, 9))
        return {
            'tokens': tokens_BL[:, :-1], 'targets': tokens_BL[:, 1:],
            'segments': np.ones((2, 8), np.int32), 'weights': np.ones((2, 8), np.float32),
            'positions': np.broadcast_to(np.arange(8), (2, 8)),
        }  # fmt: skip

    def test_a_perfect_network_has_the_source_loss(self):
        """With the source's tokenizer and exact rows, the loss is its own, BOS included."""
        config, source, weights = _network(MODEL, residual=True)
        pieces_VP = np.array(hypernetwork.single(config, np.arange(KNOWN + 1)))
        pieces_VP[KNOWN] = -1
        batch = self._batch(KNOWN + 1)
        batch['tokens'][:, 0] = KNOWN
        own, _ = losses.next_token_loss(source, MODEL, batch)
        moved, sums = hypernetwork_losses.transfer_loss(
            weights, config, MODEL, KNOWN, 0.5, source, {**batch, 'pieces': pieces_VP}
        )
        np.testing.assert_allclose(moved, own, rtol=1e-5)
        assert sums['auxiliary'].mean < 1e-8
        ids = {'ids': np.arange(KNOWN)}
        assert hypernetwork_losses.identity_loss(weights, config, source, ids).value < 1e-8

    def test_each_reports_its_own_unit(self, untied):
        config, source, weights = untied
        ids = {'ids': np.arange(40)}
        value, sums = hypernetwork_losses.identity_loss(weights, config, source, ids)
        assert set(sums) == {'squared_distance_per_token'}  # and no nats
        np.testing.assert_allclose(sums['squared_distance_per_token'].mean, value, rtol=1e-6)
        pieces_VP = _pieces(64)
        pieces_VP[-1] = -1
        batch = {**self._batch(64), 'pieces': pieces_VP}
        _, sums = hypernetwork_losses.transfer_loss(
            weights, config, MODEL, KNOWN, 0.5, source, batch
        )
        assert set(sums) == {'nats_per_token', 'auxiliary'}

    def test_on_a_mesh_as_on_one_device(self):
        model = dataclasses.replace(TIED, vocab_size=KNOWN + 4)
        shape = HypernetworkConfig(n_layers=1, head_dim=8, pieces=P, chunk=64, residual=True)
        config = hypernetwork.for_model(shape, model, KNOWN)
        pieces_VP = _pieces(64)
        pieces_VP[-1] = -1
        host = {**self._batch(64), 'pieces': Shared(pieces_VP)}
        found = []
        for grid in ('data=1,model=1', 'data=2,model=4'):
            devices = jax.devices('cpu')[: 1 if grid == 'data=1,model=1' else 8]
            mesh = mesh_lib.make(grid, devices)
            source = jax.device_put(_source(model), params.shardings(model, mesh))
            placed = leaves.placed(hypernetwork.leaves(config), mesh)
            start = functools.partial(hypernetwork.init, config)
            weights = jax.jit(start, out_shardings=placed)(source['tables'], jax.random.key(0))

            def loss(weights, source, batch):
                return hypernetwork_losses.transfer_loss(
                    weights, config, model, KNOWN, 0.5, source, batch
                )[0]

            with jax.set_mesh(mesh):
                batch = train.put(host, mesh)
                gradient = jax.jit(jax.value_and_grad(loss))(weights, source, batch)
            found.append(jax.tree.map(np.asarray, gradient))
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *found)

    def test_both_teach_the_network_alone(self, untied):
        config, source, weights = untied
        pieces_VP = _pieces(64)
        pieces_VP[-1] = -1
        batch = {**self._batch(64), 'pieces': pieces_VP}

        def loss(weights, source):
            one = hypernetwork_losses.transfer_loss(
                weights, config, MODEL, KNOWN, 0.5, source, batch
            )
            two = hypernetwork_losses.identity_loss(weights, config, source, {'ids': np.arange(40)})
            return one[0] + two[0]

        gradient = jax.grad(loss)(weights, source)
        frozen = {'source_mean_E', 'source_deviation_E'}
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            moves = bool(jnp.any(leaf != 0))
            assert moves != (path[0].key in frozen), path

    def test_auxiliary_counts_tokens_that_the_source_has(self):
        source = {'input_VD': jnp.eye(4)[:3] * 2}
        pieces_VP = jnp.array([[0, -1], [1, 2], [3, -1], [-1, -1], [2, -1]])  # 3: a missing byte
        rows = jnp.zeros((5, 4)).at[0].set(source['input_VD'][0])
        # of the shared tokens 0 and 4, the second is off by its norm, 2: 4 / 2 tokens / norm 2
        loss = hypernetwork_losses.auxiliary_loss({'input_VD': rows}, source, pieces_VP, 3)
        np.testing.assert_allclose(loss, 1.0)
