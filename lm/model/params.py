"""One table of parameter leaves, from which everything about parameters derives.

`leaves(config)` names each leaf, its shape, its logical axes and its initial scale. Initial
values, abstract shapes, shardings, counts and FLOPs all read that one table, so that a new leaf
is declared once.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm.devices import mesh as mesh_lib
from lm.model import induction
from lm.model.config import Config

Params = dict[str, Any]


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
      shape: its shape.
      axes: a logical axis per dimension; `lm.devices.mesh.RULES` maps them to mesh axes.
      scale: standard deviation of a normal initial value, or
      constant: the initial value itself, where `scale` is None.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scale: float | None
    constant: float = 0.0


def leaves(config: Config) -> dict[str, Any]:
    """Returns the nested dict of `Leaf`s of a model; layer leaves are stacked over N."""
    v, d, n, f = config.vocab_size, config.d_model, config.n_layers, config.d_ff
    h, k, c = config.n_heads, config.n_kv_heads, config.head_dim
    one = 0.0 if config.unit_offset else 1.0
    deep = (2 * n) ** -0.5  # keeps the residual stream's variance near 1 at any depth

    def layer(shape, axes, scale, constant=0.0):
        return Leaf((n, *shape), ('layers', *axes), scale, constant)

    def norm(size, axis):
        return layer((size,), (axis,), None, one)

    layers = {
        'attention_norm_ND': norm(d, 'norm'),
        'wq_NDHC': layer((d, h, c), ('embed', 'heads', 'head'), d**-0.5),
        'wk_NDKC': layer((d, k, c), ('embed', 'kv_heads', 'head'), d**-0.5),
        'wv_NDKC': layer((d, k, c), ('embed', 'kv_heads', 'head'), d**-0.5),
        'wo_NHCD': layer((h, c, d), ('heads', 'head', 'embed'), deep * (h * c) ** -0.5),
        'mlp_norm_ND': norm(d, 'norm'),
        'w_gate_NDF': layer((d, f), ('embed', 'ff'), d**-0.5),
        'w_up_NDF': layer((d, f), ('embed', 'ff'), d**-0.5),
        'w_down_NFD': layer((f, d), ('ff', 'embed'), deep * f**-0.5),
    }
    if config.qkv_bias:
        # a part of q . k that depends on the distance alone; from zeros it would grow slowly, and
        # where symbols are drawn (`lexinvariant`) nothing else can attend to a place
        layers['bq_NHC'] = layer((h, c), ('heads', 'head'), 1.0)
        layers['bk_NKC'] = layer((k, c), ('kv_heads', 'head'), 1.0)
        layers['bv_NKC'] = layer((k, c), ('kv_heads', 'head'), None)
    if config.qk_norm:
        layers['q_norm_NC'] = norm(c, 'head')
        layers['k_norm_NC'] = norm(c, 'head')
    if config.post_norm:
        layers['post_attention_norm_ND'] = norm(d, 'norm')
        layers['post_mlp_norm_ND'] = norm(d, 'norm')
    table = Leaf((v, d), ('vocab', 'embed'), d**-0.5)
    body = {'layers': layers, 'final_norm_D': Leaf((d,), ('norm',), None, one)}
    tables = {'input_VD': table} if config.tied else {'input_VD': table, 'output_VD': table}
    if config.lexinvariant is not None and not config.lexinvariant.partial:
        tables = {}  # drawn, not learned: no leaf has a V axis
    return {'body': body, 'tables': tables}


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def init(config: Config, key: jax.Array) -> Params:
    """Returns a model's initial parameters."""
    params = initial(leaves(config), config.param_dtype, key)
    if config.induction_init:
        params['body']['layers'] = induction.begin(params['body']['layers'], config)
    return params


def initial(tree: dict[str, Any], dtype: str, key: jax.Array) -> Params:
    """Returns initial values of a dict of `Leaf`s; each depends on the key and its name alone."""

    def make(path, leaf: Leaf):
        if leaf.scale is None:
            return jnp.full(leaf.shape, leaf.constant, dtype)
        # fold_in by name: adding a leaf elsewhere leaves this one's values alone
        name_hash = sum(ord(x) * 31**i for i, x in enumerate(jax.tree_util.keystr(path))) % 2**31
        noise = jax.random.normal(jax.random.fold_in(key, name_hash), leaf.shape, jnp.float32)
        return (noise * leaf.scale).astype(dtype)

    return jax.tree_util.tree_map_with_path(make, tree, is_leaf=_is_leaf)


def abstract(config: Config, mesh: Mesh | None = None) -> Params:
    """Returns the parameters' shapes and dtypes, with shardings where a mesh is given."""
    dtype = jnp.dtype(config.param_dtype)

    def make(leaf: Leaf):
        sharding = mesh and mesh_lib.sharding(mesh, leaf.axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree.map(make, leaves(config), is_leaf=_is_leaf)


def shardings(config: Config, mesh: Mesh) -> Params:
    """Returns the `NamedSharding` of each of a model's leaves on `mesh`."""
    return placed(leaves(config), mesh)


def decoding_shardings(config: Config, mesh: Mesh) -> Params:
    """Returns the same for decoding, where no leaf is divided over the rows' axis.

    A pass over few tokens is shorter than gathering the weights for it would be.
    """
    kept = {axis for axis, names in mesh_lib.RULES.items() if 'data' not in names}

    def place(leaf: Leaf) -> NamedSharding:
        axes = [axis if axis in kept else None for axis in leaf.axes]
        return mesh_lib.sharding(mesh, axes, leaf.shape)

    return jax.tree.map(place, leaves(config), is_leaf=_is_leaf)


def placed(tree: dict[str, Any], mesh: Mesh) -> Params:
    """Returns the `NamedSharding` of each of a dict of `Leaf`s on `mesh`."""
    return jax.tree.map(
        lambda leaf: mesh_lib.sharding(mesh, leaf.axes, leaf.shape), tree, is_leaf=_is_leaf
    )


def count(config: Config) -> int:
    """Returns the number of parameters, token tables included."""
    return _size(leaves(config))


def count_body(config: Config) -> int:
    """Returns the number of parameters without the token tables."""
    return _size(leaves(config)['body'])


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=_is_leaf))


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
    return float(2 * count_body(config) + attention + 2 * config.d_model * config.vocab_size)
