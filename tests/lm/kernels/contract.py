"""What every implementation of attention must do: inherited by one test class for each."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention import attention as attention_lib
from lm.kernels import reference, sparse
from lm.kernels.mask import Mask, key_rows, pack_bits, unpack_bits

# A query that sees every key but one has a logit of f32's precision times a few ulps.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


class Case(NamedTuple):
    """One shape of attention; `cached` keys lie in a cache of `rows` rows of ragged lengths."""

    queries: int
    rows: int
    heads: int = 4
    kv_heads: int = 2
    channels: int = 64
    dtype: jnp.dtype = jnp.float32
    softcap: float | None = None
    window: int | None = None
    segments: bool = False
    causal: bool = True
    cached: bool = False
    tree: bool = False
    holes: bool = True


TRAINING = [
    Case(37, 37),
    Case(200, 200, heads=8, kv_heads=1, channels=80, window=50),
    Case(130, 130, heads=2, kv_heads=2, channels=128, segments=True, softcap=3.0),
    Case(64, 64, heads=4, kv_heads=1, channels=256, causal=False),
    Case(140, 140, dtype=jnp.bfloat16, segments=True, window=70),
]
CACHED = [
    Case(1, 150, heads=8, kv_heads=1, channels=128, cached=True),
    Case(1, 300, heads=2, kv_heads=2, channels=80, cached=True, window=40, softcap=3.0),
    Case(1, 130, channels=256, cached=True, dtype=jnp.bfloat16),
    Case(7, 150, channels=80, cached=True, window=100, holes=False),
    Case(40, 290, heads=8, kv_heads=2, channels=128, cached=True, tree=True),
    Case(9, 140, heads=2, kv_heads=2, cached=True, tree=True, window=20, dtype=jnp.bfloat16),
    Case(5, 33, heads=4, kv_heads=1, channels=256, cached=True, tree=True, softcap=3.0),
    Case(300, 420, heads=8, kv_heads=2, cached=True),  # a prefill: too many queries for `tree`
]


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the depth of each node of a random tree, and who is whose ancestor."""
    reach = np.eye(nodes, dtype=bool)
    for node in range(1, nodes):
        reach[node] |= reach[rng.integers(node)]
    return reach.sum(1) - 1, reach


def inputs(case: Case, seed: int = 0):
    """Returns random q, k, v and a mask. Some keys are holes; some queries may see nothing."""
    rng = np.random.default_rng(seed)
    b = 2
    q = rng.normal(size=(b, case.queries, case.heads, case.channels))
    k, v = rng.normal(size=(2, b, case.kv_heads, case.rows, case.channels))
    arrays = [jnp.asarray(x, case.dtype) for x in (q, k, v)]
    if not case.cached:
        position = np.broadcast_to(np.arange(case.rows), (b, case.rows))
        segment = None
        if case.segments:
            segment = np.sort(rng.integers(0, 4, size=(b, case.rows)), axis=1)
        mask = Mask(position, position[:, None], segment, segment, causal=case.causal)
        return *arrays, with_window(mask, case)
    length = np.asarray([case.rows, case.queries + (case.rows - case.queries) // 3])
    key_position = np.sort(rng.integers(0, 2 * case.rows, (b, case.kv_heads, case.rows)), axis=-1)
    if case.holes:
        key_position[rng.random(key_position.shape) < 0.1] = -1
    first = length - case.queries
    depth = np.arange(case.queries)
    ancestors = None
    if case.tree:
        depth, reach = random_tree(rng, case.queries)
        ancestors = pack_bits(jnp.broadcast_to(reach, (b, *reach.shape)))
    query_position = 2 * case.rows + depth + np.zeros((b, 1), int)
    for row in range(b):  # the new nodes' own keys
        key_position[row, :, first[row] : length[row]] = query_position[row]
    mask = Mask(query_position, key_position, length=length, ancestors=ancestors)
    return *arrays, with_window(mask, case)


def with_window(mask: Mask, case: Case) -> Mask:
    """Returns the mask as int32 arrays, with the case's window as data."""
    mask = mask if case.window is None else mask.replace(window=case.window)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), mask)


def assert_near(actual, expected, dtype):
    """The largest error is within the dtype's tolerance of the largest value."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    infinite = ~np.isfinite(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    actual, expected = actual[~infinite], expected[~infinite]
    scale = max(np.abs(expected).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def name_of(case: Case) -> str:
    """Names a case in a test's id by what is special about it."""
    defaults = Case(0, 0)._asdict()
    changed = {k: v for k, v in case._asdict().items() if v != defaults[k]}
    return '-'.join(f'{k}={getattr(v, "__name__", v)}' for k, v in changed.items())


