"""Attention for every path of a model: picks the kernel, and runs it on each device's shard.

On CPU everything is plain XLA. TPU and GPU run the kernels of `lm.kernels`: `flash` for training
and prefill, `decode` for one new node against a cache, `tree` for several. On another platform than
its own, a requested kernel is interpreted: slow, for tests.

Only queries, keys and values get gradients; those of bias, noise and temperature are zero.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax

from lm.attention import flash
from lm.attention import ring as ring_lib
from lm.attention.per_device import Axes, per_device
from lm.attention.ring import Ring
from lm.attention.ring_blocks import Settings
from lm.kernels import mosaic, triton, xla
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.kernels.sparse import SparseIndex

Implementation = Literal['xla', 'mosaic', 'triton']
OF_PLATFORM: dict[str, Implementation] = {'tpu': 'mosaic', 'gpu': 'triton', 'cuda': 'triton'}
AMPERE = 8  # compute capability: the first NVIDIA GPUs with matrix units for bf16
KERNELS = {'mosaic': mosaic, 'triton': triton}
# Up to this many queries per KV head are one block; beyond that, flash splits them.
TREE_ROWS = 1024

QUERIES = Axes('batch', None, 'heads', None)
LSE = Axes('batch', None, 'heads')


def platform() -> str:
    """Returns the platform of the mesh in use (`jax.set_mesh`), or of the default device.

    This includes a mesh of devices that this host does not have: programs compiled ahead of time
    for it get its kernels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    return jax.default_backend()


def best() -> Implementation:
    """Returns the implementation for the platform in use: its kernels, or 'xla'.

    The GPU kernels need NVIDIA's Ampere or later, assumed of GPUs that this host does not have.
    """
    name = OF_PLATFORM.get(platform(), 'xla')
    if name != 'triton' or jax.default_backend() != 'gpu':
        return name
    major = jax.local_devices()[0].compute_capability.partition('.')[0]
    return name if major.isdecimal() and int(major) >= AMPERE else 'xla'


def attention(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scoring: Scoring,
    implementation: Implementation | None = None,
    *,
    layer: jax.Array | int | None = None,
    ring: Ring = 'keys',
) -> jax.Array:
    """Returns softmax(logits) v over the keys that each query sees, in the dtype of `q`.

    Query head h reads key/value head `h // (H / K)`. Softmax in f32. The result is zero for a query
    that sees no key.

    Args:
      q_BLHC: queries.
      k, v: `[B, K, S, C]`; with `layer`, the stacked caches `[N, B, K, S, C]`, of which one layer
        is read in place.
      mask: see `Mask`; with `length`, `k` and `v` are a cache.
      scoring: from q . k to the logits, see `Scoring`.
      implementation: `None` for `best()`.
      layer: index into the stack.
      ring: whether keys or queries are passed around the mesh's `sequence` axis
        (`lm.attention.ring`).

    Raises:
      ValueError: `implementation` or `ring` is unknown, or the arrays differ in dtype; or there is
        a cache or a draft tree, and the mesh in use shards sequences.
    """
    return attention_and_lse(q_BLHC, k, v, mask, scoring, implementation, layer=layer, ring=ring)[0]


