"""Random inputs of attention, and how near to the formula its results have to be."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels import reference
from lm.kernels.mask import Mask, key_rows, pack_bits
from lm.kernels.scoring import Scoring

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
# small: each is compiled once more with bias, noise and temperature
SCORED = [
    Case(37, 37, heads=2, kv_heads=1, softcap=3.0, segments=True),
    Case(1, 150, heads=2, kv_heads=2, cached=True),
    Case(5, 33, heads=4, kv_heads=2, channels=128, cached=True, tree=True, softcap=3.0),
]
SPARSE_TREES = [
    Case(5, 150, heads=4, kv_heads=2, channels=128, cached=True, tree=True, softcap=3.0),
    Case(3, 70, heads=2, kv_heads=1, cached=True),
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


def scored(case: Case, mask: Mask) -> tuple[Mask, Scoring]:
    """Returns a bias per KV head, and noise for all of them; NaN where a row holds no key."""
    b, rows = mask.query_position.shape[0], case.rows
    bias, noise = jax.random.normal(jax.random.key(5), (2, b, case.kv_heads, rows))
    bias = jnp.where(key_rows(mask), bias, jnp.nan)
    return mask.replace(key_bias=bias), Scoring(0.3, case.softcap, jnp.float32(1.7), noise[:, :1])


def assert_near(actual, expected, dtype):
    """The largest error is within the dtype's tolerance of the largest value."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    infinite = ~np.isfinite(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    actual, expected = actual[~infinite], expected[~infinite]
    scale = max(np.abs(expected).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def name_of(case: Case) -> str:
    """Names a case in a test's id by the fields that differ from the defaults."""
    defaults = Case(0, 0)._asdict()
    changed = {k: v for k, v in case._asdict().items() if v != defaults[k]}
    return '-'.join(f'{k}={getattr(v, "__name__", v)}' for k, v in changed.items())


def formula(**settings):
    """Returns the jitted f32 formula."""
    return jax.jit(functools.partial(reference.attention, **settings))
