"""The transformer as a next-byte model: the properties that coders rely on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import params, presets, transformer
from lm.model.config import Lexinvariant
from tokenization.coding import neural

CONFIG = presets.tiny()


@pytest.fixture(scope='module')
def weights():
    return params.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope='module')
def model(weights):
    return neural.model(weights, CONFIG, context=12)


def read(model, state, columns):
    for column in columns:
        state = model.step(state, jnp.asarray(column))
    return state


def test_frequencies_follow_the_full_forward(model, weights):
    text = np.array([[104, 101, 108], [0, 255, 7]])
    state = read(model, model.start(2), text.T)
    tokens = np.concatenate([[[neural.BOS]] * 2, text], 1)
    logits = transformer.forward(weights, CONFIG, jnp.asarray(tokens))[:, -1, :256]
    frequencies = np.diff(np.asarray(model.cdf(state)), axis=1)
    assert (frequencies >= 1).all()
    expected = jax.nn.softmax(logits) * (2**14 - 256) + 1
    np.testing.assert_allclose(frequencies, expected, atol=2.0)


def test_a_rewound_row_goes_on_as_if_it_had_not_read_on(model):
    state = read(model, model.start(2), [[1, 2], [3, 4]])
    mark = model.mark(state)
    expected = read(model, state, [[7, 8], [9, 10]])
    back = model.rewind(read(model, state, [[5, 6], [5, 6], [5, 6]]), mark)
    again = read(model, back, [[7, 8], [9, 10]])
    np.testing.assert_array_equal(model.cdf(again), model.cdf(expected))


def test_marks_of_different_points_mix_row_by_row(model):
    begin = model.start(2)
    state = read(model, begin, [[1, 2], [3, 4]])
    reset = jnp.asarray([True, False])
    mixed = jax.tree.map(
        lambda a, b: jnp.where(reset.reshape(-1, *[1] * (a.ndim - 1)), a, b),
        model.mark(begin), model.mark(state),
    )  # fmt: skip
    cdf = model.cdf(model.rewind(state, mixed))
    np.testing.assert_array_equal(cdf[0], model.cdf(begin)[0])
    np.testing.assert_array_equal(cdf[1], model.cdf(state)[1])


def test_rows_do_not_change_with_their_batch_mates(model):
    here = read(model, model.start(4), [[1, 2, 3, 4], [5, 6, 7, 8]])
    there = read(model, model.start(4), [[1, 9, 9, 9], [5, 0, 0, 0]])
    np.testing.assert_array_equal(model.cdf(here)[0], model.cdf(there)[0])


def test_a_context_beyond_the_models_is_refused(weights):
    with pytest.raises(ValueError, match='context 128'):
        neural.model(weights, CONFIG, context=128)


def test_drawn_tables_are_refused(weights):
    drawn = dataclasses.replace(CONFIG, tied=True, lexinvariant=Lexinvariant())
    with pytest.raises(ValueError, match='tables are drawn'):
        neural.model(weights, drawn, context=8)
