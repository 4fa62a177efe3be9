"""Tables drawn per sequence: invariance, the packed loss against whole tables, refusals."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.devices import mesh as mesh_lib
from lm.losses import drawn_cross_entropy
from lm.losses import next_token as losses
from lm.model import config as config_lib
from lm.model import lexinvariant, params, presets, tables, transformer
from lm.model.config import Lexinvariant
from lm.training import train
from tests.lm.model.steps import empty, step

V = 11
BASE = dataclasses.replace(
    presets.tiny(V), d_model=16, d_ff=16, tied=True, scale_embeddings=True, unroll=1
)
SPECS = {
    'gaussian': Lexinvariant('gaussian'),
    'permuted': Lexinvariant('permuted'),
    'partial': Lexinvariant('gaussian', 0.5, always=(1, 2), never=(3,)),
    'partial permuted': Lexinvariant('permuted', 0.5),
}
KEY = jax.random.key(7)


def with_spec(spec, **fields):
    return dataclasses.replace(BASE, lexinvariant=spec, **fields)


def weights(config):
    return params.init(config, jax.random.key(0))


def packed():
    """Rows of one, two and three segments, the last ones padded."""
    random = np.random.default_rng(0)
    segments = np.array([[1] * 9, [1] * 4 + [2] * 5, [1] * 3 + [2] * 2 + [3] * 2 + [0] * 2])
    starts = np.diff(segments, axis=1, prepend=0) != 0
    columns = np.arange(9)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return {
        'tokens': random.integers(0, V, (3, 9)),
        'targets': random.integers(0, V, (3, 9)),
        'segments': segments,
        'positions': positions,
        'weights': (segments > 0).astype(np.float32),
    }


@functools.cache
def token_losses(spec):
    config = with_spec(spec)
    return jax.jit(lambda p: losses.token_losses(p, config, packed(), KEY).nats)(weights(config))


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_packed_losses_are_those_of_each_segment_alone_with_its_whole_table(spec):
    config, batch = with_spec(spec), packed()
    p = weights(config)
    key_B = lexinvariant.sequence_keys(KEY, 3)
    ours = np.asarray(token_losses(spec))
    forward = jax.jit(transformer.forward, static_argnums=1)
    for row, segment in ((0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)):
        here = batch['segments'][row] == segment
        own = lexinvariant.of_segment(key_B[row : row + 1], segment)
        table = lexinvariant.draw(p['tables'], config, own)
        tokens, positions, segments = (
            batch[name][row : row + 1] for name in ('tokens', 'positions', 'segments')
        )
        logits = forward({**p, 'tables': table}, config, tokens, positions, segments)
        expected = -jax.nn.log_softmax(logits)[0, here, batch['targets'][row, here]]
        np.testing.assert_allclose(ours[row, here], expected, rtol=2e-5)


def test_two_segments_of_a_row_and_two_rows_have_different_tables():
    config = with_spec(SPECS['gaussian'])
    key_B = lexinvariant.sequence_keys(KEY, 2)
    keys = [*lexinvariant.of_segment(key_B, 1), *lexinvariant.of_segment(key_B, 2)]
    (drawn,) = lexinvariant.draw({}, config, jnp.stack(keys)).values()
    flat = np.asarray(drawn).reshape(4, -1)
    correlation = np.corrcoef(flat) - np.eye(4)
    assert np.abs(correlation).max() < 0.3
    assert flat.std() == pytest.approx(config.d_model**-0.5, rel=0.1)


@pytest.mark.parametrize('spec', [SPECS['gaussian'], SPECS['partial']], ids=['gaussian', 'partial'])
@pytest.mark.parametrize('softcap', [None, 2.0])
def test_the_chunked_loss_and_its_gradients_are_the_dense_ones(spec, softcap):
    config, batch = with_spec(spec, logit_softcap=softcap), packed()
    learned = weights(config)['tables'].get('input_VD')
    h_BLD = jax.random.normal(jax.random.key(1), (3, 9, config.d_model))
    key_B = lexinvariant.sequence_keys(KEY, 3)
    segments, targets = jnp.asarray(batch['segments']), jnp.asarray(batch['targets'])
    some = jax.random.normal(jax.random.key(2), (2, 3, 9)) * batch['weights']

    def ours(h, table):
        found = drawn_cross_entropy.cross_entropy(config, h, table, key_B, segments, targets, 4)
        return (found.nats * some[0] + found.log_normalizer * some[1]).sum()

    def dense(h, table):
        total = 0.0
        for segment in (1, 2, 3):
            keys = lexinvariant.of_segment(key_B, segment)
            (rows,) = lexinvariant.draw({'input_VD': table}, config, keys).values()
            logits = jnp.einsum('bld,bvd->blv', h, rows, precision='highest')
            logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
            normalizer = jax.nn.logsumexp(logits, axis=-1)
            nats = normalizer - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
            total += ((nats * some[0] + normalizer * some[1]) * (segments == segment)).sum()
        return total

    arguments = (0,) if learned is None else (0, 1)
    a, b = (jax.jit(jax.value_and_grad(f, arguments))(h_BLD, learned) for f in (ours, dense))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['gaussian', 'permuted'])
def test_renaming_symbols_and_rows_renames_the_logits_bit_for_bit(kind):
    config = with_spec(Lexinvariant(kind))
    p = weights(config)
    p = {**p, 'tables': tables.for_texts(p['tables'], config, jax.random.split(KEY, 2))}
    name = next(n for n in p['tables'] if n.endswith(('BVD', 'BV')))
    tokens = np.random.default_rng(1).integers(0, V, (2, 8))
    renamed = np.random.default_rng(2).permutation(V)
    rows = np.asarray(p['tables'][name])
    moved = np.empty_like(rows)
    moved[:, renamed] = rows
    other = {**p, 'tables': {**p['tables'], name: jnp.asarray(moved)}}
    forward = jax.jit(transformer.forward, static_argnums=1)
    logits = forward(p, config, tokens)
    np.testing.assert_array_equal(forward(other, config, renamed[tokens])[..., renamed], logits)


def test_no_parameter_knows_the_vocabulary():
    small, large = (with_spec(SPECS['gaussian'], vocab_size=v) for v in (V, 1013))
    assert params.count(small) == params.count(large) == params.count_body(small)
    assert not any(1013 in x.shape for x in jax.tree.leaves(params.abstract(large)))
    assert not weights(small)['tables']


def test_ids_unseen_in_training_work():
    config, wider = (with_spec(SPECS['gaussian'], vocab_size=v) for v in (V, V + 5))
    p = weights(config)
    rows, more = (
        lexinvariant.draw({}, c, jax.random.split(KEY, 2))['input_BVD'] for c in (config, wider)
    )
    np.testing.assert_array_equal(more[:, :V], rows)
    tokens = jnp.asarray([[V + 4, 2, V + 4, V]] * 2)
    logits = transformer.forward({**p, 'tables': {'input_BVD': more}}, wider, tokens)
    assert logits.shape == (2, 4, V + 5) and jnp.isfinite(logits).all()


def test_unseen_symbols_are_equally_likely_over_all_draws():
    config = with_spec(SPECS['permuted'], vocab_size=5)
    every = jnp.asarray(list(itertools.permutations(range(5))), jnp.int32)
    table = {'input_VD': lexinvariant.fixed_table(config, jnp.arange(5)), 'row_BV': every}
    tokens = jnp.broadcast_to(jnp.asarray([1, 3, 1]), (len(every), 3))
    logits = transformer.forward({**weights(config), 'tables': table}, config, tokens)
    mean = jax.nn.softmax(logits).mean(0)
    np.testing.assert_allclose(mean[:, [0, 2, 4]], mean[:, [0]].repeat(3, 1), rtol=1e-5)
    assert abs(mean[-1, 1] - mean[-1, 0]) > 1e-3  # but not for a symbol seen before


def gradients(config, p):
    def loss(p):
        return losses.next_token_loss(p, config, packed(), 1e-4, KEY)[0]

    return jax.jit(jax.value_and_grad(loss))(p)


def test_probability_0_is_the_learned_model_bit_for_bit():
    p = weights(BASE)
    learned, none = gradients(BASE, p), gradients(with_spec(Lexinvariant(probability=0.0)), p)
    jax.tree.map(np.testing.assert_array_equal, none, learned)


@pytest.mark.slow  # compiled with all optimisations, twice
@pytest.mark.usefixtures('optimised')
def test_probability_1_is_the_lexinvariant_model_bit_for_bit():
    whole = with_spec(SPECS['gaussian'])
    every = with_spec(Lexinvariant(probability=0.0, always=tuple(range(V))))  # with an idle table
    p = weights(every)
    value, gradient = gradients(every, p)
    expected, expected_gradient = gradients(whole, {**p, 'tables': {}})
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, gradient['body'], expected_gradient['body'])
    assert not jnp.any(gradient['tables']['input_VD'])


def test_always_and_never_drawn_symbols():
    config = with_spec(SPECS['partial'])
    key_B = jax.random.split(KEY, 400)
    drawn = lexinvariant.is_drawn(config, key_B[:, None], jnp.broadcast_to(jnp.arange(V), (400, V)))
    share = np.asarray(drawn.mean(0))
    assert (share[[1, 2]] == 1).all() and share[3] == 0
    np.testing.assert_allclose(np.delete(share, [1, 2, 3]), 0.5, atol=0.1)


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_cached_decoding_is_the_full_forward(spec):
    config = with_spec(spec)
    p = weights(config)
    p = {**p, 'tables': tables.for_texts(p['tables'], config, jax.random.split(KEY, 2))}
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, V, (2, 7)))
    memory, parts = empty(config, 2, 8), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        logits, memory = step(p, config, memory, tokens[:, start:stop])
        parts.append(logits)
    whole = transformer.forward(p, config, tokens)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=2e-4, atol=1e-5)


def test_evaluation_draws_tables_anew_for_each_batch():
    config = with_spec(SPECS['gaussian'])
    mesh = mesh_lib.make(devices=jax.devices()[:1])

    def loss(p, batch, key):
        return losses.next_token_loss(p, config, batch, key=key)

    batch, p = packed(), weights(config)
    once, twice = (
        train.evaluate(loss, p, [batch] * n, mesh)['nats_per_token'].total for n in (1, 2)
    )
    assert abs(twice - 2 * once) > 1e-3


def test_invalid_settings_are_refused():
    for fields in ({'kind': 'uniform'}, {'probability': 1.5}, {'always': (1,), 'never': (1,)}):
        with pytest.raises(ValueError, match='Lexinvariant'):
            Lexinvariant(**fields)
    with pytest.raises(ValueError, match='tied'):
        with_spec(SPECS['gaussian'], tied=False)
    with pytest.raises(ValueError, match='ids in'):
        with_spec(Lexinvariant(never=(V,)))
    config = with_spec(SPECS['gaussian'])
    with pytest.raises(ValueError, match='give a key'):
        losses.token_losses(weights(config), config, packed())
    with pytest.raises(ValueError, match='draw one per sequence'):
        transformer.forward(weights(config), config, jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_configs_survive_json(spec):
    config = with_spec(spec)
    assert config_lib.from_dict(config_lib.to_dict(config)) == config


def test_memory_stays_near_that_of_a_learned_table():
    v, b, l = 32_768, 16, 512
    learned = dataclasses.replace(
        BASE, vocab_size=v, d_model=256, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=512,
        max_length=l,
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((b, l), jnp.int32)
    names = ('tokens', 'targets', 'segments', 'positions')
    batch = {**dict.fromkeys(names, shape), 'weights': jax.ShapeDtypeStruct((b, l), jnp.float32)}

    def peak(spec):
        config = dataclasses.replace(learned, lexinvariant=spec)

        def loss(p, batch, key):
            return losses.next_token_loss(p, config, batch, 1e-4, key)

        p = params.abstract(config)
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(p, batch, KEY).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + (
            memory.output_size_in_bytes
        )  # fmt: skip

    allowed = 1.3 * peak(None)
    assert peak(SPECS['gaussian']) <= allowed and peak(SPECS['permuted']) <= allowed
    assert peak(Lexinvariant(probability=0.2)) <= allowed
