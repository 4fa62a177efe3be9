"""A draft model and its memory: the nodes that run in a round, and those that are kept.

The nodes of a level run in one pass, and see the text, their ancestors and themselves. The memory
holds them after the text, in the order in which they ran:

    ... text | last but one | root | level 1 | level 2 | ...

Nodes of the last level never run. If one of them is accepted, the memory lacks it when the next
round begins. So each round runs the last two tokens of the text, not only the root.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from decoding import scores
from decoding.drafter import Outcome, Prompt, Text
from decoding.sample import Sampler
from lm.kernels.mask import pack_bits
from lm.model import contract
from lm.model.contract import Memory, Model, Nodes


class Weights(NamedTuple):
    """`Drafter.params` of a drafter with a model; new sampler values do not recompile."""

    params: Any
    sampler: Sampler


class Draft(NamedTuple):
    """A draft model in use: its functions, its parameters and its sampler."""

    model: Model
    params: Any
    sampler: Sampler


@flax.struct.dataclass
class State:
    """The state between rounds.

    Attributes:
      memory: of the draft model; after `update` it lacks the last two tokens of each text.
      index_BT: int32, index of each node of the last tree among those that ran; the root has 0.
    """

    memory: Memory
    index_BT: jax.Array


class Level(NamedTuple):
    """Nodes of one depth, after their pass.

    Attributes:
      logprob_BMV: log-probabilities from which their children are drawn.
      sees_BMS: bool, which of the S nodes from the root on each node sees; the last M are its own
        level's.
      seen_BMV: bool, tokens of the text and the path; None without a repetition penalty.
      depth: of the nodes.
    """

    logprob_BMV: jax.Array
    sees_BMS: jax.Array
    seen_BMV: jax.Array | None
    depth: int


def prefill(model: Model, params: Any, prompt: Prompt, rows: int) -> Memory:
    """Returns a memory of all but the last two tokens of each prompt."""
    text = prompt.text
    kept_B = jnp.maximum(text.length_B - 2, 0)
    return model.start(params, contract.chain(prompt.token_BL), kept_B, rows, text.key_B).memory


def update(model: Model, weights: Weights, state: State, outcome: Outcome, **extra: Any) -> State:
    """Keeps the token before the root, the root, and all accepted nodes but the last."""
    del weights
    index_BP = jnp.take_along_axis(state.index_BT, outcome.verdict.path_BP, axis=1)
    # the token before the root ran first
    index_BP = jnp.pad(index_BP[:, :-1] + 1, ((0, 0), (1, 0)))
    return dataclasses.replace(state, memory=model.keep(state.memory, index_BP, outcome.count_B))


def begin(draft: Draft, memory: Memory, text: Text) -> tuple[Level, Memory]:
    """Runs the last two tokens of each text; returns the root's level, and the memory."""
    position_BL = text.length_B[:, None] + jnp.arange(-2, 0)
    # In a text of one token, the first of the two has position -1, which no node sees.
    token_BL = pick(text.token_BS, jnp.maximum(position_BL, 0))
    memory, seen = draft.model.step(draft.params, memory, Nodes(token_BL, position_BL))
    sees_BMS = jnp.ones((text.length_B.shape[0], 1, 1), bool)
    seen_BMV = None
    if draft.sampler.repetition_penalty is not None:
        seen_BMV = _in_text(text, draft.model.vocab_size)[:, None]
    logprob_BMV = _log_probs(draft, memory, seen.h_BTD[:, 1:], seen_BMV)
    return Level(logprob_BMV, sees_BMS, seen_BMV, 0), memory


def extend(
    draft: Draft, memory: Memory, text: Text, above: Level, parent_BM: jax.Array,
    token_BM: jax.Array,
) -> tuple[Level, Memory]:  # fmt: skip
    """Runs the next level; returns it, and the memory.

    Args:
      draft, memory, text: see `begin`.
      above: the level above.
      parent_BM: int32, index of each new node's parent in it.
      token_BM: int32, the new nodes' tokens.
    """
    b, m = token_BM.shape
    itself_BMM = jnp.broadcast_to(jnp.eye(m, dtype=bool), (b, m, m))
    sees_BMS = jnp.concatenate([pick(above.sees_BMS, parent_BM), itself_BMM], axis=-1)
    depth = above.depth + 1
    position_BM = jnp.broadcast_to((text.length_B - 1 + depth)[:, None], (b, m))
    nodes = Nodes(token_BM, position_BM, pack_bits(sees_BMS), span=sees_BMS.shape[-1])
    memory, seen = draft.model.step(draft.params, memory, nodes)
    seen_BMV = None
    if above.seen_BMV is not None:
        own_BMV = jax.nn.one_hot(token_BM, draft.model.vocab_size, dtype=bool)
        seen_BMV = pick(above.seen_BMV, parent_BM) | own_BMV
    logprob_BMV = _log_probs(draft, memory, seen.h_BTD, seen_BMV)
    return Level(logprob_BMV, sees_BMS, seen_BMV, depth), memory


def pick(values_BM: jax.Array, index_BA: jax.Array) -> jax.Array:
    """Returns each row's values at its indices: `[B, M, ...]` -> `[B, A, ...]`."""
    return jax.vmap(lambda values_M, index_A: values_M[index_A])(values_BM, index_BA)


def _log_probs(draft: Draft, memory: Memory, h_BMD: jax.Array, seen_BMV) -> jax.Array:
    logits = scores.of_head(draft.model.head(draft.params, memory, h_BMD))
    distribution = logits.distribution(draft.sampler, seen_BMV)
    assert isinstance(distribution, scores.Probabilities), 'a draft model needs dense logits'
    return distribution.logprob_BTV


def _in_text(text: Text, vocab_size: int) -> jax.Array:
    """Returns bool `[B, V]`: the tokens that occur in each text."""
    b, s = text.token_BS.shape
    live_BS = jnp.arange(s) < text.length_B[:, None]
    token_BS = jnp.where(live_BS, text.token_BS, vocab_size)
    none_BV = jnp.zeros((b, vocab_size), bool)
    return none_BV.at[jnp.arange(b)[:, None], token_BS].set(True, mode='drop')
