"""The scores that a head returns, and the sampling distributions they define.

The loop needs a distribution to draw from, its most probable token, and the top-k tokens. Dense
logits give all three, and so does a search of a vocabulary too large for dense logits
(`decoding.large_vocabulary`).
"""

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from decoding import sample, tree
from decoding.sample import Sampler


class Distribution(Protocol):
    """The distribution of the next token after each of T nodes."""

    def draw(self, node_B: jax.Array, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
        """Draws the token at a position of each text, int32 `[B]`, after one node of each."""
        ...

    def greatest(self, node_B: jax.Array) -> jax.Array:
        """Returns the most probable token after one node of each row, int32 `[B]`."""
        ...


class Scores(Protocol):
    """The result of a head for T nodes of each row."""

    def distribution(self, sampler: Sampler, seen_BTV: jax.Array | None) -> Distribution:
        """Returns the distribution to sample; `seen_BTV` as for `sample.log_probs`."""
        ...

    def top(self, k: int) -> jax.Array:
        """Returns the ids of the k greatest logits, int32 `[B, T, k]`, the greatest first."""
        ...


@flax.struct.dataclass
class Probabilities:
    """A distribution given by the log-probabilities of all tokens, `[B, T, V]`."""

    logprob_BTV: jax.Array

    def draw(self, node_B: jax.Array, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
        """See `Distribution`; the draw is `sample.draw`."""
        return sample.draw(tree.at(self.logprob_BTV, node_B), key_B, position_B)

    def greatest(self, node_B: jax.Array) -> jax.Array:
        """See `Distribution`; ties go to the first."""
        return jnp.argmax(tree.at(self.logprob_BTV, node_B), axis=1).astype(jnp.int32)


@flax.struct.dataclass
class Logits:
    """Scores given by the logits of all tokens, f32 `[B, T, V]`."""

    logits_BTV: jax.Array

    def distribution(self, sampler: Sampler, seen_BTV: jax.Array | None) -> Probabilities:
        """See `Scores`."""
        return Probabilities(sample.log_probs(sampler, self.logits_BTV, seen_BTV))

    def top(self, k: int) -> jax.Array:
        """See `Scores`."""
        return top(self.logits_BTV, k)


def of_head(result: Any) -> Scores:
    """Returns a head's result as scores; an array is taken to be logits."""
    return Logits(result) if isinstance(result, jax.Array) else result


def top(x: jax.Array, k: int, block: int = 128) -> jax.Array:
    """Returns the indices of `lax.top_k`, in about a fifth of its time for large V on CPU.

    Only the k blocks with the greatest maxima can hold one of the k greatest. In their original
    order, ties go to the first entry, as in `lax.top_k`.

    Args:
      x: `[..., V]`.
      k: at most V.
      block: entries per block.
    """
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    blocks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, block)
    kept = min(k, blocks.shape[-2])
    best = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), kept)[1], axis=-1)
    entries = jnp.take_along_axis(blocks, best[..., None], axis=-2)
    place = jax.lax.top_k(entries.reshape(*x.shape[:-1], -1), k)[1]
    return jnp.take_along_axis(best, place // block, axis=-1) * block + place % block


class Apply(Protocol):
    """Returns the logits that go to the sampler, `[B, T, V]`, from those of the model.

    Args:
      params: of the transform.
      logits_BTV: f32, of the token after each node; -inf for ids that are never drawn, and must
        stay so.
      drafted: the tree. A node's context is the text up to the root, the node's ancestors
        (`tree.ancestors`) and its own token, `drafted.token_BT`.
      text: tokens, lengths and keys of the rows (`decoding.drafter.Text`); the last token is the
        root.
    """

    def __call__(
        self, params: Any, logits_BTV: jax.Array, drafted: tree.DraftTree, text: Any, **extra: Any
    ) -> jax.Array: ...


class Transform(NamedTuple):
    """A change of the logits before the sampler; verifiers stay exact for the changed distribution.

    Create it once and reuse it: `apply` is a static argument, and a new one recompiles.

    Attributes:
      apply: see `Apply`.
      params: arrays that it takes.
    """

    apply: Apply
    params: Any = None
