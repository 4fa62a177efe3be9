"""The contract of a model that can be stepped: all that decoding, coding and losses rely on.

    memory, seen = model.start(params, prompt, kept_B, rows, key_B)   reads prompts, once
    memory, seen = model.step(params, memory, nodes)                  runs T new nodes
    logits_BTV   = model.head(params, memory, seen.h_BTD)             the logits of the next id
    memory       = model.keep(memory, path_BP, count_B)               accepted nodes are kept

`memory` is opaque: a key/value cache, a cache with a policy, the caches of a hierarchy, the
memories of two models side by side, or `()` for a model without state. Only `memory` knows how many
rows it holds; positions in the text do not tell. A model is a named tuple of pure functions. A
wrapper takes a `Model` and returns another: a cache policy, a byte view, an ensemble.

Create a `Model` once and reuse it: it is a static argument, and a new one recompiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Params = Any
Memory = Any


class Nodes(NamedTuple):
    """New nodes of B texts, as tokens or as vectors.

    Attributes:
      token_BT: int32 ids `[B, T]`; None if `x_BTD` is given.
      position_BT: int32, position of each node in its text; negative for a node that no other may
        see.
      ancestors_BTW: packed bits (`lm.kernels.mask.pack_bits`): the nodes among the last `span` that
        each node sees, itself included. By default a node sees every node that is not at a later
        position.
      span: number of nodes that the bits cover, the new ones included; T by default.
      x_BTD: vectors instead of tokens: rows of another table, or the residual stream at
        `start_layer`.
      start_layer: first layer still to run. `x_BTD` is the residual stream before it, and the
        memory holds the nodes' rows of the layers below.
    """

    token_BT: jax.Array | None
    position_BT: jax.Array
    ancestors_BTW: jax.Array | None = None
    span: int | None = None
    x_BTD: jax.Array | None = None
    start_layer: int = 0


def chain(token_BT: jax.Array, start_B: jax.Array | int = 0) -> Nodes:
    """Returns tokens that follow one another, the first at position `start_B`."""
    position_T = jnp.arange(token_BT.shape[1])
    start_B1 = jnp.broadcast_to(jnp.asarray(start_B), token_BT.shape[:1])[:, None]
    return Nodes(token_BT, start_B1 + position_T)


class Ask(NamedTuple):
    """Extra results of a pass besides the last hidden states; static.

    Attributes:
      layers: ascending; the residual stream after each of these layers is returned.
      mass: whether to return the attention that each key received.
    """

    layers: tuple[int, ...] = ()
    mass: bool = False


NOTHING = Ask()


class Seen(NamedTuple):
    """The results of a pass over nodes.

    Attributes:
      h_BTD: hidden states, ready for `head`.
      x_BTD: the residual stream after the last layer that ran; None for a model without one.
      layers: the residual stream `[B, T, D]` after each requested layer that the pass ran, by the
        layer's number.
      mass_NBKS: f32, attention that each row of the memory received, summed over the query heads of
        a KV head and over the new nodes: in `start` over those that are kept, in `step` over all,
        since which will be kept is not known yet. None if not requested.
    """

    h_BTD: jax.Array
    x_BTD: jax.Array | None = None
    layers: dict[int, jax.Array] = {}  # noqa: RUF012
    mass_NBKS: jax.Array | None = None


class Stepped(NamedTuple):
    """The result of `start` and of `step`."""

    memory: Memory
    seen: Seen


class Start(Protocol):
    """Reads prompts into a new memory.

    Args:
      params: of the model.
      prompt: L nodes per text, a chain from position 0, padded on the right.
      kept_B: int32: the memory holds each text's first `kept_B` nodes; `Seen` covers all L.
      rows: capacity for the longest text plus the largest draft tree; a policy may allocate less.
      key_B: each text's own key, for tables drawn per text.
      ask: see `Ask`.
    """

    def __call__(
        self, params: Params, prompt: Nodes, kept_B: jax.Array, rows: int, key_B: jax.Array, *,
        ask: Ask = NOTHING, **extra: Any,
    ) -> Stepped: ...  # fmt: skip


class Step(Protocol):
    """Runs T new nodes below those in the memory, and adds them to it.

    Args:
      params: of the model.
      memory: from `start`, `step` or `keep`.
      nodes: see `Nodes`.
      layers: layers to run, ascending; by default all from the nodes' `start_layer` on.
      ask: see `Ask`.
    """

    def __call__(
        self, params: Params, memory: Memory, nodes: Nodes, *, layers: Sequence[int] | None = None,
        ask: Ask = NOTHING, **extra: Any,
    ) -> Stepped: ...  # fmt: skip


class Keep(Protocol):
    """Keeps the accepted ones of the nodes stepped since the last `keep`, and drops the others.

    Args:
      memory: after one or more `step`s since nodes were last kept.
      path_BP: int32, indices of the kept nodes in text order, counted from the first node since;
        None for the first `count_B` nodes.
      count_B: int32, number of kept nodes.
      since_B: int32, node to count from instead; `since_B = 0` counts all nodes read so far. A
        model that evicts rows need not support it.
    """

    def __call__(
        self, memory: Memory, path_BP: jax.Array | None, count_B: jax.Array, *,
        since_B: jax.Array | int | None = None, **extra: Any,
    ) -> Memory: ...  # fmt: skip


class Head(Protocol):
    """Returns logits of the next id after each node: f32 `[B, T, V]`, -inf for ids never drawn.

    For a vocabulary too large for dense logits it returns an object to be searched
    (`decoding.scores.Scores`).

    Args:
      params: of the model.
      memory: of the texts; None if nothing is kept per text.
      h_BTD: hidden states as `Seen.h_BTD`.
    """

    def __call__(self, params: Params, memory: Memory, h_BTD: jax.Array, **extra: Any) -> Any: ...


class Layout(Protocol):
    """Returns parameters in the platform's fastest layout for decoding."""

    def __call__(self, params: Params, **extra: Any) -> Params: ...


def as_given(params: Params, **extra: Any) -> Params:
    """Returns the parameters unchanged: the default layout."""
    return params


class Model(NamedTuple):
    """A model that can be stepped: pure functions, and sizes that are static.

    Attributes:
      start, step, keep, head: see the protocols of these names.
      vocab_size: ids, input-only ones included.
      max_length: maximum number of positions.
      size: parameters that one pass over a node reads; at least 1.
      layout: see `Layout`.
      n_layers: layers that `Step` can run by number and `Ask` can name; 0 if there are none.
      layer_size, head_size: parameters of one layer, and of the head, out of `size`.
      dense: whether the head returns the logits of every id.
    """

    start: Start
    step: Step
    keep: Keep
    head: Head
    vocab_size: int
    max_length: int
    size: int
    layout: Layout = as_given
    n_layers: int = 0
    layer_size: int = 0
    head_size: int = 0
    dense: bool = True
