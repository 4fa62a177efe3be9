"""The cache of predicted rows: bit-identical rows, and never another unit's row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.transfer import row_cache
from tokenization.transfer.row_cache import Slots

PIECES, CHUNK = 4, 24
KEYS = jax.random.split(jax.random.key(0), 4)
TABLE = jax.random.normal(KEYS[0], (50, 96))
WEIGHTS = [jax.random.normal(key, (96, 96)) / 10 for key in KEYS[1:]]


@jax.jit
def rows(pieces_UP):
    """A small network with a hypernetwork's parts: attention over pieces, norms, products."""
    there = pieces_UP >= 0
    x_UPD = jnp.where(there[..., None], TABLE[pieces_UP], 0)
    scores = jnp.einsum('upd,uqd->upq', x_UPD @ WEIGHTS[0], x_UPD)
    mass = jax.nn.softmax(jnp.where(there[:, None], scores, -1e9), axis=-1)
    x_UPD = jnp.einsum('upq,uqd->upd', mass, x_UPD)
    x_UD = jax.nn.gelu(x_UPD[:, 0] @ WEIGHTS[1])
    x_UD /= jnp.sqrt(jnp.mean(x_UD**2, axis=-1, keepdims=True) + 1e-6)
    return {'input_VD': x_UD @ WEIGHTS[2], 'output_VD': x_UD @ WEIGHTS[1]}


def batches(count, size):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield sorted(
            {tuple(random.integers(0, 50, random.integers(1, 3)).tolist()) for _ in range(size)}
        )


def test_same_bits_as_without_a_cache_and_nothing_compiles_twice():
    slots, cache = Slots(40), row_cache.init(rows, 40, PIECES)
    fetch = functools.partial(row_cache.fetch, rows, chunk=CHUNK, pieces=PIECES)
    compiled, warm = [], 0

    def note(event, seconds, **_):
        compiled.append(event) if event.endswith('backend_compile_duration') else None

    jax.monitoring.register_event_duration_secs_listener(note)
    for units in batches(30, 35):
        cache, slot_U = fetch(cache, slots, units)
        fresh = row_cache.predict(rows, units, CHUNK, PIECES)
        for name, table in cache.tables.items():
            expected = np.concatenate([part[name] for part in fresh])[: len(units)]
            np.testing.assert_array_equal(np.asarray(table)[slot_U], expected)
        warm = warm or len(compiled)
    jax.monitoring.unregister_event_duration_listener(note)
    assert len(compiled) == warm > 0
    assert slots.found > 100 and slots.missed > 100 and len(slots) == 40


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 12), max_size=6), max_size=20))
def test_slots_follow_least_recent_use(wanted):
    slots = Slots(6)
    kept: list[int] = []  # from the least to the most recently used
    in_slot: dict[int, int] = {}
    for batch in wanted:
        units = [(i,) for i in batch]
        missing, free = slots.make_room(units)
        assert [unit for (unit,) in missing] == [i for i in dict.fromkeys(batch) if i not in kept]
        for (unit,), slot in zip(missing, free, strict=True):
            in_slot[slot] = unit
        slots.fill(missing)
        assert [in_slot[slot] for slot in slots.of(units)] == batch
        hits = [i for i in dict.fromkeys(batch) if i in kept]
        new = [unit for (unit,) in missing]
        kept = ([i for i in kept if i not in hits] + hits + new)[-6:]
        assert len(slots) == len(kept)


def test_a_failed_prediction_leaves_a_cache_that_is_right():
    slots, cache = Slots(3), row_cache.init(rows, 3, PIECES)
    cache, _ = row_cache.fetch(rows, cache, slots, [(1,), (2,), (3,)], CHUNK, PIECES)

    def fails(pieces_UP):
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError):
        row_cache.fetch(fails, cache, slots, [(3,), (4,)], CHUNK, PIECES)
    cache, slot_U = row_cache.fetch(rows, cache, slots, [(2,), (3,), (4,)], CHUNK, PIECES)
    (fresh,) = row_cache.predict(rows, [(2,), (3,), (4,)], CHUNK, PIECES)
    np.testing.assert_array_equal(cache.tables['input_VD'][slot_U], fresh['input_VD'][:3])


def test_refuses_a_batch_that_does_not_fit():
    slots, cache = Slots(2), row_cache.init(rows, 2, PIECES)
    with pytest.raises(ValueError, match='3 distinct units in one batch: the cache has 2 rows'):
        row_cache.fetch(rows, cache, slots, [(1,), (2,), (3,)], CHUNK, PIECES)
    with pytest.raises(ValueError, match='5 source ids in the longest unit'):
        row_cache.fetch(rows, cache, slots, [(1, 2, 3, 4, 5)], CHUNK, PIECES)
    with pytest.raises(ValueError, match='capacity 0'):
        Slots(0)
