"""Early exit: the target's first layers draft, and verification does not run them again.

A chain of tokens is drawn from the residual stream after the first E layers, through the target's
final norm and head, or through an adapter of one attention block before that head (Kangaroo, Liu et
al. 2024, arXiv 2404.18911). These layers write their rows into the target's memory, so that
verification runs only the layers above.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding import sample, scores
from decoding import tree as tree_lib
from decoding.drafter import (
    Context,
    Drafter,
    Method,
    Outcome,
    PartialPass,
    Prompt,
    Proposal,
    Provenance,
)
from decoding.model import LM
from decoding.sample import Sampler
from decoding.tree import WithoutReplacement
from lm.model.contract import NOTHING, Ask, Memory, Model, Nodes

DRAFTS = 2  # tag of draft noise, independent of the verifier's


class Adapter(NamedTuple):
    """A model that reads the residual stream after the first E layers, and its parameters.

    Attributes:
      model: its nodes are vectors; the target's head reads its hidden states.
      params: of the model.
    """

    model: Model
    params: Any


class Weights(NamedTuple):
    """`Drafter.params`; new sampler values do not recompile.

    Attributes:
      sampler: applied to the draft's logits.
      adapter: parameters of the adapter, or None.
    """

    sampler: Sampler
    adapter: Any


class _Exit(NamedTuple):
    """The static part: the target, the adapter's model or None, E, and tokens of a chain."""

    target: Model
    adapter: Model | None
    layers: int
    length: int


def early_exit(
    target: LM,
    layers: int,
    length: int,
    sampler: Sampler | None = None,
    adapter: Adapter | None = None,
) -> Drafter:
    """Returns the drafter of chains drawn from the target's first layers.

    Kangaroo ends a chain early if the draft is unsure. Here all chains of a batch have one length:
    one row that ends early saves the batch no pass.

    Args:
      target: the model that will verify.
      layers: E, how many of its layers draft.
      length: tokens of a chain.
      sampler: applied to the draft's logits; by default their softmax. Use the target's, with
        scalar settings; a repetition penalty is ignored.
      adapter: see `adapter.model` and `adapter.init`; none by default.

    Raises:
      ValueError: `layers` or `length` is out of range; a setting of `sampler` is not a scalar.
    """
    model = target.model
    if not 1 <= layers < model.n_layers:
        raise ValueError(
            f'early_exit: {layers} layers; expected at least 1, and fewer than the target has: '
            f'{model.n_layers}'
        )
    if length < 1:
        raise ValueError(f'early_exit: chains of {length} tokens; expected at least 1')
    if any(jnp.ndim(setting) for setting in jax.tree.leaves(sampler)):
        raise ValueError('early_exit: sampler settings must be scalars, the same for all rows')
    own, weights = adapter or (None, None)
    static = _Exit(model, own, layers, length)
    sampler = dataclasses.replace(sampler or Sampler(), repetition_penalty=None)
    method = Method(
        init=functools.partial(_init, static),
        propose=functools.partial(_propose, static),
        update=functools.partial(_update, static),
        trees=WithoutReplacement,
        nodes=length + 1,
        depth=length,
        branching=1,
        shared_layers=layers,
        ask=NOTHING if own is None else Ask((layers - 1,)),
    )
    # Drafting T nodes costs T passes of E layers, and saves the target's pass one of them.
    provenance = Provenance(target, calls=length, size=_size(model, layers, weights))
    return Drafter(method, Weights(sampler, weights), provenance)


def _init(static: _Exit, weights: Weights, prompt: Prompt, **extra: Any) -> Memory | None:
    """Returns the adapter's memory of all but each prompt's last token."""
    if static.adapter is None:
        return None
    x_BLD = prompt.seen.layers[static.layers - 1]
    read = Nodes(None, _positions(prompt.token_BL), x_BTD=x_BLD)
    kept_B, key_B = prompt.text.length_B - 1, prompt.text.key_B
    return static.adapter.start(weights.adapter, read, kept_B, prompt.rows, key_B).memory


