"""Recursive speculative decoding: trees whose siblings are drawn without replacement.

Jeon et al. 2024, "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without
Replacement" (arXiv 2402.14160): RSD-C, of constant branching factors, is `branching`; RSD-S, by
stochastic beam search, is `beam`.
"""

import math

import jax
import jax.numpy as jnp

from decoding.drafter import Drafter
from decoding.drafts import levels
from decoding.drafts.levels import Children
from decoding.model import LM
from decoding.sample import Sampler
from decoding.tree import WithoutReplacement


def branching(lm: LM, factors: tuple[int, ...], sampler: Sampler | None = None) -> Drafter:
    """Returns RSD-C: every node at depth d has `factors[d]` children, by Gumbel-top-k.

    The tree has 1 + b0 + b0 b1 + ... nodes.

    Args:
      lm: the draft model.
      factors: children per node at each depth, the root's first.
      sampler: applied to the draft model's logits; by default their softmax.

    Raises:
      ValueError: no factors, or one outside of [1, V].
    """
    levels.check('factors: how many', len(factors))
    for i, factor in enumerate(factors):
        levels.check(f'factors[{i}]', factor, most=lm.model.vocab_size)

    def draw(logprob_BMV, key_B, level, carry):
        del carry
        token_BMA, perturbed_BMA = levels.top(logprob_BMV, key_B, factors[level - 1])
        return _children(token_BMA, perturbed_BMA > -jnp.inf)

    sizes = tuple(math.prod(factors[: i + 1]) for i in range(len(factors)))
    grown = levels.whole(draw, len(factors), WithoutReplacement)
    return levels.drafter(lm, sampler, grown, WithoutReplacement, sizes, max(factors))


def beam(lm: LM, width: int, length: int, sampler: Sampler | None = None) -> Drafter:
    """Returns RSD-S: each level holds the `width` nodes that stochastic beam search keeps.

    Kool et al. 2019, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling
    Sequences Without Replacement" (arXiv 1903.06059), algorithm 1. Each level is a sample of paths
    from the root without replacement; a node's children are its kept continuations, ordered by
    perturbed log-probability.

    This is exact although the number of children is random. In decreasing order, each
    Gumbel-perturbed value is independent of the token that attains it, given the tokens before.
    Whether there is an i-th child depends on its value alone, and so not on its token.

    Args:
      lm: the draft model.
      width: nodes per level.
      length: number of levels.
      sampler: applied to the draft model's logits; by default their softmax.

    Raises:
      ValueError: width or length below 1.
    """
    levels.check('width', width)
    levels.check('length', length)
    vocab_size = lm.model.vocab_size
    sizes: tuple[int, ...] = ()
    for _ in range(length):
        # small vocabularies fill the width over several levels
        sizes += (min(width, vocab_size * (sizes[-1] if sizes else 1)),)
    ranks = min(width, vocab_size)

    def draw(logprob_BMV, key_B, level, carry):
        # log-probability and perturbed log-probability of each path; the root's are any constants
        zeros_BM = jnp.zeros(logprob_BMV.shape[:2], logprob_BMV.dtype)
        phi_BM, psi_BM = carry or (zeros_BM, zeros_BM)
        token_BMA, g_BMA = levels.top(phi_BM[..., None] + logprob_BMV, key_B, ranks)
        phi_BMA = phi_BM[..., None] + jnp.take_along_axis(logprob_BMV, token_BMA, axis=2)
        psi_BMA = given_maximum(g_BMA, psi_BM)
        # rounding must not order a node before its elder sibling, or its token would matter
        psi_BMA = jax.lax.cummin(psi_BMA, axis=2)
        return levels.keep(token_BMA, psi_BMA, sizes[level - 1], (phi_BMA, psi_BMA))

    grown = levels.whole(draw, length, WithoutReplacement)
    return levels.drafter(lm, sampler, grown, WithoutReplacement, sizes, ranks)


def given_maximum(g_BMA: jax.Array, psi_BM: jax.Array) -> jax.Array:
    """Returns the Gumbel variables `g_BMA`, transformed to have the maximum `psi_BM`.

    -log(e^-psi - e^-Z + e^-g), with Z their maximum before (Kool et al. 2019), in the numerically
    stable form of that paper's appendix. The greatest becomes exactly psi; -inf stays.

    Args:
      g_BMA: perturbed log-probabilities of each node's best children, the greatest first.
      psi_BM: of the node itself; -inf (outside of the support) gives -inf for all children.
    """
    exists_BMA = (g_BMA > -jnp.inf) & (psi_BM > -jnp.inf)[..., None]
    g_BMA = jnp.where(exists_BMA, g_BMA, 0)
    psi_BMA = jnp.where(exists_BMA, psi_BM[..., None], 0)
    greatest_BMA = jnp.where(exists_BMA, g_BMA[..., :1], 0)
    t_BMA = psi_BMA - g_BMA + jnp.log1p(-jnp.exp(g_BMA - greatest_BMA))
    result = psi_BMA - jnp.maximum(t_BMA, 0) - jnp.log1p(jnp.exp(-jnp.abs(t_BMA)))
    return jnp.where(exists_BMA, result, -jnp.inf)


def _children(token_BMA: jax.Array, valid_BMA: jax.Array) -> Children:
    b, m, k = token_BMA.shape
    parent = jnp.broadcast_to(jnp.arange(m * k) // k, (b, m * k))
    return Children(parent, token_BMA.reshape(b, -1), valid_BMA.reshape(b, -1))
