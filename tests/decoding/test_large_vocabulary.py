"""Search by chunks, on one device and on eight, against dense logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import large_vocabulary as large
from decoding import model, projected_search, sample, searched, verify
from decoding.drafts import chain, lookup, recycling, template
from decoding.generate import generate
from decoding.sample import Sampler
from decoding.scores import Transform
from lm.devices import mesh as mesh_lib
from lm.model import params
from lm.model.config import Config, Lexinvariant

B, D, V = 4, 16, 1200
KEYS = jax.random.split(jax.random.key(0), 3)
# Integers, so that logits are bit-identical in any order of summation, and many tie. Rows from V on
# are padding.
ROWS = jax.random.randint(KEYS[0], (1300, D), -3, 4).astype(jnp.float32)
H = jax.random.randint(KEYS[1], (B, D), -3, 4).astype(jnp.float32)
ROW_KEYS = jax.random.split(KEYS[2], B)
TABLE = large.Table(ROWS, V, chunk=512)
DENSE = H @ ROWS[:V].T


@pytest.fixture(scope='module', params=['one device', 'mesh'])
def run(request):
    """Calls a function of the table, jitted, on one device or on eight."""
    if request.param == 'one device':
        return lambda function, table=TABLE: jax.jit(function)(table)
    mesh = mesh_lib.make('data=2,model=4', jax.devices('cpu')[:8])

    def on_mesh(function, table=TABLE):
        placed = large.place(table, mesh)
        assert placed.rows_VD.shape == (2048, D)
        assert {shard.data.shape for shard in placed.rows_VD.addressable_shards} == {(256, D)}
        with jax.set_mesh(mesh):
            return jax.jit(function)(placed)

    return on_mesh


@pytest.mark.parametrize('k', [20, V])
def test_exactly_the_greatest_of_dense_logits(run, k):
    found, log_normalizer_B = run(lambda t: (f := large.search(t, H, k), f.log_normalizer_B))
    logits_BA, tokens_BA = jax.lax.top_k(DENSE, k)  # ties put the lower id first
    np.testing.assert_array_equal(found.logits_BA, logits_BA)
    np.testing.assert_array_equal(found.tokens_BA, tokens_BA)
    np.testing.assert_allclose(log_normalizer_B, jax.nn.logsumexp(DENSE, axis=1), rtol=1e-6)
    if k == V:  # all of the softmax
        probability = jnp.exp(found.logits_BA - log_normalizer_B[:, None])
        placed = jnp.zeros((B, V)).at[jnp.arange(B)[:, None], found.tokens_BA].set(probability)
        np.testing.assert_allclose(placed, jax.nn.softmax(DENSE), rtol=1e-5)
        np.testing.assert_allclose(found.kept_mass_B, 1, rtol=1e-5)


def test_draws_are_those_from_dense_logits(run):
    table = dataclasses.replace(TABLE, softcap=6.0)
    temperatures = jnp.asarray([1.0, 3.0, 6.0, 0.0])
    positions = jnp.arange(40)

    def draw(table):
        found = large.search(table, H, 3, temperatures)
        at = functools.partial(large.draw, table, H, found, ROW_KEYS)
        return jax.lax.map(lambda p: at(jnp.full(B, p)), positions)

    @jax.jit
    def draw_dense():
        logprobs = sample.log_probs(Sampler(temperature=temperatures), 6 * jnp.tanh(DENSE / 6))
        return jax.lax.map(lambda p: sample.draw(logprobs, ROW_KEYS, jnp.full(B, p)), positions)

    drawn = run(draw, table)
    np.testing.assert_array_equal(drawn, draw_dense())
    assert len(set(drawn[:, 2].tolist())) > 20 and len(set(drawn[:, 3].tolist())) == 1


def test_draws_among_the_greatest_follow_their_renormalised_distribution():
    n, k, temperature = 4000, 5, 8.0

    @jax.jit
    def run(table):
        found = large.search(table, jnp.broadcast_to(H[:1], (n, D)), k, temperature)
        keys = jax.random.split(KEYS[2], n)
        drawn = large.draw_among(found, keys, jnp.zeros(n, jnp.int32))
        return drawn, found.tokens_BA[0], found.logits_BA[0], found.kept_mass_B[0]

    drawn, tokens, logits, mass = map(np.asarray, run(TABLE))
    counts = (drawn[:, None] == tokens).sum(0)
    expected = n * np.exp(logits) / np.exp(logits).sum()
    assert counts.sum() == n and counts.min() > 50
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom: p = 1e-4
    dense = np.exp(np.asarray(DENSE[0]) / temperature)
    np.testing.assert_allclose(mass, dense[tokens].sum() / dense.sum(), rtol=1e-5)


@pytest.mark.parametrize('bos', [None, 3])
def test_text_equals_that_of_dense_logits(bos):
    config = Config(600, 16, 1, 2, 1, 8, 32, max_length=64, logit_softcap=5.0)
    weights = params.init(config, jax.random.key(0))
    weights['tables']['output_VD'] *= 6
    dense = model.transformer(config, weights, bos=bos)
    prompts = [[1, 2, 3], [599], [7] * 9]
    sampler = Sampler(temperature=jnp.asarray([1.0, 0.5, 0.0]))

    def text(lm, **settings):
        return generate(
            lm, prompts, key=jax.random.key(3), max_new_tokens=8, sampler=sampler, **settings
        ).tokens

    expected = text(dense)
    large_head = searched.transformer(config, weights, bos=bos, chunk=512)
    np.testing.assert_array_equal(text(large_head), expected)
    assert bos not in np.concatenate(expected).tolist()
    drafted = text(large_head, drafter=lookup.lookup(nodes=6))  # a tree, verified by the search
    np.testing.assert_array_equal(drafted, expected)
    shape = template.best_first(template.acceptance_of(4), 6)
    warm_start = recycling.recycling(600, template=shape, ranks=4)
    warm = text(large_head, drafter=warm_start)  # asks the head for the best k
    np.testing.assert_array_equal(warm, expected)
    among = text(searched.transformer(config, weights, bos=bos, top_k=5))
    assert among[2].tolist() == expected[2].tolist()  # greedy
    assert among[0].tolist() != expected[0].tolist()


def test_verifiers_and_settings_that_need_dense_logits_are_refused():
    config = Config(600, 16, 1, 2, 1, 8, 32, max_length=64)
    weights = params.init(config, jax.random.key(0))
    large_head = searched.transformer(config, weights)
    call = functools.partial(generate, large_head, [[1]], key=jax.random.key(0), max_new_tokens=2)
    draft = chain.chain(model.transformer(config, weights), 2)
    with pytest.raises(ValueError, match='recursive rejection needs the probability of every'):
        call(drafter=draft)
    with pytest.raises(ValueError, match='top_p: needs the logits of every token'):
        call(sampler=Sampler(top_p=0.5))
    with pytest.raises(ValueError, match='transform: needs the logits'):
        call(transform=Transform(lambda params, logits, tree, text, **extra: logits))
    with pytest.raises(ValueError, match='its draft model is searched'):
        call(drafter=chain.chain(large_head, 2), verifier=verify.target_only_walk)
    drawn = dataclasses.replace(config, tied=True, lexinvariant=Lexinvariant(probability=0.5))
    with pytest.raises(ValueError, match='draws its tables per text'):
        searched.transformer(drawn, params.init(drawn, jax.random.key(0)))


def test_a_shortlist_finds_what_its_rank_allows():
    # row lengths decay over the principal directions, as in trained tables
    rows_VD = jax.random.normal(KEYS[0], (1300, D)) * 2.0 ** -jnp.arange(D)
    h_BD = jax.random.normal(KEYS[1], (B, D))

    @functools.partial(jax.jit, static_argnums=1)
    def run(table, rank):
        projection = projected_search.project(table, rank)
        logits_BA, tokens_BA = projected_search.search(table, projection, h_BD, 20, 40)
        dense_BA = jnp.take_along_axis(h_BD @ table.rows_VD.T, tokens_BA, axis=1)
        exact_BA = large.search(table, h_BD, 20).tokens_BA
        share = projected_search.recall(tokens_BA, exact_BA)
        return projection.basis_DE, logits_BA, dense_BA, share

    shares = []
    for rank in (2, 6, D):
        basis_DE, logits_BA, dense_BA, share = run(large.Table(rows_VD, V, chunk=512), rank)
        np.testing.assert_allclose(basis_DE.T @ basis_DE, np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(logits_BA, dense_BA, rtol=1e-4)
        shares.append(share)
    assert shares[0] < shares[1] and shares[1] > 0.9 and shares[2] == 1
    two_of_three = projected_search.recall(jnp.asarray([[1, 9, 8]]), jnp.asarray([[3, 8, 1]]))
    np.testing.assert_allclose(two_of_three, 2 / 3)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=f'k {V + 1}: expected 1 to {V}'):
        large.search(TABLE, H, V + 1)
    with pytest.raises(ValueError, match='chunk 100: expected a multiple of 256'):
        large.search(dataclasses.replace(TABLE, chunk=100), H, 1)
    with (
        jax.set_mesh(mesh_lib.make('data=8', jax.devices('cpu')[:8])),
        pytest.raises(ValueError, match='1300 rows of a table do not divide'),
    ):
        large.search(TABLE, H, 1)
    with pytest.raises(ValueError, match='rank 17: expected 1 to 16'):
        projected_search.project(TABLE, 17)
    with pytest.raises(ValueError, match='shortlist 3: expected at least k, 20'):
        projected_search.search(TABLE, projected_search.project(TABLE, 4), H, 20, 3)