def _propose(
    static: _Exit, weights: Weights, own: Memory | None, context: Context, **extra: Any
) -> Proposal:
    """Drafts a chain; every node, including the last, writes its rows into both memories."""
    text = context.text
    root_B = text.length_B - 1

    def draft(carry, depth):
        token_B, memory, own = carry
        x_BD, h_BD, memory, own = _node(
            static, weights, context.params, token_B, root_B + depth, memory, own
        )
        logprob_BV = _log_probs(static, weights.sampler, context.params, memory, h_BD)
        key_B = sample.at_position(text.key_B, root_B, DRAFTS, depth)
        noise_BV = sample.gumbel(key_B, logprob_BV.shape[1:], logprob_BV.dtype)
        next_B = jnp.argmax(logprob_BV + noise_BV, axis=-1).astype(jnp.int32)
        return (next_B, memory, own), (token_B, x_BD, logprob_BV)

    start = (tree_lib.at(text.token_BS, root_B), context.memory, own)
    (last_B, memory, own), (token_TB, x_TBD, logprob_TBV) = jax.lax.scan(
        draft, start, jnp.arange(static.length)
    )
    # the last node drafts nothing, but the layers above and the adapter need its rows
    end_B = root_B + static.length
    x_BD, _, memory, own = _node(static, weights, context.params, last_B, end_B, memory, own)
    x_BTD = jnp.concatenate([x_TBD, x_BD[None]]).swapaxes(0, 1)
    token_BT = jnp.concatenate([token_TB, last_B[None]]).T
    logprob_BTV = jnp.pad(logprob_TBV.swapaxes(0, 1), ((0, 0), (0, 1), (0, 0)))  # unused at leaves
    return Proposal(_chain(token_BT, logprob_BTV), own, PartialPass(x_BTD, memory))


def _update(
    static: _Exit, weights: Weights, own: Memory | None, outcome: Outcome, **extra: Any
) -> Memory | None:
    """Keeps the adapter's nodes of the accepted chain."""
    return static.adapter and static.adapter.keep(own, None, outcome.count_B)


def _node(
    static: _Exit, weights: Weights, params: Any, token_B: jax.Array, position_B: jax.Array,
    memory: Memory, own: Memory | None,
) -> tuple[jax.Array, jax.Array, Memory, Memory | None]:  # fmt: skip
    """Runs one node; returns the stream after E layers, the hidden state, and both memories."""
    nodes = Nodes(token_B[:, None], position_B[:, None])
    memory, seen = static.target.step(params, memory, nodes, layers=range(static.layers))
    x_BTD, h_BTD = seen.x_BTD, seen.h_BTD
    assert x_BTD is not None, 'a model with layers returns its residual stream'
    if static.adapter is not None:
        nodes = nodes._replace(x_BTD=x_BTD)
        own, seen = static.adapter.step(weights.adapter, own, nodes)
        h_BTD = seen.h_BTD
    return x_BTD[:, 0], h_BTD[:, 0], memory, own


def _log_probs(
    static: _Exit, sampler: Sampler, params: Any, memory: Memory, h_BD: jax.Array
) -> jax.Array:
    """Returns the draft's log-probabilities `[B, V]`."""
    logits = scores.of_head(static.target.head(params, memory, h_BD[:, None]))
    distribution = logits.distribution(sampler, None)
    assert isinstance(distribution, scores.Probabilities), 'an early exit needs dense logits'
    return distribution.logprob_BTV[:, 0]


def _chain(token_BT: jax.Array, logprob_BTV: jax.Array) -> WithoutReplacement:
    nodes_BT = _positions(token_BT)
    return WithoutReplacement(token_BT, nodes_BT - 1, nodes_BT, nodes_BT >= 0, logprob_BTV)


def _positions(token_BL: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(token_BL.shape[1], dtype=jnp.int32), token_BL.shape)


def _size(model: Model, layers: int, adapter: Any) -> int:
    """Returns the parameters that one draft call reads: E layers, the adapter, the head."""
    own = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    return layers * model.layer_size + model.head_size + own
