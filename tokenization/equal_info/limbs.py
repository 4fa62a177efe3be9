"""Unsigned integers of more than 32 bits as arrays: 16-bit limbs in uint32, lowest first.

JAX has no integers wider than 32 bits by default, and a window of 128 bits needs 145. A number
is an array `[..., Z]` whose last axis holds its limbs; the other axes broadcast. Limbs of 16 bits
in words of 32 leave room for products and carries:

    0x12345678 with Z = 3:   [0x5678, 0x1234, 0]

Z is static and stays the same; higher bits are lost, as with machine integers.

>>> a_Z, b_Z = from_int(0x1FFFF, 2), from_int(3, 2)
>>> hex(to_int(add(a_Z, b_Z))), hex(to_int(scale(a_Z, np.uint32(6), shift=1)))
('0x20002', '0x5fffd')
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

BITS = 16
_MASK = (1 << BITS) - 1


def from_int(value: int, limbs: int) -> np.ndarray:
    """Returns a Python integer as uint32 `[limbs]`.

    Raises:
      ValueError: it is negative or does not fit.
    """
    if value < 0 or value >> (BITS * limbs):
        raise ValueError(f'{value} does not fit {limbs} limbs of {BITS} bits')
    return np.array([(value >> (BITS * i)) & _MASK for i in range(limbs)], np.uint32)


def to_int(a_Z: np.ndarray) -> int:
    """Returns one number, `[Z]`, as a Python integer."""
    return sum(int(limb) << (BITS * i) for i, limb in enumerate(np.asarray(a_Z)))


def add(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a + b."""
    carry: jax.Array | int = 0
    out = []
    for x, y in zip(_split(a), _split(b)):
        total = x + y + carry
        out.append(total & _MASK)
        carry = total >> BITS
    return _join(out)


def subtract(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a - b, where a >= b."""
    borrow: jax.Array | int = 0
    out = []
    for x, y in zip(_split(a), _split(b)):
        total = x - y - borrow  # modulo 2**32: the top bit is set if the result is negative
        out.append(total & _MASK)
        borrow = total >> 31
    return _join(out)


def less(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a < b, bool without the last axis."""
    result: jax.Array | bool = False
    for x, y in zip(_split(a), _split(b)):
        result = (x < y) | ((x == y) & result)
    return jnp.asarray(result)


def equal(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a == b, bool without the last axis."""
    return jnp.all(a == b, axis=-1)


def scale(a: jax.Array, factor: jax.Array, shift: int) -> jax.Array:
    """Returns floor(a * factor / 2**shift).

    Args:
      a: `[..., Z]`.
      factor: uint32 `[...]`, at most 2**16; the product may need one more limb than a.
      shift: static, at most 16; the result must fit Z limbs.
    """
    carry = jnp.zeros((), jnp.uint32)
    out = []
    for x in _split(a):
        # At most (2**16 - 1) * 2**16 + (2**16 - 1) = 2**32 - 1.
        total = x * factor + carry
        out.append(total & _MASK)
        carry = total >> BITS
    return shift_right(_join([*out, carry]), shift)[..., :-1]


def shift_right(a: jax.Array, bits: int) -> jax.Array:
    """Returns a >> bits, for a static number of bits."""
    whole, part = divmod(bits, BITS)
    limbs = _split(a)[whole:]
    limbs += [jnp.zeros_like(a[..., 0])] * (a.shape[-1] + 1 - len(limbs))
    return _join([(x >> part) | ((y << (BITS - part)) & _MASK) for x, y in pairwise(limbs)])


def shift_left(a: jax.Array, bits: int) -> jax.Array:
    """Returns a << bits, for a static number of bits; bits above the last limb are lost."""
    whole, part = divmod(bits, BITS)
    zero = jnp.zeros_like(a[..., 0])
    limbs = ([zero] * (whole + 1) + _split(a))[: a.shape[-1] + 1]
    return _join([((y << part) & _MASK) | (x >> (BITS - part)) for x, y in pairwise(limbs)])


def shift_right_by(a: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns a >> bits, for a number of bits per row, int32 `[...]`, at most 16 Z."""
    part = (bits % BITS).astype(jnp.uint32)[..., None]
    limbs = _limbs_from(a, bits // BITS)
    return (limbs[..., :-1] >> part) | ((limbs[..., 1:] << (BITS - part)) & _MASK)


def shift_left_by(a: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns a << bits, for a number of bits per row, int32 `[...]`, at most 16 Z."""
    part = (bits % BITS).astype(jnp.uint32)[..., None]
    limbs = _limbs_from(a, -(bits // BITS) - 1)
    return ((limbs[..., 1:] << part) & _MASK) | (limbs[..., :-1] >> (BITS - part))


def low_bits(a: jax.Array, bits: int) -> jax.Array:
    """Returns a modulo 2**bits, for a static number of bits."""
    masks = [(1 << max(0, min(BITS, bits - BITS * i))) - 1 for i in range(a.shape[-1])]
    return a & jnp.array(masks, jnp.uint32)


def bit_length(a: jax.Array) -> jax.Array:
    """Returns the bit length of a (0 for 0), int32 without the last axis."""
    below = BITS * np.arange(a.shape[-1])
    bits = 32 - jax.lax.clz(a).astype(jnp.int32)
    return jnp.max(jnp.where(a > 0, below + bits, 0), axis=-1)


def _limbs_from(a: jax.Array, first: jax.Array) -> jax.Array:
    """Returns limbs `first` to `first` + Z of a, zeros outside; `first` may be negative."""
    Z = a.shape[-1]
    padded = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(Z + 1, Z + 1)])
    at = first[..., None] + jnp.arange(Z + 1) + Z + 1
    return jnp.take_along_axis(padded, jnp.broadcast_to(at, (*a.shape[:-1], Z + 1)), axis=-1)


def _split(a: jax.Array) -> list[jax.Array]:
    return [a[..., i] for i in range(a.shape[-1])]


def _join(limbs: list[jax.Array]) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*limbs), axis=-1)
