"""From logits to the sampling distribution, and draws keyed by position."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from decoding import tree

BLOCK = 256  # tokens per block in `draw`


@flax.struct.dataclass
class Sampler:
    """How logits become the distribution of the next token; None skips a step.

    In this order: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et
    al. 2020), min-p (Nguyen et al. 2024).

    Attributes:
      temperature: divides the logits; 0 puts all mass on the greatest one, the first of ties.
      top_k: keeps the k most probable tokens, and ties with the last of them.
      top_p: keeps the smallest set of most probable tokens whose mass reaches p, and ties with the
        last of them.
      min_p: keeps tokens at least this probable relative to the most probable one.
      repetition_penalty: divides the positive logits of tokens already in the text, and multiplies
        their negative ones.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None
    min_p: jax.Array | float | None = None
    repetition_penalty: jax.Array | float | None = None


def check(sampler: Sampler) -> None:
    """Raises ValueError, naming the field, if a value known before tracing is out of range."""

    def require(field: str, expected: str, is_right: Callable[[np.ndarray], np.ndarray]) -> None:
        value = getattr(sampler, field)
        if value is None or isinstance(value, jax.core.Tracer):
            return
        if not np.all(is_right(np.asarray(value))):
            raise ValueError(f'{field} is {value}; expected {expected}')

    def is_share(x: np.ndarray) -> np.ndarray:
        return (x > 0) & (x <= 1)

    require('temperature', '0 or more, and finite', lambda x: (x >= 0) & np.isfinite(x))
    require('top_k', 'an integer, 1 or more', lambda x: (x >= 1) & (x == np.floor(x)))
    require('top_p', 'more than 0, at most 1', is_share)
    require('min_p', 'more than 0, at most 1', is_share)
    require('repetition_penalty', 'more than 0, and finite', lambda x: (x > 0) & np.isfinite(x))


def log_probs(sampler: Sampler, logits: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Returns the log-probabilities to sample from, `[..., V]`; -inf outside the support.

    Args:
      sampler: each field a scalar, or an array that broadcasts against `[...]`.
      logits: f32 (or f64) `[..., V]`.
      seen: bool `[..., V]`: tokens already in the text; needed for a repetition penalty.

    Raises:
      ValueError: a repetition penalty without `seen`.
    """

    def setting(value, dtype=logits.dtype) -> jax.Array:
        return jnp.asarray(value, dtype)[..., None]

    x = logits
    if sampler.repetition_penalty is not None:
        if seen is None:
            raise ValueError('repetition_penalty is set, but not `seen`: the tokens of each text')
        penalty = setting(sampler.repetition_penalty)
        x = jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x)

    # From here on the maximum is 0: no temperature overflows it, and no step removes it.
    first = jnp.arange(x.shape[-1]) == jnp.argmax(x, axis=-1, keepdims=True)
    x = x - jnp.max(x, axis=-1, keepdims=True)
    temperature = setting(sampler.temperature)
    positive = temperature >= jnp.finfo(x.dtype).tiny
    point_mass = jnp.where(first, 0.0, -jnp.inf)
    x = jnp.where(positive, x / jnp.where(positive, temperature, 1), point_mass)

    if sampler.top_k is not None:
        k = setting(sampler.top_k, jnp.int32)
        x = _keep_greatest(x, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k)
    if sampler.top_p is not None:
        p, mass = setting(sampler.top_p), jnp.exp(x)
        needed = p * jnp.sum(mass, axis=-1, keepdims=True)

        def reaches_p(kept):
            # rounding could reach a p of 1 before the last token
            return (jnp.sum(jnp.where(kept, mass, 0), axis=-1, keepdims=True) >= needed) & (p < 1)

        x = _keep_greatest(x, reaches_p)
    if sampler.min_p is not None:
        x = jnp.where(x >= jnp.log(setting(sampler.min_p)), x, -jnp.inf)
    return x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))


def at_position(key_B: jax.Array, position_B: jax.Array, *tags: int) -> jax.Array:
    """Returns each text's key for a position; tags distinguish several uses of a position."""
    fold = jax.vmap(jax.random.fold_in)
    key_B = fold(key_B, position_B)
    for tag in tags:
        key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, tag)
    return key_B


def gumbel(key_B: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Returns Gumbel noise `[B, *shape]`, each row from its own key."""
    return jax.vmap(lambda key: jax.random.gumbel(key, shape, dtype))(key_B)


def draw(logprob_BV: jax.Array, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Draws the token at a position of each text, int32 `[B]`, by the Gumbel-max trick.

    Draws a block of the vocabulary by its mass, then one of its tokens. This takes noise for V /
    256 blocks and 256 tokens; noise for V tokens would cost more than a small draft model's pass.
    Equal log-probabilities, key and position give equal tokens.
    """
    b, v = logprob_BV.shape
    size = min(v, BLOCK)
    blocks = -(-v // size)
    padding = ((0, 0), (0, blocks * size - v))
    logprob_BJO = jnp.pad(logprob_BV, padding, constant_values=-jnp.inf).reshape(b, blocks, size)
    noise = gumbel(at_position(key_B, position_B), (blocks + size,), logprob_BV.dtype)
    mass_BJ = jax.nn.logsumexp(logprob_BJO, axis=2)
    block_B = jnp.argmax(mass_BJ + noise[:, :blocks], axis=1)
    logprob_BO = tree.at(logprob_BJO, block_B)
    within_B = jnp.argmax(logprob_BO + noise[:, blocks:], axis=1)
    return (block_B * size + within_B).astype(jnp.int32)


def _keep_greatest(x: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns `x <= 0` with -inf below the highest threshold that keeps enough entries.

    Bisects the threshold: a pass over V per bit costs far less than sorting V.

    Args:
      x: `[..., V]`.
      enough: from the kept entries, bool `[..., V]`, to bool `[..., 1]`; if it never holds, all are
        kept.
    """
    # non-negative floats compare as their bits do
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), integer)
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), integer)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = enough(bits <= middle)
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    high = jnp.broadcast_to(infinity, (*x.shape[:-1], 1))
    _, high = jax.lax.fori_loop(0, jnp.iinfo(integer).bits, halve, (-jnp.ones_like(high), high))
    return jnp.where(bits <= high, x, -jnp.inf)