def attention_and_lse(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scoring: Scoring,
    implementation: Implementation | None = None,
    *,
    layer: jax.Array | int | None = None,
    ring: Ring = 'keys',
) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `attention`, and the LSE of each query's logits, f32 `[B, L, H]`.

    The LSE (log-sum-exp) allows merging results over disjoint keys (`lm.kernels.merge`). It is -inf
    for a query that sees no key.
    """
    name = _checked(q_BLHC, k, v, layer, implementation)
    chex.assert_shape(mask.query_position, q_BLHC.shape[:2])
    _check_terms(k, mask, scoring)
    if mask.length is not None or mask.ancestors is not None or layer is not None:
        ring_lib.refuse('attention over a cache or a draft tree')
    elif ring_lib.is_cut(q_BLHC, k):
        settings = Settings(name, name != 'xla' and interpreted(name), scoring.static, mask.causal)
        return ring_lib.attention(q_BLHC, k, v, mask, scoring, settings, ring)
    if name == 'xla':
        return xla.attention(q_BLHC, k, v, mask, scoring, layer=layer)
    interpret = interpreted(name)
    queries = q_BLHC.shape[1] * q_BLHC.shape[2] // k.shape[-3]
    if mask.ancestors is None and (mask.length is None or queries > TREE_ROWS):
        if layer is not None:  # many queries read each key: the copy is cheap by comparison
            k, v, layer = k[layer], v[layer], None
        call: Callable[..., Any] = functools.partial(flash.flash, backend=name, interpret=interpret)
    else:
        one = q_BLHC.shape[1] == 1 and mask.ancestors is None
        kernel = KERNELS[name].decode.decode if one else KERNELS[name].tree.tree
        call = _with_gradients(functools.partial(kernel, interpret=interpret), xla.attention)
    axes = (QUERIES, _keys(layer), _keys(layer), _mask_axes(mask), _scoring_axes(scoring))
    return per_device(call, (q_BLHC, k, v, mask, scoring), layer, axes, (QUERIES, LSE))


def column_sums(
    q_BLHC: jax.Array,
    k: jax.Array,
    lse_BLH: jax.Array,
    mask: Mask,
    row_mask_BL: jax.Array,
    scoring: Scoring,
    implementation: Implementation | None = None,
    *,
    layer: jax.Array | int | None = None,
) -> jax.Array:
    """Returns the attention that each key received, f32 `[B, K, S]`; it has no gradients.

    Summed over the query heads of a KV head, and over the queries in `row_mask_BL`, which should
    exclude rejected nodes of a draft tree.

    Args:
      q_BLHC, k, mask, scoring, implementation, layer: as for `attention`.
      lse_BLH: the LSE that `attention_and_lse` returned for the same queries and keys.
      row_mask_BL: bool.
    """
    ring_lib.refuse('column_sums')
    name = _checked(q_BLHC, k, k, layer, implementation)
    chex.assert_shape([lse_BLH, row_mask_BL], [q_BLHC.shape[:3], q_BLHC.shape[:2]])
    _check_terms(k, mask, scoring)
    operands = (q_BLHC, k, lse_BLH, mask, row_mask_BL, scoring)
    if name == 'xla':
        return xla.column_sums(*operands, layer=layer)
    kernel = functools.partial(KERNELS[name].column_sums.column_sums, interpret=interpreted(name))
    axes = (QUERIES, _keys(layer), LSE, _mask_axes(mask), Axes('batch'), _scoring_axes(scoring))
    return per_device(kernel, operands, layer, axes, Axes('batch', 'kv_heads'))


def sparse_decode(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: SparseIndex,
    scoring: Scoring,
    mask: Mask | None = None,
    implementation: Implementation | None = None,
    *,
    layer: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention over the kept rows of each KV head and the nodes of a tree, and its LSE.

    Without a mask there is one query per batch row, which sees every kept row, whatever its
    position. With a mask, the last `mask.nodes` rows in use hold the nodes of a draft tree, the new
    ones included: each query sees the nodes that the mask allows, and every kept one of the
    committed rows before them. `lm.kernels.reference.sparse_decode` has the formula; see
    `attention_and_lse` for arguments and results.
    """
    ring_lib.refuse('sparse_decode')
    name = _checked(q_BLHC, k, v, layer, implementation)
    if mask is None:
        chex.assert_axis_dimension(q_BLHC, 1, 1)
    else:
        chex.assert_shape(mask.query_position, q_BLHC.shape[:2])
    _check_terms(k, mask, scoring)
    operands = (q_BLHC, k, v, index, scoring, mask)
    if name == 'xla':
        return xla.sparse_decode(*operands, layer=layer)
    kernel = functools.partial(
        KERNELS[name].sparse_decode.sparse_decode, interpret=interpreted(name)
    )
    per_head = jax.tree.map(lambda _: Axes('batch', 'kv_heads'), index)
    seen = None if mask is None else _mask_axes(mask)
    axes = (QUERIES, _keys(layer), _keys(layer), per_head, _scoring_axes(scoring), seen)
    call = _with_gradients(kernel, xla.sparse_decode)
    return per_device(call, operands, layer, axes, (QUERIES, LSE))


def interpreted(implementation: str) -> bool:
    """Returns whether kernels of this kind must be interpreted on the platform in use."""
    return OF_PLATFORM.get(platform()) != implementation


def _checked(
    q_BLHC: jax.Array, k: jax.Array, v: jax.Array, layer: Any, implementation: str | None
) -> Any:
    """Checks the shapes and returns the implementation to use."""
    b, _, h, c = q_BLHC.shape
    stack = () if layer is None else (None,)
    n_kv, s = k.shape[-3:-1]
    chex.assert_shape([k, v], (*stack, b, n_kv, s, c))
    chex.assert_is_divisible(h, n_kv)
    if len({q_BLHC.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(f'attention: q, k, v are {q_BLHC.dtype}, {k.dtype}, {v.dtype}; one dtype')
    name = implementation or best()
    known = typing.get_args(Implementation)
    if name not in known:
        raise ValueError(f'attention: no implementation {name!r}; there are: {", ".join(known)}')
    return name


def _check_terms(k: jax.Array, mask: Mask | None, scoring: Scoring) -> None:
    """Asserts that bias and noise have one value per key, and a row per KV head or one."""
    *_, b, n_kv, s, _ = k.shape
    for x in (None if mask is None else mask.key_bias, scoring.noise):
        if x is not None:
            chex.assert_shape(x, (b, {1, n_kv}, s))


def _keys(layer: Any) -> Axes:
    axes = ('batch', 'kv_heads', None, None)
    return Axes(*axes) if layer is None else Axes('layers', *axes)


def _mask_axes(mask: Mask) -> Mask:
    """Returns the logical axes of the fields of a mask."""
    known = dataclasses.replace(
        jax.tree.map(lambda _: Axes('batch'), mask), key_position=Axes('batch', 'kv_heads')
    )
    if mask.key_bias is not None:
        known = dataclasses.replace(known, key_bias=Axes('batch', 'kv_heads'))
    return known if mask.window is None else dataclasses.replace(known, window=Axes())


def _scoring_axes(scoring: Scoring) -> Scoring:
    """Returns the logical axes of the arrays that a scoring has."""
    axes = jax.tree.map(lambda _: Axes(), scoring)
    if scoring.noise is not None:
        axes = dataclasses.replace(axes, noise=Axes('batch', 'kv_heads'))
    return axes


def _with_gradients(kernel: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an inference kernel with the gradients of its formula."""

    @jax.custom_vjp
    def call(q, k, v, others, layer):
        return kernel(q, k, v, *others, layer=layer)

    def forward(*operands):
        return call(*operands), operands

    def backward(operands, cotangents):
        q, k, v, others, layer = operands
        _, vjp = jax.vjp(lambda q, k, v: formula(q, k, v, *others, layer=layer), q, k, v)
        return *vjp(cotangents), None, None

    call.defvjp(forward, backward)
    return lambda q, k, v, *others, layer=None: call(q, k, v, others, layer)
