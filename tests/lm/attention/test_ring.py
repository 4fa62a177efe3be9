"""Attention over sharded sequences: values, gradients, work and communication."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.plan import collectives
from experiments.plan import ring as plan_ring
from lm.attention import attention as attention_lib
from lm.attention import ring_blocks, zigzag
from lm.data.packing import Shared
from lm.devices import mesh as mesh_lib
from lm.kernels import reference
from lm.kernels.mask import Mask, visible
from lm.kernels.scoring import Scoring
from lm.training import train
from tests.lm.attention.packed_rows import packed

DEVICES = 4  # on the sequence axis, in most tests


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 1))
def test_zigzag_is_a_permutation_that_undo_inverts(devices, chunk, axis):
    length = 2 * devices * chunk
    x = np.moveaxis(np.arange(3 * length).reshape(3, length), 1, axis)
    there = zigzag.apply(x, devices, axis)
    np.testing.assert_array_equal(zigzag.undo(there, devices, axis), x)
    chunks = zigzag.order(length, devices).reshape(devices, 2, chunk)[:, :, 0] // chunk
    assert chunks.tolist() == [[r, 2 * devices - 1 - r] for r in range(devices)]


def test_put_permutes_rows_and_refuses_indivisible_lengths():
    grid = mesh_lib.make('data=2,sequence=4', jax.devices('cpu'))
    batch = {'tokens': np.arange(48).reshape(2, 24), 'ids': np.arange(4), 'all': Shared(np.ones(3))}
    here = train.put(batch, grid)
    np.testing.assert_array_equal(here['tokens'], zigzag.apply(batch['tokens'], 4))
    assert here['tokens'].addressable_shards[0].data.shape == (1, 6)
    np.testing.assert_array_equal(here['ids'], batch['ids'])
    np.testing.assert_array_equal(here['all'], np.ones(3))
    with pytest.raises(ValueError, match=r'20 tokens over sequence=4 devices.*multiple of 8'):
        train.put({'tokens': np.zeros((2, 20))}, grid)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([None, 2, 5]))
def test_in_a_skipped_pair_no_query_sees_a_key(seed, causal, window):
    rng = np.random.default_rng(seed)
    segment, position = packed(2, 12, seed)
    order = rng.permutation(12)  # in any order of the sequence
    segment, position = segment[:, order], position[:, order]
    key_position = np.where(rng.random((2, 1, 6)) < 0.2, -1, position[:, None, 6:])
    mask = Mask(position[:, :6], key_position, segment[:, :6], segment[:, 6:], window=window)
    mask = dataclasses.replace(mask, causal=causal)
    assert may_see(mask) or not np.asarray(visible(mask)).any()


@jax.jit
def may_see(mask):
    return ring_blocks.may_see(mask)


def live(order: np.ndarray, segment: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Number of pairs of chunks that are not skipped, by device and by owner of the keys."""
    cut = [np.split(x[:, order], 2 * DEVICES, axis=1) for x in (segment, position)]
    pairs = np.array([
        [bool(may_see(Mask(qp, kp[:, None], qs, ks))) for ks, kp in zip(*cut)]
        for qs, qp in zip(*cut)
    ])  # fmt: skip
    return pairs.reshape(DEVICES, 2, DEVICES, 2).sum((1, 3))


def test_in_zigzag_order_every_device_has_the_same_causal_work():
    length = 8 * DEVICES
    one = np.ones((1, length), np.int32), np.arange(length)[None]
    by_step = live(zigzag.order(length, DEVICES), *one)
    assert (by_step == 2 + np.eye(DEVICES)).all()  # of 4; two are half masked in the own block
    assert set(live(np.arange(length), *one).sum(1)) == {3, 7, 11, 15}
    # documents of one chunk each: only a device's own chunks see each other
    length, document = 16 * DEVICES, 8
    many = np.arange(length)[None] // document + 1, np.arange(length)[None] % document
    assert (live(zigzag.order(length, DEVICES), *many) == 2 * np.eye(DEVICES)).all()


