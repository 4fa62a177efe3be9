"""The decoder transformer as pure functions of whole texts, and its blocks.

    tokens_BL -- embed --> x_BLD -- blocks, final norm --> h_BLD -- head --> logits_BLV

The body does not know tokens: its input may be any vectors, and its output may go to other tables.
`lm.model.stepped` wraps it for decoding.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lm.devices import mesh
from lm.kernels.mask import Mask
from lm.model import attend as attend_lib
from lm.model import layers as layers_lib
from lm.model import rope, tables
from lm.model.attend import Attend, Attended, Layer
from lm.model.config import Config
from lm.model.contract import NOTHING, Ask, Nodes, Seen, chain
from lm.model.leaves import Params

ACTIVATIONS = ('batch', 'length', 'embed')


def forward(
    params: Params,
    config: Config,
    tokens_BL: jax.Array,
    positions_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """Returns logits f32 `[B, L, V]` of whole texts; positions start at 0 by default."""
    nodes = chain(tokens_BL) if positions_BL is None else Nodes(tokens_BL, positions_BL)
    return head(params, config, read(params, config, nodes, segments_BL).h_BTD)


class MLP(Protocol):
    """Returns a block's update of the residual stream after attention, from the normed stream."""

    def __call__(
        self, p: Params, config: Config, y_BLD: jax.Array, layer: Layer, **extra: Any
    ) -> jax.Array: ...


def gated_mlp(p: Params, config: Config, y_BLD: jax.Array, layer: Layer, **extra: Any) -> jax.Array:
    """The gated MLP that `params.leaves` describes (`layers.gated_mlp`)."""
    return layers_lib.gated_mlp(y_BLD, p, config.activation)


def read(
    params: Params,
    config: Config,
    nodes: Nodes,
    segments_BL: jax.Array | None = None,
    *,
    ask: Ask = NOTHING,
    mlp: MLP | None = gated_mlp,
    causal: bool = True,
) -> Seen:
    """Reads whole texts, without a memory.

    Args:
      params: of the model; its tables are read for tokens, not for vectors.
      config: of the model.
      nodes: the texts, as tokens or as vectors.
      segments_BL: int32; nodes of different segments do not see each other.
      ask: see `Ask`; `mass` needs a memory.
      mlp: see `blocks`.
      causal: whether nodes see only earlier positions.
    """
    positions_BL = nodes.position_BT
    mask = Mask(positions_BL, positions_BL[:, None], segments_BL, segments_BL, causal=causal)
    return run(params, config, nodes, attend_lib.among(config, mask), ask=ask, mlp=mlp).seen


def head(params: Params, config: Config, h_BLD: jax.Array) -> jax.Array:
    """Returns logits f32 `[B, ..., V]` of hidden states `[B, ..., D]`."""
    return tables.unembed(params['tables'], config, h_BLD)


class Ran(NamedTuple):
    """The results of a pass, and the carry of its attention."""

    seen: Seen
    carry: Any


def run(
    params: Params,
    config: Config,
    nodes: Nodes,
    attend: Attend,
    carry: Any = None,
    *,
    layers: Sequence[int] | None = None,
    ask: Ask = NOTHING,
    mlp: MLP | None = gated_mlp,
) -> Ran:
    """Runs nodes through the input table, the blocks and the final norm.

    Args:
      params, config: of the model.
      nodes: see `Nodes`; vectors skip the table.
      attend, carry, layers, mlp: see `blocks`.
      ask: see `Ask`.
    """
    x_BTD, body = nodes.x_BTD, params['body']
    if x_BTD is None:
        assert nodes.token_BT is not None, 'nodes have neither tokens nor vectors'
        x_BTD = tables.embed(params['tables'], config, nodes.token_BT)
    layers = range(config.n_layers) if layers is None else layers
    asked = {i + 1: layer for i, layer in enumerate(layers) if layer in ask.layers}
    streams: dict[int, jax.Array] = {}
    begin = 0
    for end in dict.fromkeys([*asked, len(layers)]):
        x_BTD, carry = blocks(body, config, x_BTD, attend, carry, mlp=mlp, layers=layers[begin:end])
        if end in asked:
            streams[asked[end]] = x_BTD
        begin = end
    h_BTD = layers_lib.rms_norm(
        x_BTD, body['final_norm_D'], config.norm_epsilon, config.unit_offset
    )
    return Ran(Seen(h_BTD, x_BTD, streams), carry)


