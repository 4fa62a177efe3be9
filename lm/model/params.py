"""The parameters of a transformer: one table of leaves; everything else derives from it.

`leaves(config)` declares each leaf (`lm.model.leaves`), so a new one is declared once. The token
tables declare theirs (`lm.model.tables`).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm.devices import mesh as mesh_lib
from lm.model import induction, tables
from lm.model import leaves as leaves_lib
from lm.model.config import Config
from lm.model.leaves import Leaf, Params, matrix


def leaves(config: Config) -> dict[str, Any]:
    """Returns the nested dict of `Leaf`s of a model; layer leaves are stacked over N."""
    return {'body': body_leaves(config), 'tables': tables.leaves(config)}


def body_leaves(config: Config) -> dict[str, Any]:
    """Returns the leaves of the body alone."""
    d, f, n = config.d_model, config.d_ff, config.n_layers
    h, k, c = config.n_heads, config.n_kv_heads, config.head_dim
    deep = (2 * n) ** -0.5  # keeps the residual stream's variance near 1 at any depth

    def norm(size: int, axis: str = 'norm') -> Leaf:
        return Leaf((size,), (axis,), None, 0.0 if config.unit_offset else 1.0)

    layer = {
        'attention_norm_ND': norm(d),
        'wq_NDHC': matrix((d, h, c), ('embed', 'heads', 'head'), d**-0.5),
        'wk_NDKC': matrix((d, k, c), ('embed', 'kv_heads', 'head'), d**-0.5),
        'wv_NDKC': matrix((d, k, c), ('embed', 'kv_heads', 'head'), d**-0.5),
        'wo_NHCD': matrix((h, c, d), ('heads', 'head', 'embed'), deep * (h * c) ** -0.5, inputs=2),
        'mlp_norm_ND': norm(d),
        'w_gate_NDF': matrix((d, f), ('embed', 'ff'), d**-0.5),
        'w_up_NDF': matrix((d, f), ('embed', 'ff'), d**-0.5),
        'w_down_NFD': matrix((f, d), ('ff', 'embed'), deep * f**-0.5),
    }
    if config.qkv_bias:
        # A term of q . k that depends on the distance alone. From zeros it would grow slowly, and
        # without learned embeddings no other term can attend by position.
        layer['bq_NHC'] = Leaf((h, c), ('heads', 'head'), 1.0)
        layer['bk_NKC'] = Leaf((k, c), ('kv_heads', 'head'), 1.0)
        layer['bv_NKC'] = Leaf((k, c), ('kv_heads', 'head'), None)
    if config.qk_norm:
        layer['q_norm_NC'] = norm(c, 'head')
        layer['k_norm_NC'] = norm(c, 'head')
    if config.post_norm:
        layer['post_attention_norm_ND'] = norm(d)
        layer['post_mlp_norm_ND'] = norm(d)
    stack = {name: leaves_lib.stacked(leaf, n) for name, leaf in layer.items()}
    return {'layers': stack, 'final_norm_D': norm(d)}


def init(config: Config, key: jax.Array) -> Params:
    """Returns a model's initial parameters."""
    params = leaves_lib.initial(leaves(config), config.param_dtype, key)
    if config.induction_init:
        params['body']['layers'] = induction.begin(params['body']['layers'], config)
    return params


def abstract(config: Config, mesh: Mesh | None = None) -> Params:
    """Returns the parameters' shapes and dtypes, with shardings if a mesh is given."""
    return leaves_lib.abstract(leaves(config), config.param_dtype, mesh)


def shardings(config: Config, mesh: Mesh) -> Params:
    """Returns the `NamedSharding` of each of a model's leaves on `mesh`."""
    return leaves_lib.placed(leaves(config), mesh)


def decoding_shardings(config: Config, mesh: Mesh) -> Params:
    """Returns the same for decoding: no leaf is sharded over the batch's axis.

    Gathering the weights would take longer than a pass over few tokens.
    """
    kept = {axis for axis, names in mesh_lib.RULES.items() if 'data' not in names}

    def place(leaf: Leaf) -> NamedSharding:
        axes = [axis if axis in kept else None for axis in leaf.axes]
        return mesh_lib.sharding(mesh, axes, leaf.shape)

    return leaves_lib.map_leaves(place, leaves(config))


def count(config: Config) -> int:
    """Returns the number of parameters, token tables included."""
    return leaves_lib.size(leaves(config))


def count_body(config: Config) -> int:
    """Returns the number of parameters without the token tables."""
    return leaves_lib.size(body_leaves(config))


def flops_per_token(config: Config, length: int) -> float:
    """Returns forward FLOPs per token of a causal pass over `length` tokens.

    Two per weight of the body and of the output table, and four per channel, head and visible
    key of attention. A training step costs three times as much.
    """
    keys = [
        min(length, config.window) if windowed and config.window else length
        for windowed in config.windowed_layers
    ]
    # a query sees half of the keys on average, or its whole window once past it
    visible = np.mean([k - k * (k - 1) / (2 * length) for k in keys])
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * visible
    logits = 2 * config.d_model * config.vocab_size * config.codebooks
    return float(2 * count_body(config) + attention + logits)
