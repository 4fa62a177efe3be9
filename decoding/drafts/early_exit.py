"""Early exit: the target's own first layers draft, and are not run again to verify.

A chain of tokens is drawn from the stream after the first E layers, read out by the target's own
final norm and output table, or by an adapter of one attention block in front of that table
(Kangaroo, Liu et al. 2024). The rows that those layers write into the target's cache are the ones
that verification needs, so that it runs the layers above only.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decoding import sample
from decoding import tree as tree_lib
from decoding.drafter import Begun, Drafter, Model, Outcome, Text
from decoding.drafts import adapter as adapter_lib
from decoding.sample import Sampler
from decoding.tree import WithoutReplacement
from lm.kernels.mask import Mask
from lm.model import cache as cache_lib
from lm.model import params as params_lib
from lm.model import tables, transformer
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.params import Params

DRAFTS = 2  # tag of draft noise, which must not be the noise that verifies


class Weights(NamedTuple):
    """`Drafter.params`; another sampler compiles nothing anew.

    Attributes:
      sampler: makes the draft's law of its logits.
      adapter: see `adapter.init`, or None.
      target: parameters of the target (the same arrays, not a copy), with which an adapter reads
        the prompts; None without one.
    """

    sampler: Sampler
    adapter: Params | None
    target: Params | None


class _Exit(NamedTuple):
    """What is static: the target's config, E, tokens of a chain, and the id never drawn."""

    config: Config
    layers: int
    length: int
    bos: int | None


def early_exit(
    target: Model,
    layers: int,
    length: int,
    sampler: Sampler | None = None,
    adapter: Params | None = None,
) -> Drafter:
    """Returns the drafter of chains drawn from the target's first layers.

    Kangaroo ends a chain early where the draft is unsure; here all chains of a batch have one
    length, since no row could save a pass by itself.

    Args:
      target: the model that will verify.
      layers: E, how many of its layers draft.
      length: tokens of a chain.
      sampler: what makes the draft's law of its logits; by default they are taken as they are.
        Best the target's, with one setting for all rows; a repetition penalty is left out.
      adapter: see `adapter.init`; none by default.

    Raises:
      ValueError: `layers` or `length` is out of range; a setting of `sampler` is no number.
    """
    config = target.config
    if not 1 <= layers < config.n_layers:
        raise ValueError(
            f'early_exit: {layers} layers; expected at least 1, and fewer than the target has: '
            f'{config.n_layers}'
        )
    if length < 1:
        raise ValueError(f'early_exit: chains of {length} tokens; expected at least 1')
    if any(jnp.ndim(setting) for setting in jax.tree.leaves(sampler)):
        raise ValueError('early_exit: settings of its sampler are numbers, the same for all rows')
    static = _Exit(config, layers, length, target.bos)
    sampler = dataclasses.replace(sampler or Sampler(), repetition_penalty=None)
    return Drafter(
        init=functools.partial(_init, static),
        propose=functools.partial(_propose, static),
        update=_update,
        params=Weights(sampler, adapter, None if adapter is None else target.params),
        trees=WithoutReplacement,
        nodes=length + 1,
        depth=length,
        branching=1,
        calls=length,
        size=_size(config, layers, adapter),
        model=target,
        shared_layers=layers,
    )


def _init(static: _Exit, weights: Weights, text: Text, rows: int) -> Cache | None:
    """Returns the adapter's cache of all but the last tokens."""
    if weights.adapter is None or weights.target is None:
        return None
    config = static.config
    own = tables.for_texts(weights.target['tables'], config, text.key_B)  # the loop's own tables
    target = weights.target if own is None else {**weights.target, 'tables': own}
    b, s = text.token_BS.shape
    positions_BS = jnp.broadcast_to(jnp.arange(s), (b, s))
    token_BS = jnp.where(positions_BS < text.length_B[:, None], text.token_BS, 0)
    x_BSD, _ = _first_layers(static, target, token_BS, positions_BS, None)
    cache = cache_lib.init(adapter_lib.one_layer(config), b, rows)
    _, filled = adapter_lib.adapt(weights.adapter, config, x_BSD, positions_BS, cache=cache)
    assert filled is not None
    return cache_lib.truncate(filled, text.length_B - 1)


