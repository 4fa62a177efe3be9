"""From products of queries and keys to logits: one argument of every kernel."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.mask import Mask


@flax.struct.dataclass
class Scoring:
    """Scale, soft cap, temperature and noise of the logits.

    The logit of key s, whose bias is `Mask.key_bias`, is computed in this order:

        logit_s = (cap tanh(scale q . k_s / cap) + bias_s + noise_s) / temperature

    Without a cap the first term is scale q . k_s; an absent bias or noise is 0, an absent
    temperature 1, and neither costs an operand or an operation. Only q, k and v get gradients:
    every backend treats bias, noise and temperature as constants.

    Attributes:
      scale: static; usually C ** -0.5.
      softcap: static; the cap of Gemma 2, or None.
      temperature: f32 scalar, positive; divides the logits, as in Keyformer (Adnan et al. 2024),
        whose temperature grows with the step.
      noise: f32 `[B, K or 1, S]`, one value per key, such as Keyformer's Gumbel noise; finite for
        every row with a key.
    """

    scale: float = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)
    temperature: jax.Array | float | None = None
    noise: jax.Array | None = None

    @property
    def static(self) -> 'Scoring':
        """Scale and cap alone: the static arguments of a kernel."""
        return Scoring(self.scale, self.softcap)

    def capped(self, products: jax.Array) -> jax.Array:
        """Returns cap tanh(scale products / cap): f32 logits before bias, noise, temperature."""
        s = self.scale * products
        return s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)


class Terms(NamedTuple):
    """The data of a scoring, as kernels apply it: logits = capped * factor + offset.

    Attributes:
      factor: f32 `[1]`, 1 / temperature; None means 1.
      offset: f32 `[B, K or 1, S]`, (bias + noise) / temperature; None means 0.

    In kernels, the fields are references or block specs instead of arrays.
    """

    factor: Any
    offset: Any


def key_terms(mask: Mask | None, scoring: Scoring) -> jax.Array | None:
    """Returns bias + noise, f32 `[B, K or 1, S]`; None without either."""
    bias = None if mask is None else mask.key_bias
    given = [x.astype(jnp.float32) for x in (bias, scoring.noise) if x is not None]
    return sum(given[1:], given[0]) if given else None


def terms(mask: Mask | None, scoring: Scoring) -> Terms:
    """Returns the terms of a mask's bias and a scoring's data, as constants for autodiff."""
    offset, factor = key_terms(mask, scoring), None
    if scoring.temperature is not None:
        factor = 1.0 / jnp.asarray(scoring.temperature, jnp.float32).reshape(1)
        offset = None if offset is None else offset * factor
    return jax.lax.stop_gradient(Terms(factor, offset))


def complete(capped_BKGLS: jax.Array, found: Terms) -> jax.Array:
    """Returns the logits `[B, K, G, L, S]`: capped * factor + offset."""
    if found.factor is not None:
        capped_BKGLS = capped_BKGLS * found.factor[0]
    if found.offset is not None:
        capped_BKGLS = capped_BKGLS + found.offset[:, :, None, None]
    return capped_BKGLS