def test_each_device_runs_exactly_those_pairs(monkeypatch):
    """Counted by callbacks from the devices."""
    ran: collections.Counter[int] = collections.Counter()
    forward = ring_blocks._forward

    def counting(*args):
        jax.debug.callback(lambda i: ran.update([int(i)]), jax.lax.axis_index('sequence'))
        return forward(*args)

    monkeypatch.setattr(ring_blocks, '_forward', counting)
    grid = mesh_lib.make(f'sequence={DEVICES}', jax.devices('cpu')[:DEVICES])
    position = zigzag.apply(np.arange(16)[None], DEVICES).astype(np.int32)
    q = k = jnp.ones((1, 16, 1, 4))
    with jax.set_mesh(grid):
        attend = functools.partial(attention_lib.attention, scoring=Scoring(1.0))
        jax.jit(attend)(q, k.swapaxes(1, 2), k.swapaxes(1, 2), Mask(position, position[:, None]))
        jax.effects_barrier()
    assert ran == dict.fromkeys(range(DEVICES), 3 + 2 * (DEVICES - 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, and attention on it."""

    mesh: str
    ring: str
    kv_heads: int = 2
    segments: bool = True
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    kernels: str = 'xla'
    terms: bool = False  # bias, noise and temperature


CASES = [
    Case('data=2,sequence=4', 'keys', window=9, softcap=4.0),
    Case('data=2,sequence=4', 'queries', window=9, softcap=4.0),
    Case('data=2,sequence=2,model=2', 'keys', kv_heads=1, segments=False),
    Case('data=2,sequence=2,model=2', 'queries', causal=False, terms=True),
    # Triton kernels in interpret mode: Mosaic's interpreter serves one device at a time
    Case('data=4,sequence=2', 'keys', kernels='triton', softcap=4.0, terms=True),
]


@pytest.fixture(scope='module', params=CASES, ids=lambda case: f'{case.mesh}-{case.ring}')
def case(request):
    """The case, number of devices, compiled text, and found and expected values and gradients."""
    case, rng = request.param, np.random.default_rng(0)
    grid = mesh_lib.make(case.mesh, jax.devices('cpu'))
    devices = grid.shape['sequence']
    q = rng.normal(size=(4, 32, 4, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, case.kv_heads, 32, 16)).astype(np.float32)
    segment, position = packed(4, 32)
    if not case.segments:
        segment, position = None, np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))

    bias, noise, temperature = None, None, None
    if case.terms:
        bias, noise = rng.normal(size=(2, 4, case.kv_heads, 32)).astype(np.float32)
        noise, temperature = noise[:, :1], 1.7

    def results(attend, q, k, v, segment, position, weight, bias, noise):
        window = None if case.window is None else jnp.int32(case.window)
        mask = Mask(position, position[:, None], segment, segment, None, None, window, case.causal)
        mask = mask.replace(key_bias=bias)
        scoring = Scoring(0.3, case.softcap, temperature, noise)

        def total(q, k, v):
            out, lse = attend(q, k, v, mask, scoring)
            return jnp.sum(jnp.sin(out) * weight) + 0.1 * jnp.sum(lse * weight[..., 0]), (out, lse)

        gradients, found = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return (*found, *gradients)

    weight = rng.normal(size=q.shape).astype(np.float32)
    arrays = (q, k, v, segment, position, weight, bias, noise)
    axes = (1, 2, 2, 1, 1, 1, 2, 2)  # the sharded axis of each
    expected = jax.jit(functools.partial(results, reference.attention))(*arrays)
    attend = functools.partial(
        attention_lib.attention_and_lse, implementation=case.kernels, ring=case.ring
    )
    kinds = {2: ('batch', 'length'), 4: ('batch', 'length', 'heads', None)}
    with jax.set_mesh(grid):
        here = [
            None if x is None else jax.device_put(
                zigzag.apply(x, devices, axis),
                mesh_lib.sharding(grid, KEYS[: x.ndim] if axis == 2 else kinds[x.ndim], x.shape),
            )
            for x, axis in zip(arrays, axes)
        ]  # fmt: skip
        compiled = jax.jit(functools.partial(results, attend)).lower(*here).compile()
        found = compiled(*here)
    found = [zigzag.undo(np.asarray(x), devices, a) for x, a in zip(found, (1, 1, 1, 2, 2))]
    return case, devices, compiled.as_text(), found, expected


KEYS = ('batch', 'kv_heads', 'length', None)


def test_values_and_gradients_equal_those_of_one_device(case):
    _, _, _, found, expected = case
    for x, y in zip(found, expected, strict=True):
        y = np.asarray(y)
        seen = np.isfinite(y)
        np.testing.assert_array_equal(x[~seen], y[~seen])
        np.testing.assert_allclose(x[seen], y[seen], rtol=1e-5, atol=1e-5)


def test_only_collective_permutes_are_sent_and_results_of_queries_return(case):
    case, devices, text, _, _ = case
    kinds = re.findall(r' (all-gather|all-to-all|collective-permute)(?:-start)?\(', text)
    assert set(kinds) == {'collective-permute'}
    along = mesh_lib.parse(
        case.mesh, 8
    ).model  # stride of device ids between neighbours on the ring
    hops = {
        (int(there) // along - int(here) // along) % devices
        for pairs in re.findall(r'source_target_pairs=\{(.*?\})\}', text)
        for here, there in re.findall(r'\{(\d+),(\d+)\}', pairs)
    }
    # -1, -2 and -3 mod 4: results of queries that have travelled 1, 2 and 3 hops
    assert hops == ({1} if case.ring == 'keys' else set(range(1, devices)))


def test_the_planner_counts_what_is_sent(case):
    case, devices, text, _, _ = case
    sizes = mesh_lib.parse(case.mesh, 8)
    rows, heads, kv_heads = 4 // sizes.data, 4 // sizes.model, max(case.kv_heads // sizes.model, 1)
    passes = plan_ring.passes(
        case.ring, devices, rows * 32 / devices, heads, kv_heads, 16, 4, flops=1.0
    )
    program = collectives.read(text, **sizes._asdict())
    sent = [one for one in program.collectives if one.kind == 'collective-permute']
    assert {one.axis for one in sent} == {'sequence'} and not program.remarks
    # with two devices, the backward pass reuses the block received in the forward pass
    if case.ring == 'keys' and devices > 2:  # plus positions and segments
        masks = 2 * (devices - 1) * rows * 32 / devices * 4 * (1 + case.segments)
        counted = sum(one.network_bytes for one in passes)
        assert sum(one.network_bytes for one in sent) == counted + masks