def formula(**settings):
    """Returns the jitted f32 formula."""
    return jax.jit(functools.partial(reference.attention, **settings))


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
        settings = {'scale': 0.3, 'softcap': case.softcap}
        out, lse = self.attend(q, k, v, mask, **settings)
        assert out.dtype == q.dtype and lse.dtype == jnp.float32
        expected, expected_lse = formula(**settings)(q, k, v, mask)
        assert_near(out, expected, case.dtype)
        assert_near(lse, expected_lse, case.dtype)

    @pytest.mark.parametrize('case', [*TRAINING, CACHED[0], CACHED[4]], ids=name_of)
    def test_gradients(self, case):
        q, k, v, mask = inputs(case)
        weight, lse_weight = jax.random.normal(jax.random.key(1), (2, *q.shape[:3], 1))

        def value(attend):
            def of(q, k, v):
                out, lse = attend(q, k, v, mask)
                lse = jnp.where(lse > -jnp.inf, lse, 0.0)
                return jnp.sum(out.astype(jnp.float32) * weight) + jnp.sum(lse * lse_weight[..., 0])

            return of

        settings = {'scale': 0.3, 'softcap': case.softcap}
        ours = functools.partial(
            attention_lib.attention_and_lse, implementation=self.implementation, **settings
        )
        theirs = formula(**settings)
        actual = jax.jit(jax.grad(value(ours), (0, 1, 2)))(q, k, v)
        f32 = [x.astype(jnp.float32) for x in (q, k, v)]
        expected = jax.jit(jax.grad(value(theirs), (0, 1, 2)))(*f32)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == case.dtype
            assert_near(a, e, case.dtype)

    @pytest.mark.parametrize('case', [TRAINING[0], CACHED[0], CACHED[6]], ids=name_of)
    def test_queries_that_see_nothing(self, case):
        q, k, v, mask = inputs(case)
        nothing = mask.replace(query_position=mask.query_position.at[1].set(-1), causal=True)
        out, lse = self.attend(q, k, v, nothing, scale=0.3)
        assert (np.asarray(out[1]) == 0).all() and (np.asarray(lse[1]) == -np.inf).all()
        assert np.isfinite(np.asarray(out)).all()
        total = lambda q, k, v: self.attend(q, k, v, nothing, scale=0.3)[0].sum()  # noqa: E731
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
                attention_lib.attention_and_lse, implementation=self.implementation, scale=0.3
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
        expected = self.attend(q, k, v, mask, scale=0.3)
        actual = self.attend(q, *stacked, mask, layer=jnp.asarray(1), scale=0.3)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_a_chain_of_nodes_is_causal_attention(self):
        case = CACHED[4]._replace(tree=False)
        q, k, v, mask = inputs(case)
        chain = jnp.tril(jnp.ones((case.queries, case.queries), bool))
        as_tree = mask.replace(ancestors=pack_bits(jnp.broadcast_to(chain, (2, *chain.shape))))
        actual = self.attend(q, k, v, as_tree, scale=0.3)
        expected = self.attend(q, k, v, mask, scale=0.3)
        jax.tree.map(lambda a, e: assert_near(a, e, case.dtype), actual, expected)

    def test_a_tree_gives_what_each_path_gives_alone(self):
        case = CACHED[4]._replace(queries=9, rows=60)
        q, k, v, mask = inputs(case)
        reach = np.asarray(unpack_bits(mask.ancestors, 9))[0]
        first = np.asarray(mask.length) - 9
        # both rows of the batch are cut to a prefix of the same length, to stay arrays
        prefix = jnp.arange(case.rows) < (first - first.min())[:, None]
        seen = mask.replace(key_position=jnp.where(prefix[:, None], -1, mask.key_position))
        whole, _ = self.attend(q, k, v, seen, scale=0.3)
        for node in (3, 8):
            path = np.flatnonzero(reach[node])
            keep = np.stack([np.r_[np.arange(f - first.min(), f), f + path] for f in first])
            pick = lambda x, keep=keep: jnp.stack([x[i][:, keep[i]] for i in range(2)])  # noqa: E731
            alone = Mask(
                mask.query_position[:, path], pick(mask.key_position),
                length=jnp.full(2, keep.shape[1]),
            )  # fmt: skip
            result, _ = self.attend(q[:, path], pick(k), pick(v), alone, scale=0.3)
            assert_near(result[:, -1], whole[:, node], case.dtype)

    def test_a_tree_that_grew_by_some_nodes(self):
        """40 nodes of which the last 6 are new: two words, over the edge of a block of keys."""
        case = CACHED[4]._replace(queries=6, channels=64)
        q, k, v, mask = inputs(case)
        reach = jnp.asarray(np.random.default_rng(1).random((2, 6, 40)) < 0.4)
        mask = mask.replace(ancestors=pack_bits(reach), nodes=40, causal=False)
        out, lse = self.attend(q, k, v, mask, scale=0.3)
        expected, expected_lse = formula(scale=0.3)(q, k, v, mask)
        assert_near(out, expected, case.dtype)
        assert_near(lse, expected_lse, case.dtype)
        settings, counted = {'scale': 0.3}, jnp.ones((2, 6), bool)
        sums = functools.partial(
            attention_lib.column_sums, implementation=self.implementation, **settings
        )
        by_formula = functools.partial(reference.column_sums, **settings)
        operands = q, k, expected_lse, mask, counted
        assert_near(jax.jit(sums)(*operands), jax.jit(by_formula)(*operands), case.dtype)

    @pytest.mark.parametrize('case', [*CACHED[:2], *CACHED[4:6], TRAINING[1]], ids=name_of)
    def test_column_sums(self, case):
        q, k, v, mask = inputs(case)
        settings = {'scale': 0.3, 'softcap': case.softcap}
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
        settings = {'scale': 0.3, 'softcap': case.softcap}
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
