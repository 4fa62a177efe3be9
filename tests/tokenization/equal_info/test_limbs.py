"""Limb arithmetic against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.equal_info import limbs

Z = 5
BITS = limbs.BITS * Z
TOP = (1 << BITS) - 1
ROWS = 8

# Numbers of every size, and those of all-zero or all-one limbs, through which carries run.
numbers = st.one_of(
    st.integers(0, TOP),
    st.integers(0, BITS).map(lambda k: (1 << k) - 1),
    st.integers(0, BITS - 1).map(lambda k: 1 << k),
)
rows = st.lists(numbers, min_size=ROWS, max_size=ROWS)


def pack(values):
    return jnp.array(np.stack([limbs.from_int(value, Z) for value in values]))


def unpack(array):
    return [limbs.to_int(row) for row in np.asarray(array)]


@jax.jit
def pairs(a, b):
    return {
        'add': limbs.add(a, b),
        'less': limbs.less(a, b),
        'equal': limbs.equal(a, b),
        'less_self': limbs.less(a, a),
        'bit_length': limbs.bit_length(a),
    }


@settings(max_examples=50, deadline=None)
@given(rows, rows)
def test_add_subtract_compare(a, b):
    got = pairs(pack(a), pack(b))
    assert unpack(got['add']) == [(x + y) & TOP for x, y in zip(a, b)]
    assert got['less'].tolist() == [x < y for x, y in zip(a, b)]
    assert got['equal'].tolist() == [x == y for x, y in zip(a, b)]
    assert not got['less_self'].any()
    assert got['bit_length'].tolist() == [x.bit_length() for x in a]
    high, low = [max(x, y) for x, y in zip(a, b)], [min(x, y) for x, y in zip(a, b)]
    got = jax.jit(limbs.subtract)(pack(high), pack(low))
    assert unpack(got) == [x - y for x, y in zip(high, low)]


@pytest.mark.parametrize('shift', [9, 14, 16])
@settings(max_examples=30, deadline=None)
@given(rows, st.lists(st.integers(0, 1 << 16), min_size=ROWS, max_size=ROWS))
def test_scale(shift, a, factors):
    factors = [min(f, 1 << shift) for f in factors]
    got = jax.jit(limbs.scale, static_argnums=2)(pack(a), jnp.array(factors, jnp.uint32), shift)
    assert unpack(got) == [(x * f) >> shift for x, f in zip(a, factors)]


@pytest.mark.parametrize('bits', [0, 1, 14, 16, 17, 48, 79, 80])
def test_static_shifts_and_masks(bits):
    a = [TOP, 0, 1, TOP // 3, 1 << (BITS - 1), 0x123456789ABCDEF0]
    assert unpack(limbs.shift_right(pack(a), bits)) == [x >> bits for x in a]
    assert unpack(limbs.shift_left(pack(a), bits)) == [(x << bits) & TOP for x in a]
    assert unpack(limbs.low_bits(pack(a), bits)) == [x & ((1 << bits) - 1) for x in a]


@settings(max_examples=30, deadline=None)
@given(rows, st.lists(st.integers(0, BITS), min_size=ROWS, max_size=ROWS))
def test_shifts_per_row(a, bits):
    n = jnp.array(bits, jnp.int32)
    assert unpack(jax.jit(limbs.shift_right_by)(pack(a), n)) == [x >> k for x, k in zip(a, bits)]
    got = unpack(jax.jit(limbs.shift_left_by)(pack(a), n))
    assert got == [(x << k) & TOP for x, k in zip(a, bits)]


def test_from_int_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match='2 limbs'):
        limbs.from_int(1 << 32, 2)
    with pytest.raises(ValueError, match='-1'):
        limbs.from_int(-1, 2)
