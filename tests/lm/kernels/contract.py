"""The contract of every implementation of attention: inherited by one test class for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention import attention as attention_lib
from lm.kernels import reference, sparse
from lm.kernels.mask import Mask, key_rows, pack_bits, unpack_bits
from lm.kernels.scoring import Scoring
from tests.lm.kernels.cases import (
    CACHED,
    SCORED,
    SPARSE_TREES,
    TRAINING,
    assert_near,
    formula,
    inputs,
    name_of,
    scored,
)


class AttentionContract:
    """Subclasses name an implementation."""

    implementation: str

    def attend(self, q, k, v, mask, **settings):
        call = functools.partial(
            attention_lib.attention_and_lse, implementation=self.implementation, **settings
        )
        return jax.jit(call)(q, k, v, mask)

    @pytest.mark.parametrize('case', TRAINING + CACHED, ids=name_of)
    def test_forward(self, case):
        q, k, v, mask = inputs(case)
        settings = {'scoring': Scoring(0.3, case.softcap)}
        out, lse = self.attend(q, k, v, mask, **settings)
        assert out.dtype == q.dtype and lse.dtype == jnp.float32
        expected, expected_lse = formula(**settings)(q, k, v, mask)
        assert_near(out, expected, case.dtype)
        assert_near(lse, expected_lse, case.dtype)

    @pytest.mark.parametrize('case', SCORED, ids=name_of)
    def test_bias_noise_and_temperature(self, case):
        q, k, v, mask = inputs(case)
        mask, scoring = scored(case, mask)
        out, lse = self.attend(q, k, v, mask, scoring=scoring)
        expected, expected_lse = formula(scoring=scoring)(q, k, v, mask)
        assert_near(out, expected, case.dtype)
        assert_near(lse, expected_lse, case.dtype)
        self.column_sums_agree(q, k, expected_lse, mask, jnp.ones(q.shape[:2], bool), scoring)

    @pytest.mark.parametrize('case', [*TRAINING, CACHED[0], CACHED[4]], ids=name_of)
    def test_gradients(self, case):
        *arrays, mask = inputs(case)
        self.gradients_agree(case, *arrays, mask, Scoring(0.3, case.softcap))

    @pytest.mark.parametrize('case', SCORED[:2], ids=name_of)
    def test_gradients_with_bias_noise_and_temperature(self, case):
        *arrays, mask = inputs(case)
        self.gradients_agree(case, *arrays, *scored(case, mask))

    def gradients_agree(self, case, q, k, v, mask, scoring):
        weight, lse_weight = jax.random.normal(jax.random.key(1), (2, *q.shape[:3], 1))

        def value(attend):
            def of(q, k, v):
                out, lse = attend(q, k, v, mask)
                lse = jnp.where(lse > -jnp.inf, lse, 0.0)
                return jnp.sum(out.astype(jnp.float32) * weight) + jnp.sum(lse * lse_weight[..., 0])

            return of

        ours = functools.partial(
            attention_lib.attention_and_lse, implementation=self.implementation, scoring=scoring
        )
        theirs = formula(scoring=scoring)
        actual = jax.jit(jax.grad(value(ours), (0, 1, 2)))(q, k, v)
        f32 = [x.astype(jnp.float32) for x in (q, k, v)]
        expected = jax.jit(jax.grad(value(theirs), (0, 1, 2)))(*f32)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == case.dtype
            assert_near(a, e, case.dtype)

    def test_bias_noise_and_temperature_have_no_gradients(self):
        q, k, v, mask = inputs(SCORED[1])
        mask, scoring = scored(SCORED[1], mask)

        def total(data):
            bias, noise, temperature = data
            scored = scoring.replace(noise=noise, temperature=temperature)
            return self.attend(q, k, v, mask.replace(key_bias=bias), scoring=scored)[0].sum()

        data = mask.key_bias, scoring.noise, scoring.temperature
        for gradient in jax.grad(total)(data):
            assert (np.asarray(gradient) == 0).all()

    @pytest.mark.parametrize('case', [TRAINING[0], CACHED[0], CACHED[6]], ids=name_of)
    def test_queries_that_see_nothing(self, case):
        q, k, v, mask = inputs(case)
        nothing = mask.replace(query_position=mask.query_position.at[1].set(-1), causal=True)
        out, lse = self.attend(q, k, v, nothing, scoring=Scoring(0.3))
        assert (np.asarray(out[1]) == 0).all() and (np.asarray(lse[1]) == -np.inf).all()
        assert np.isfinite(np.asarray(out)).all()

        def total(q, k, v):
            return self.attend(q, k, v, nothing, scoring=Scoring(0.3))[0].sum()

        for gradient in jax.grad(total, (0, 1, 2))(q, k, v):
            assert (np.asarray(gradient[1]) == 0).all()
            assert np.isfinite(np.asarray(gradient)).all()

    @pytest.mark.parametrize('case', [CACHED[1], CACHED[4], CACHED[7]], ids=name_of)
    def test_rows_that_hold_no_key_change_nothing(self, case):
        q, k, v, mask = inputs(case)
        unheld = ~key_rows(mask)[..., None]
        poisoned = [jnp.where(unheld, jnp.nan, x) for x in (k, v)]

        @jax.jit
        def both(q, k, v):
            attend = functools.partial(
                attention_lib.attention_and_lse,
                implementation=self.implementation,
                scoring=Scoring(0.3),
            )
            out, vjp = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
            return out, vjp((jnp.ones_like(out[0]), jnp.zeros_like(out[1])))

        clean, dirty = both(q, k, v), both(q, *poisoned)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)

    @pytest.mark.usefixtures('optimised')
    @pytest.mark.parametrize('case', [CACHED[0], CACHED[4], CACHED[7]], ids=name_of)
    def test_a_layer_of_a_stack(self, case):
        q, k, v, mask = inputs(case)
        stacked = [jnp.stack([jnp.full_like(x, jnp.nan), x, x + 1]) for x in (k, v)]
        expected = self.attend(q, k, v, mask, scoring=Scoring(0.3))
        actual = self.attend(q, *stacked, mask, layer=jnp.asarray(1), scoring=Scoring(0.3))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_a_chain_of_nodes_is_causal_attention(self):
        case = CACHED[4]._replace(tree=False)
        q, k, v, mask = inputs(case)
        chain = jnp.tril(jnp.ones((case.queries, case.queries), bool))
        as_tree = mask.replace(ancestors=pack_bits(jnp.broadcast_to(chain, (2, *chain.shape))))
        actual = self.attend(q, k, v, as_tree, scoring=Scoring(0.3))
        expected = self.attend(q, k, v, mask, scoring=Scoring(0.3))
        jax.tree.map(lambda a, e: assert_near(a, e, case.dtype), actual, expected)

    def test_a_tree_gives_what_each_path_gives_alone(self):
        case = CACHED[4]._replace(queries=9, rows=60)
        q, k, v, mask = inputs(case)
        reach = np.asarray(unpack_bits(mask.ancestors, 9))[0]
        first = np.asarray(mask.length) - 9
        # both rows of the batch are cut to a prefix of the same length, to stay arrays
        prefix = jnp.arange(case.rows) < (first - first.min())[:, None]
        seen = mask.replace(key_position=jnp.where(prefix[:, None], -1, mask.key_position))
        whole, _ = self.attend(q, k, v, seen, scoring=Scoring(0.3))
        for node in (3, 8):
            path = np.flatnonzero(reach[node])
            keep = np.stack([np.r_[np.arange(f - first.min(), f), f + path] for f in first])
            pick = lambda x, keep=keep: jnp.stack([x[i][:, keep[i]] for i in range(2)])  # noqa: E731
            alone = Mask(
                mask.query_position[:, path], pick(mask.key_position),
                length=jnp.full(2, keep.shape[1]),
            )  # fmt: skip
            result, _ = self.attend(q[:, path], pick(k), pick(v), alone, scoring=Scoring(0.3))
            assert_near(result[:, -1], whole[:, node], case.dtype)

    def test_a_tree_that_grew_by_some_nodes(self):
        """40 nodes of which the last 6 are new: two words, over the edge of a block of keys."""
        case = CACHED[4]._replace(queries=6, channels=64)
        q, k, v, mask = inputs(case)
        reach = jnp.asarray(np.random.default_rng(1).random((2, 6, 40)) < 0.4)
        mask = mask.replace(ancestors=pack_bits(reach), nodes=40, causal=False)
        out, lse = self.attend(q, k, v, mask, scoring=Scoring(0.3))
        expected, expected_lse = formula(scoring=Scoring(0.3))(q, k, v, mask)
        assert_near(out, expected, case.dtype)
        assert_near(lse, expected_lse, case.dtype)
        self.column_sums_agree(q, k, expected_lse, mask, jnp.ones((2, 6), bool), Scoring(0.3))

    def column_sums_agree(self, *operands):
        sums = functools.partial(attention_lib.column_sums, implementation=self.implementation)
        expected = jax.jit(reference.column_sums)(*operands)
        assert_near(jax.jit(sums)(*operands), expected, jnp.float32)

    @pytest.mark.parametrize('case', [*CACHED[:2], *CACHED[4:6], TRAINING[1]], ids=name_of)
    def test_column_sums(self, case):
        q, k, v, mask = inputs(case)
        settings = {'scoring': Scoring(0.3, case.softcap)}
        counted = jax.random.bernoulli(jax.random.key(2), 0.7, q.shape[:2]).at[0, 0].set(True)
        _, lse = formula(**settings)(q, k, v, mask)
        sums = functools.partial(
            attention_lib.column_sums, implementation=self.implementation, **settings
        )
        mass = jax.jit(sums)(q, k, lse, mask, counted)
        by_formula = jax.jit(functools.partial(reference.column_sums, **settings))
        assert_near(mass, by_formula(q, k, lse, mask, counted), case.dtype)
        saw = counted[:, :, None] & (lse > -jnp.inf)
        np.testing.assert_allclose(mass.sum((1, 2)), saw.sum((1, 2)), rtol=1e-3)
        assert (np.asarray(jax.jit(sums)(q, k, lse, mask, counted & False)) == 0).all()

    @pytest.mark.parametrize('case', [CACHED[0], CACHED[1], CACHED[2]], ids=name_of)
    def test_sparse_decode(self, case):
        q, k, v, _ = inputs(case)
        settings = {'scoring': Scoring(0.3, case.softcap)}
        attend = jax.jit(functools.partial(
            attention_lib.sparse_decode, implementation=self.implementation, **settings
        ))  # fmt: skip
        kept = jax.random.bernoulli(jax.random.key(3), 0.1, k.shape[:3])
        index = sparse.from_rows(kept, 32, 16)
        poisoned = [jnp.where(kept[..., None], x, jnp.nan) for x in (k, v)]
        actual = attend(q, *poisoned, index)
        by_formula = jax.jit(functools.partial(reference.sparse_decode, **settings))
        expected = by_formula(q, k, v, index)
        jax.tree.map(lambda a, e: assert_near(a, e, case.dtype), actual, expected)

        everything = sparse.from_rows(jnp.ones_like(kept), 32, 16)
        position = jnp.arange(case.rows)[None, None] + jnp.zeros((2, 1, 1), jnp.int32)
        mask = Mask(jnp.full((2, 1), case.rows), position, length=jnp.full(2, case.rows))
        actual = attend(q, k, v, everything)
        expected = self.attend(q, k, v, mask, **settings)
        jax.tree.map(lambda a, e: assert_near(a, e, case.dtype), actual, expected)

    @pytest.mark.parametrize('with_terms', [False, True])
    @pytest.mark.parametrize('case', SPARSE_TREES, ids=name_of)
    def test_sparse_decode_of_nodes(self, case, with_terms):
        """Kept committed rows and the nodes that the mask shows; the index lists nodes in vain."""
        q, k, v, mask = inputs(case)
        mask, scoring = scored(case, mask) if with_terms else (mask, Scoring(0.3, case.softcap))
        attend = jax.jit(functools.partial(
            attention_lib.sparse_decode, implementation=self.implementation
        ))  # fmt: skip
        kept = jax.random.bernoulli(jax.random.key(3), 0.2, k.shape[:3]) & key_rows(mask)
        index = sparse.from_rows(kept, 32, 16)
        node = jnp.arange(case.rows) >= mask.first_node_B[:, None, None]
        read = jnp.where(node, key_rows(mask), kept)
        poisoned = [jnp.where(read[..., None], x, jnp.nan) for x in (k, v)]
        actual = attend(q, *poisoned, index, scoring, mask)
        expected = jax.jit(reference.sparse_decode)(q, k, v, index, scoring, mask)
        jax.tree.map(lambda a, e: assert_near(a, e, case.dtype), actual, expected)

        everything = sparse.from_rows(key_rows(mask), 32, 16)
        actual = attend(q, k, v, everything, scoring, mask)
        expected = formula(scoring=scoring)(q, k, v, mask)
        jax.tree.map(lambda a, e: assert_near(a, e, case.dtype), actual, expected)