class Blocks(NamedTuple):
    """The residual stream after the blocks, and the carry of their attention."""

    x_BLD: jax.Array
    carry: Any


def blocks(
    body: Params,
    config: Config,
    x_BLD: jax.Array,
    attend: Attend,
    carry: Any = None,
    *,
    mlp: MLP | None = gated_mlp,
    layers: Sequence[int] | None = None,
) -> Blocks:
    """Runs all blocks, or some, without the final norm.

    Args:
      body: the `body` of the parameters.
      config: of the model.
      x_BLD: the stream before them.
      attend: see `Attend`.
      carry: input of the first block's attention.
      mlp: see `MLP`; None leaves it out.
      layers: blocks to run, in this order; all by default.
    """
    layers = range(config.n_layers) if layers is None else layers
    if not layers:
        return Blocks(x_BLD, carry)

    def run_block(state, inputs):
        (x_BLD, carry), (layer, block_params) = state, inputs
        x_BLD = mesh.constrain(x_BLD, ACTIVATIONS)
        look = functools.partial(attend, layer, carry=carry)
        add = None
        if mlp is not None:
            add = functools.partial(mlp, block_params, config, layer=layer)
        x_BLD, carry = block(block_params, config, x_BLD, look, add)
        return (x_BLD, carry), None

    if config.remat:
        run_block = jax.checkpoint(run_block)
    state = x_BLD, carry
    stacks: Any = np.arange(config.n_layers), rope.frequencies(config), _windows(config)
    each = Layer(*stacks)
    stacked = body['layers']
    if isinstance(stacked, tuple):  # `cpu_layout.prepare`
        for i in layers:
            state, _ = run_block(state, (jax.tree.map(operator.itemgetter(i), each), stacked[i]))
    else:
        inputs = jax.tree.map(lambda x: _of_layers(x, layers), (each, stacked))
        state, _ = jax.lax.scan(run_block, state, inputs, unroll=config.unroll)
    return Blocks(*state)


def block(
    p: Params, config: Config, x_BLD: jax.Array, attend: Callable[..., Attended],
    mlp: Callable[[jax.Array], jax.Array] | None,
) -> Blocks:  # fmt: skip
    """One block: attention and MLP, each after a norm, added to the residual stream.

    Args:
      p: parameters of the block.
      config: of the model.
      x_BLD: the stream.
      attend: `(q_BLHC, k_BLKC, v_BLKC) -> Attended`.
      mlp: of the normed stream; None leaves it out.
    """

    def norm(x, name):
        return layers_lib.rms_norm(x, p[name], config.norm_epsilon, config.unit_offset)

    y_BLD = norm(x_BLD, 'attention_norm_ND')
    q_BLHC, k_BLKC, v_BLKC = layers_lib.project(y_BLD, p, 'wq_NDHC', 'wk_NDKC', 'wv_NDKC')
    if config.qkv_bias:
        q_BLHC += p['bq_NHC'].astype(q_BLHC.dtype)
        k_BLKC += p['bk_NKC'].astype(k_BLKC.dtype)
        v_BLKC += p['bv_NKC'].astype(v_BLKC.dtype)
    if config.qk_norm:
        q_BLHC, k_BLKC = norm(q_BLHC, 'q_norm_NC'), norm(k_BLKC, 'k_norm_NC')
    out_BLHC, carry = attend(q_BLHC, k_BLKC, v_BLKC)
    y_BLD = layers_lib.einsum('blhc,hcd->bld', out_BLHC, p['wo_NHCD'])
    x_BLD += norm(y_BLD, 'post_attention_norm_ND') if config.post_norm else y_BLD
    if mlp is not None:
        y_BLD = mlp(norm(x_BLD, 'mlp_norm_ND'))
        x_BLD += norm(y_BLD, 'post_mlp_norm_ND') if config.post_norm else y_BLD
    return Blocks(x_BLD, carry)


def _of_layers(x_N: Any, layers: Sequence[int]) -> Any:
    """Returns the entries of some layers, by a slice without a copy if possible."""
    whole = slice(layers[0], layers[-1] + 1)
    if list(layers) == list(range(whole.start, whole.stop)):
        return x_N if len(layers) == len(x_N) else x_N[whole]
    return x_N[np.asarray(layers)]


def _windows(config: Config) -> np.ndarray | None:
    """Returns each layer's window, int32 `[N]`; None if no layer has one."""
    if config.window is None:
        return None
    unlimited = np.iinfo(np.int32).max
    return np.asarray([config.window if w else unlimited for w in config.windowed_layers], np.int32)