def _propose(
    static: _Exit, weights: Weights, own: Cache | None, text: Text, target: Params, cache: Cache
) -> tuple[WithoutReplacement, Cache | None, Begun]:
    """Draws a chain; every node, the last one too, leaves its rows in both caches."""
    root_B = text.length_B - 1

    def draft(carry, depth):
        token_B, cache, own = carry
        x_BD, h_BD, cache, own = _node(static, weights, target, token_B, root_B + depth, cache, own)
        law_BV = _law(static, weights.sampler, target, h_BD)
        key_B = sample.at_position(text.key_B, root_B, DRAFTS, depth)
        noise_BV = sample.gumbel(key_B, law_BV.shape[1:], law_BV.dtype)
        next_B = jnp.argmax(law_BV + noise_BV, axis=-1).astype(jnp.int32)
        return (next_B, cache, own), (token_B, x_BD, law_BV)

    start = (tree_lib.at(text.token_BS, root_B), cache, own)
    (last_B, cache, own), (token_TB, x_TBD, law_TBV) = jax.lax.scan(
        draft, start, jnp.arange(static.length)
    )
    # the last node drafts nothing, but the layers above and the adapter need its rows
    end_B = root_B + static.length
    x_BD, _, cache, own = _node(static, weights, target, last_B, end_B, cache, own)
    x_BTD = jnp.concatenate([x_TBD, x_BD[None]]).swapaxes(0, 1)
    token_BT = jnp.concatenate([token_TB, last_B[None]]).T
    # a leaf's law is never read
    law_BTV = jnp.pad(law_TBV.swapaxes(0, 1), ((0, 0), (0, 1), (0, 0)))
    return _chain(token_BT, law_BTV), own, Begun(x_BTD, cache)


def _update(weights: Weights, own: Cache | None, outcome: Outcome) -> Cache | None:
    """Drops the adapter's rows of rejected nodes; a chain's accepted ones lie in their places."""
    return None if own is None else cache_lib.truncate(own, outcome.text.length_B - 1)


def _node(
    static: _Exit, weights: Weights, target: Params, token_B: jax.Array, position_B: jax.Array,
    cache: Cache, own: Cache | None,
) -> tuple[jax.Array, jax.Array, Cache, Cache | None]:  # fmt: skip
    """Runs one node: the stream after E layers, what is read out of it, and both caches."""
    position_B1 = position_B[:, None]
    x_B1D, longer = _first_layers(
        static, target, token_B[:, None], position_B1, cache_lib.write_positions(cache, position_B1)
    )
    assert longer is not None
    if weights.adapter is None:
        h_B1D = transformer.final_norm(target['body'], static.config, x_B1D)
    else:
        h_B1D, own = adapter_lib.adapt(
            weights.adapter, static.config, x_B1D, position_B1, cache=own
        )
    return x_B1D[:, 0], h_B1D[:, 0], longer, own


def _first_layers(
    static: _Exit, target: Params, token_BL: jax.Array, positions_BL: jax.Array, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    x_BLD = tables.embed(target['tables'], static.config, token_BL)
    mask = Mask(positions_BL, positions_BL[:, None])
    return transformer.blocks(
        target['body'], static.config, x_BLD, mask, cache, only=(0, static.layers)
    )


def _law(static: _Exit, sampler: Sampler, target: Params, h_BD: jax.Array) -> jax.Array:
    """Returns the draft's log-probabilities `[B, V]`."""
    logits_BV = tables.unembed(target['tables'], static.config, h_BD)
    if static.bos is not None:
        logits_BV = logits_BV.at[:, static.bos].set(-jnp.inf)
    return sample.log_law(sampler, logits_BV)


def _chain(token_BT: jax.Array, law_BTV: jax.Array) -> WithoutReplacement:
    nodes_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1], dtype=jnp.int32), token_BT.shape)
    return WithoutReplacement(token_BT, nodes_BT - 1, nodes_BT, nodes_BT >= 0, law_BTV)


def _size(config: Config, layers: int, adapter: Params | None) -> int:
    """Returns the parameters that one draft call runs: E layers, the adapter, the output table.

    Drafting T nodes costs T passes of E layers, of which the target's pass over them saves one:
    so `calls` is T - 1.
    """
    final_norm = config.d_model
    shared = params_lib.count_body(dataclasses.replace(config, n_layers=layers)) - final_norm
    own = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    return shared + own + config.vocab_size * config.d_model
