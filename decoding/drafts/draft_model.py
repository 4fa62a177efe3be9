"""A draft model and its cache: what of it is run in a round, and what is kept of it.

The nodes of a level are run together, and see the text, their ancestors and themselves. The root
and the levels stand behind each other in the draft model's cache:

    ... text | root | level 1 | level 2 | ...        rows root, root + 1, ...

Nodes of the last level are never run. If one of them is accepted, its row is missing when the next
round begins, which is why each round runs the last two tokens of the text, not only the root.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from decoding import sample
from decoding.drafter import Model, Outcome, Text
from decoding.sample import Sampler
from lm.kernels.mask import pack_bits
from lm.model import cache as cache_lib
from lm.model import tables, transformer
from lm.model.cache import Cache
from lm.model.params import Params


class Weights(NamedTuple):
    """`Drafter.params` of a drafter with a model; another sampler compiles nothing anew."""

    params: Params
    sampler: Sampler


@flax.struct.dataclass
class State:
    """Between rounds.

    Attributes:
      cache: of the draft model; after `update`, all of the text that it will not run again.
      root_B: int32, the row of the last tree's root.
      row_BT: int32, row of each node of that tree, counted from its root's.
      tables: drawn for these texts (`lm.model.tables.for_texts`); None where they are learned.
    """

    cache: Cache
    root_B: jax.Array
    row_BT: jax.Array
    tables: Params | None


class Level(NamedTuple):
    """Nodes of one depth, run through the draft model.

    Attributes:
      law_BMV: log-probabilities from which their children are drawn.
      sees_BMR: bool, which of the R tree rows in the cache each node sees; the last M are its
        own level's.
      seen_BMV: bool, tokens of the text and of the path; None where the sampler does not ask.
      depth: of the nodes.
    """

    law_BMV: jax.Array
    sees_BMR: jax.Array
    seen_BMV: jax.Array | None
    depth: int


def prefill(model: Model, text: Text, rows: int) -> Cache:
    """Returns a cache that holds each text but its last token."""
    b, l = text.token_BS.shape
    positions_BL = jnp.broadcast_to(jnp.arange(l), (b, l))
    token_BL = jnp.where(positions_BL < text.length_B[:, None], text.token_BS, 0)
    _, cache = _body(model, token_BL, positions_BL, cache_lib.init(model.config, b, rows))
    return cache_lib.truncate(cache, text.length_B - 1)


def update(weights: Weights, state: State, outcome: Outcome) -> State:
    """Keeps the rows of the root and of the accepted nodes but the last, which will run again."""
    del weights
    path_BP, accepted_B = outcome.verdict.path_BP, outcome.verdict.accepted_B
    rows_BP = jnp.take_along_axis(state.row_BT, path_BP, axis=1)
    cache = cache_lib.keep(state.cache, state.root_B, rows_BP, accepted_B)
    return dataclasses.replace(state, cache=cache)


def begin(model: Model, sampler: Sampler, cache: Cache, text: Text) -> tuple[Level, Cache]:
    """Runs the last two tokens of each text; returns the root, and a cache that ends with it."""
    last_B = text.length_B - 1
    start_B = jnp.maximum(last_B - 1, 0)
    positions_BL = start_B[:, None] + jnp.arange(2)
    # A text of one token runs it twice, once in the row behind it, which is then given up.
    token_BL = pick(text.token_BS, jnp.minimum(positions_BL, last_B[:, None]))
    h_BLD, cache = _body(model, token_BL, positions_BL, cache_lib.truncate(cache, start_B))
    h_BLD = pick(h_BLD, (last_B - start_B)[:, None])
    sees_BMR = jnp.ones((*last_B.shape, 1, 1), bool)
    seen_BMV = None
    if sampler.repetition_penalty is not None:
        seen_BMV = _in_text(text, model.config.vocab_size)[:, None]
    level = Level(_law(model, sampler, h_BLD, seen_BMV), sees_BMR, seen_BMV, 0)
    return level, cache_lib.truncate(cache, text.length_B)


def extend(
    model: Model, sampler: Sampler, cache: Cache, text: Text, above: Level,
    parent_BM: jax.Array, token_BM: jax.Array,
) -> tuple[Level, Cache]:  # fmt: skip
    """Runs the level below one, the last in the cache; returns it, and a longer cache.

    Args:
      model, sampler, cache, text: see `begin`.
      above: the level above.
      parent_BM: int32, each new node's place in it.
      token_BM: int32, the new nodes' tokens.
    """
    b, m = token_BM.shape
    itself_BMM = jnp.broadcast_to(jnp.eye(m, dtype=bool), (b, m, m))
    sees_BMR = jnp.concatenate([pick(above.sees_BMR, parent_BM), itself_BMM], axis=-1)
    depth = above.depth + 1
    positions_BM = jnp.broadcast_to((text.length_B - 1 + depth)[:, None], (b, m))
    h_BMD, cache = _body(
        model, token_BM, positions_BM, cache,
        ancestors_BLW=pack_bits(sees_BMR), nodes=sees_BMR.shape[-1],
    )  # fmt: skip
    seen_BMV = None
    if above.seen_BMV is not None:
        own_BMV = jax.nn.one_hot(token_BM, model.config.vocab_size, dtype=bool)
        seen_BMV = pick(above.seen_BMV, parent_BM) | own_BMV
    return Level(_law(model, sampler, h_BMD, seen_BMV), sees_BMR, seen_BMV, depth), cache


def pick(values_BM: jax.Array, index_BK: jax.Array) -> jax.Array:
    """Returns each row's values at its indices: `[B, M, ...]` -> `[B, K, ...]`."""
    return jax.vmap(lambda values_M, index_K: values_M[index_K])(values_BM, index_BK)


def _body(model: Model, token_BL, positions_BL, cache: Cache, **tree) -> tuple[jax.Array, Cache]:
    x_BLD = tables.embed(model.params['tables'], model.config, token_BL)
    h_BLD, longer = transformer.body(
        model.params['body'], model.config, x_BLD, positions_BL, cache=cache, **tree
    )
    assert longer is not None
    return h_BLD, longer


def _law(model: Model, sampler: Sampler, h_BMD: jax.Array, seen_BMV) -> jax.Array:
    logits_BMV = tables.unembed(model.params['tables'], model.config, h_BMD)
    if model.bos is not None:
        logits_BMV = logits_BMV.at[..., model.bos].set(-jnp.inf)
    return sample.log_law(sampler, logits_BMV, seen_BMV)


def _in_text(text: Text, vocab_size: int) -> jax.Array:
    """Returns bool `[B, V]`: the tokens that each text has."""
    b, s = text.token_BS.shape
    live_BS = jnp.arange(s) < text.length_B[:, None]
    token_BS = jnp.where(live_BS, text.token_BS, vocab_size)
    none_BV = jnp.zeros((b, vocab_size), bool)
    return none_BV.at[jnp.arange(b)[:, None], token_BS].set(True, mode='drop')
