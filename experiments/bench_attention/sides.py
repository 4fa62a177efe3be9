"""Timed implementations: our kernels, a plain softmax, and public kernels, on the same inputs."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.bench_attention.config import Config
from lm.attention import attention as attention_lib
from lm.kernels import sparse, xla
from lm.kernels.mask import Mask, pack_bits, visible
from lm.kernels.scoring import Scoring

SPARSE_ROWS = 64  # rows per block of the sparse index


class Side(NamedTuple):
    """One timed function.

    Attributes:
      task: the kernel's task, a row group of the table.
      name: the implementation.
      run: jitted function of `operands`.
      operands: arrays.
    """

    task: str
    name: str
    run: Callable[..., Any]
    operands: tuple[Any, ...]


class Inputs(NamedTuple):
    """Random queries, keys and values, and the masks for training, decoding and a draft tree."""

    q_BLHC: jax.Array
    k_BKSC: jax.Array
    v_BKSC: jax.Array
    causal: Mask
    decode: Mask
    tree: Mask


def inputs(config: Config, length: int) -> Inputs:
    """Returns inputs of `length` queries and keys; the cache is full."""
    dtype = jnp.dtype(config.dtype)
    b, h, n_kv, c, t = (
        config.batch_size, config.heads, config.kv_heads, config.channels, config.nodes,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 4)
    position = jnp.broadcast_to(jnp.arange(length), (b, length))
    full = jnp.full(b, length)
    # the parent of node i is node (i - 1) / 2: a binary tree
    nodes = jnp.arange(t)
    reach = nodes[:, None] == nodes
    for node in range(1, t):
        reach = reach.at[node].set(reach[node] | reach[(node - 1) // 2])
    depth = jnp.sum(reach, axis=1) - 1
    node_position = jnp.broadcast_to(length - t + depth, (b, t))
    with_nodes = position.at[:, -t:].set(node_position)[:, None]
    return Inputs(
        jax.random.normal(keys[0], (b, length, h, c), dtype),
        jax.random.normal(keys[1], (b, n_kv, length, c), dtype),
        jax.random.normal(keys[2], (b, n_kv, length, c), dtype),
        Mask(position, position[:, None]),
        Mask(position[:, -1:], position[:, None], length=full),
        Mask(node_position, with_nodes, length=full,
             ancestors=pack_bits(jnp.broadcast_to(reach, (b, t, t)))),
    )  # fmt: skip


def by_hand(q_BLHC, k_BKSC, v_BKSC, seen):
    """Plain softmax attention; the mask `seen` broadcasts against logits `[B, K, G, L, S]`."""
    b, l, h, c = q_BLHC.shape
    n_kv = k_BKSC.shape[1]
    precision = 'highest' if q_BLHC.dtype == jnp.float32 else None
    q_BLKGC = q_BLHC.reshape(b, l, n_kv, h // n_kv, c)
    logits = jnp.einsum('blkgc,bksc->bkgls', q_BLKGC, k_BKSC, precision=precision,
                        preferred_element_type=jnp.float32) * c**-0.5  # fmt: skip
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1).astype(v_BKSC.dtype)
    return jnp.einsum('bkgls,bksc->blkgc', weights, v_BKSC, precision=precision).reshape(b, l, h, c)


def sides(config: Config, length: int) -> list[Side]:
    """Returns all implementations available on this machine, at one length."""
    x = inputs(config, length)
    scale = config.channels**-0.5
    return [
        *_training(config, x, length, scale),
        *_cached(config, x, length, scale, 'decode', x.q_BLHC[:, -1:], x.decode),
        *_cached(config, x, length, scale, 'tree', x.q_BLHC[:, -config.nodes :], x.tree),
        *_column_sums(config, x, length, scale),
        *_sparse(config, x, length, scale),
    ]


def _fits(config: Config, queries: int, length: int, copies: int) -> bool:
    logits = 4 * config.batch_size * config.heads * queries * length
    return copies * logits <= config.largest_logits


def _training(config: Config, x: Inputs, length: int, scale: float) -> list[Side]:
    operands = (x.q_BLHC, x.k_BKSC, x.v_BKSC)

    def step(attend):
        return jax.jit(jax.value_and_grad(
            lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32)), (0, 1, 2)
        ))  # fmt: skip

    def ours(q, k, v):
        return attention_lib.attention(q, k, v, x.causal, scoring=Scoring(scale))

    def hand(q, k, v):
        return by_hand(q, k, v, jnp.tril(jnp.ones((length, length), bool)))

    found = [Side('forward', 'ours', jax.jit(ours), operands), Side('training', 'ours', step(ours),
                                                                   operands)]  # fmt: skip
    if _fits(config, length, length, copies=4):
        found += [Side('forward', 'by hand', jax.jit(hand), operands),
                  Side('training', 'by hand', step(hand), operands)]  # fmt: skip
    own = (x.q_BLHC, x.k_BKSC.swapaxes(1, 2), x.v_BKSC.swapaxes(1, 2))
    for name, attend in _public(scale).items():
        found += [Side('forward', name, jax.jit(attend), own),
                  Side('training', name, step(attend), own)]  # fmt: skip
    return found


def _public(scale: float) -> dict[str, Callable[..., jax.Array]]:
    """Returns the public causal attention kernels for this device; keys are `[B, S, K, C]`."""
    if jax.default_backend() != 'gpu':
        return {}

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation='cudnn'
        )

    found: dict[str, Callable[..., jax.Array]] = {'cudnn': cudnn}
    if importlib.util.find_spec('tokamax'):
        import tokamax

        def tokamax_attention(q, k, v):
            return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True)

        found['tokamax'] = tokamax_attention
    return found


def _cached(config, x: Inputs, length, scale, task, q_BLHC, mask: Mask) -> list[Side]:
    # as in a model: one layer of a stack of caches
    k, v = (jnp.stack([rows, rows]) for rows in (x.k_BKSC, x.v_BKSC))
    operands = (q_BLHC, k, v, mask, jnp.asarray(1))

    def ours(q, k, v, mask, layer):
        return attention_lib.attention(q, k, v, mask, layer=layer, scoring=Scoring(scale))

    def dense(q, k, v, mask, layer):
        return by_hand(q, k[layer], v[layer], visible(mask)[:, :, None])

    found = [Side(task, 'ours', jax.jit(ours), operands)]
    if _fits(config, q_BLHC.shape[1], length, copies=2):
        found.append(Side(task, 'by hand', jax.jit(dense), operands))
    if task == 'decode' and jax.default_backend() == 'gpu':

        def cudnn(q, k_BSKC, v_BSKC, length):
            return jax.nn.dot_product_attention(
                q, k_BSKC, v_BSKC, scale=scale, implementation='cudnn',
                query_seq_lengths=jnp.ones_like(length), key_value_seq_lengths=length,
            )  # fmt: skip

        # in cuDNN's own layout, since its users would keep their caches in it
        own = (q_BLHC, x.k_BKSC.swapaxes(1, 2), x.v_BKSC.swapaxes(1, 2), mask.length)
        found.append(Side(task, 'cudnn', jax.jit(cudnn), own))
    return found


def _column_sums(config: Config, x: Inputs, length: int, scale: float) -> list[Side]:
    q_BLHC = x.q_BLHC[:, -config.nodes :]
    scoring = Scoring(scale)
    _, lse = attention_lib.attention_and_lse(q_BLHC, x.k_BKSC, x.v_BKSC, x.tree, scoring)
    counted = jnp.ones(q_BLHC.shape[:2], bool)

    def ours(q, k, lse, mask, counted):
        return attention_lib.column_sums(q, k, lse, mask, counted, scoring)

    def dense(q, k, lse, mask, counted):
        return xla.column_sums(q, k, lse, mask, counted, scoring)

    operands = (q_BLHC, x.k_BKSC, lse, x.tree, counted)
    found = [Side('column_sums', 'ours', jax.jit(ours), operands)]
    if _fits(config, config.nodes, length, copies=2) and jax.default_backend() != 'cpu':
        found.append(Side('column_sums', 'by hand', jax.jit(dense), operands))
    return found


def _sparse(config: Config, x: Inputs, length: int, scale: float) -> list[Side]:
    blocks = -(-length // SPARSE_ROWS)
    every = max(round(1 / config.kept), 1)
    block = jnp.arange(length) // SPARSE_ROWS
    kept = jnp.broadcast_to(block % every == 0, x.k_BKSC.shape[:3])
    index = sparse.from_rows(kept, SPARSE_ROWS, -(-blocks // every))

    def ours(q, k, v, index):
        return attention_lib.sparse_decode(q, k, v, index, scoring=Scoring(scale))[0]

    def dense(q, k, v, index):
        return by_hand(q, k, v, sparse.kept_rows(index, length)[:, :, None, None])

    operands = (x.q_BLHC[:, -1:], x.k_BKSC, x.v_BKSC, index)
    return [
        Side('sparse_decode', 'ours', jax.jit(ours), operands),
        Side('sparse_decode', 'by hand', jax.jit(dense), operands),
    ]
