"""The exact rules at one node, on distributions of one token (see `decoding.verify` for trees)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def rejection_step(
    target_V: jax.Array, draft_V: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of recursive rejection (Jeon et al. 2024, RSD; Chen et al. 2024, Sequoia).

    Args:
      target_V: distribution that the emitted token must have.
      draft_V: distribution from which `token` was drawn; all 0 if no token was left.
      token: scalar.

    Returns:
      The probability of accepting the token x; if it is rejected, the target's residual and the
      next draft's distribution without replacement (with replacement: `draft_V`):

          min(1, target(x) / draft(x))    [target - draft]_+ / sum    draft without x / sum

    >>> import jax.numpy as jnp
    >>> target, draft = jnp.asarray([0.5, 0.5]), jnp.asarray([0.75, 0.25])
    >>> [x.round(3).tolist() for x in rejection_step(target, draft, 0)]
    [0.667..., [0.0, 1.0], [0.0, 1.0]]
    """
    q, p = target_V[token], draft_V[token]
    acceptance = jnp.minimum(1, _ratio(q, p))
    # if the two agree, rounding may leave no residual: the rejection was rounding error too
    residual_V = _normalised(jnp.maximum(target_V - draft_V, 0), otherwise=target_V)
    rest_V = draft_V.at[token].set(0)
    return acceptance, residual_V, _normalised(rest_V, otherwise=jnp.zeros_like(rest_V))


class KSeqPlan(NamedTuple):
    """How K-SEQ treats k drafts.

    Attributes:
      rho: draft x is accepted with probability min(1, target(x) / (rho draft(x))).
      beta: probability that a given draft is accepted.
      residual_V: distribution of the token if none is accepted.
    """

    rho: jax.Array
    beta: jax.Array
    residual_V: jax.Array


def k_seq_plan(target_V: jax.Array, draft_V: jax.Array, k: jax.Array | int) -> KSeqPlan:
    """Returns K-SEQ with its best rho (Sun et al. 2023, SpecTr, section 4).

    With beta = sum min(draft, target / rho), every rho with 1 - (1 - beta)^k <= rho beta is exact,
    and the smallest accepts most. The left side falls with rho and the right side rises: bisection.
    The residual is [target - min(draft, target / rho) (1 - (1 - beta)^k) / beta]_+ / sum.

    Args:
      target_V, draft_V: probabilities.
      k: number of i.i.d. drafts; 0 counts as 1.
    """
    k = jnp.maximum(jnp.asarray(k, target_V.dtype), 1)
    tolerance = jnp.finfo(target_V.dtype).eps

    def accepted(rho):
        beta = jnp.minimum(jnp.sum(jnp.minimum(draft_V, target_V / rho)), 1)
        return beta, -jnp.expm1(k * jnp.log1p(-beta))

    def halve(bounds):
        low, high = bounds
        middle = (low + high) / 2
        beta, any_accepted = accepted(middle)
        exact = any_accepted <= middle * beta
        return jnp.where(exact, low, middle), jnp.where(exact, middle, high)

    def unfinished(bounds):
        return bounds[1] - bounds[0] > 2 * tolerance * bounds[1]

    _, rho = jax.lax.while_loop(unfinished, halve, (jnp.ones_like(k), k))
    beta, any_accepted = accepted(rho)
    times = _ratio(any_accepted, beta)  # expected acceptances per unit of beta
    residual_V = jnp.maximum(target_V - jnp.minimum(draft_V, target_V / rho) * times, 0)
    return KSeqPlan(rho, beta, _normalised(residual_V, otherwise=target_V))


def k_seq_acceptance(target: jax.Array, draft: jax.Array, rho: jax.Array) -> jax.Array:
    """Returns the acceptance probability min(1, target / (rho draft)), elementwise."""
    return jnp.minimum(1, _ratio(target, rho * draft))


def _normalised(x_V: jax.Array, otherwise: jax.Array) -> jax.Array:
    total = jnp.sum(x_V)
    return jnp.where(_is_normal(total), _ratio(x_V, total), otherwise)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, and 0 where y is 0 or subnormal, which processors may flush to 0."""
    return jnp.where(_is_normal(y), x / jnp.where(_is_normal(y), y, 1), 0)


def _is_normal(x: jax.Array) -> jax.Array:
    return x >= jnp.finfo(x.dtype).tiny
