"""Exact top-k, normaliser and draws over a vocabulary too large for dense logits.

The table's rows may be sharded over a mesh. Each device scans its own rows, a chunk at a time, and
keeps its k greatest logits and the mass of each block of tokens; `[B, V]` is never materialised. In
f32 the results are exact: there is no index (`decoding.projected_search` has an approximate one).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decoding import sample
from decoding.sample import BLOCK
from lm.devices import mesh as mesh_lib
from lm.model import layers

CHUNK = 16 * BLOCK  # rows whose logits exist at a time, on each device
_ROWS = PartitionSpec(mesh_lib.AXES)


@flax.struct.dataclass
class Table:
    """An output table: logits are the products of its rows with hidden states.

    Attributes:
      rows_VD: rows from `size` on are padding. Multiplied in the dtype of the hidden states.
      size: number of tokens.
      never: ids that are never drawn.
      softcap: of the logits (Gemma 2), or None.
      chunk: rows whose logits exist at a time, on each device; a multiple of `sample.BLOCK`.
    """

    rows_VD: jax.Array
    size: int = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)
    never: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    chunk: int = flax.struct.field(pytree_node=False, default=CHUNK)


class Found(NamedTuple):
    """The results of a pass over the table; logits are capped, and divided by a temperature > 0.

    Attributes:
      logits_BA, tokens_BA: the k greatest, f32, and their ids, int32; ties put the lower id first.
      log_mass_BJ: f32, log of the sum of exp(logit) of each block of 256 tokens.
      temperature_B: f32.
    """

    logits_BA: jax.Array
    tokens_BA: jax.Array
    log_mass_BJ: jax.Array
    temperature_B: jax.Array

    @property
    def log_normalizer_B(self) -> jax.Array:
        """Log of the softmax's normaliser over the whole table."""
        return jax.nn.logsumexp(self.log_mass_BJ, axis=1)

    @property
    def kept_mass_B(self) -> jax.Array:
        """Total probability of the k tokens in the softmax over the whole table."""
        return jnp.exp(jax.nn.logsumexp(self.logits_BA, axis=1) - self.log_normalizer_B)


def place(table: Table, mesh: Mesh) -> Table:
    """Returns the table with its rows sharded over all devices of a mesh, and padded to divide."""
    unit = mesh.size * BLOCK
    padding = -table.rows_VD.shape[0] % unit
    rows_VD = jnp.pad(table.rows_VD, ((0, padding), (0, 0))) if padding else table.rows_VD
    return dataclasses.replace(table, rows_VD=jax.device_put(rows_VD, NamedSharding(mesh, _ROWS)))


def search(table: Table, h_BD: jax.Array, k: int, temperature: jax.Array | float = 1.0) -> Found:
    """Returns the k greatest logits and the mass of every block, in one pass over the table.

    On a mesh in use (`jax.set_mesh`) each device searches its own rows; the k candidates of each
    device are merged.

    Args:
      table: see `Table`; on a mesh, as `place` returns it.
      h_BD: hidden states, ready for `unembed`.
      k: 1 to the table's size.
      temperature: a number, or one for each row; 0 draws the greatest.

    Raises:
      ValueError: k, the chunk, or the table's shape on a mesh does not fit.
    """
    if not 1 <= k <= table.size:
        raise ValueError(f'k {k}: expected 1 to {table.size}, the size of the vocabulary')
    if table.chunk % BLOCK or table.chunk < 1:
        raise ValueError(f'chunk {table.chunk}: expected a multiple of {BLOCK}')
    temperature_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), h_BD.shape[:1])

    def on_device(rows_VD, h_BD, temperature_B, first):
        local = dataclasses.replace(table, rows_VD=rows_VD)
        return _search_rows(local, h_BD, temperature_B, first, k)

    gather = functools.partial(jax.lax.all_gather, axis_name=mesh_lib.AXES, axis=1, tiled=True)
    logits, tokens, log_mass_BJ = _over_rows(table, on_device, gather, h_BD, temperature_B)
    logits_BA, best = jax.lax.top_k(logits, k)
    tokens_BA = jnp.take_along_axis(tokens, best, axis=1)
    blocks = -(-table.size // BLOCK)
    return Found(logits_BA, tokens_BA, log_mass_BJ[:, :blocks], temperature_B)


def draw(
    table: Table, h_BD: jax.Array, found: Found, key_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """Draws from the softmax over the whole table, int32 `[B]`; exact, without dense logits.

    The Gumbel-max trick picks a block by its mass and then a token of the block, whose logits are
    recomputed. `sample.draw` draws the same token from dense logits with the same key and position.

    Args:
      table, h_BD: as given to `search`.
      found: its result.
      key_B, position_B: see `sample.draw`.
    """
    blocks = found.log_mass_BJ.shape[1]
    within = min(table.size, BLOCK)
    noise = sample.gumbel(sample.at_position(key_B, position_B), (blocks + within,))
    block_B = jnp.argmax(found.log_mass_BJ + noise[:, :blocks], axis=1)
    tokens_BO = block_B[:, None] * BLOCK + jnp.arange(within)

    def on_device(rows_VD, h_BD, tokens_BO, temperature_B, first):
        local_BO = tokens_BO - first
        here = (local_BO >= 0) & (local_BO < rows_VD.shape[0])
        rows_BOD = rows_VD.at[local_BO].get(mode='clip')
        logits_BO = _logits(table, 'bd,bxd->bx', h_BD, rows_BOD, temperature_B)
        return jnp.where(here, logits_BO, 0)

    # a block lies on one device: the others add zeros
    add = functools.partial(jax.lax.psum, axis_name=mesh_lib.AXES)
    logits_BO = _over_rows(table, on_device, add, h_BD, tokens_BO, found.temperature_B)
    logits_BO = jnp.where(_drawable(table, tokens_BO), logits_BO, -jnp.inf)
    within_B = jnp.argmax(logits_BO + noise[:, blocks:], axis=1)
    drawn_B = (block_B * BLOCK + within_B).astype(jnp.int32)
    return jnp.where(found.temperature_B > 0, drawn_B, found.tokens_BA[:, 0])


def draw_among(found: Found, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Draws among the k found from their renormalised probabilities, int32 `[B]`.

    This is the distribution of `Sampler(top_k=k)`, not the model's; `found.kept_mass_B` is the
    probability that it keeps.
    """
    best_B = sample.draw(jax.nn.log_softmax(found.logits_BA), key_B, position_B)
    best_B = jnp.where(found.temperature_B > 0, best_B, 0)
    return jnp.take_along_axis(found.tokens_BA, best_B[:, None], axis=1)[:, 0]


def _over_rows(
    table: Table, function: Callable[..., Any], join: Callable[..., Any], *operands: Any
) -> Any:
    """Returns `function(rows_VD, *operands, first)`, run by each device on its rows from `first`.

    `join` combines the devices' results; on one device it is not called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(table.rows_VD, *operands, 0)
    rows = table.rows_VD.shape[0]
    if rows % (mesh.size * BLOCK):
        raise ValueError(
            f'{rows} rows of a table do not divide into blocks of {BLOCK} on {mesh.size} devices: '
            'place the table first'
        )

    def on_device(rows_VD, *operands):
        first = jax.lax.axis_index(mesh_lib.AXES) * rows_VD.shape[0]
        return join(function(rows_VD, *operands, first))

    # h is replicated: it is small beside the table
    specs = (_ROWS, *(PartitionSpec() for _ in operands))
    mapped = jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return mapped(table.rows_VD, *operands)


def _logits(table: Table, spec: str, h_BD: jax.Array, rows, temperature_B: jax.Array) -> jax.Array:
    """Returns logits f32 `[B, ...]` of some rows, capped and divided by the temperature."""
    logits = layers.softcap(layers.einsum(spec, h_BD, rows, jnp.float32), table.softcap)
    return logits / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]


def _drawable(table: Table, tokens: jax.Array) -> jax.Array:
    """Returns whether each id may be drawn."""
    drawable = tokens < table.size
    for token in table.never:
        drawable &= tokens != token
    return drawable


def _search_rows(
    table: Table, h_BD: jax.Array, temperature_B: jax.Array, first: jax.Array | int, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns logits and ids of the k greatest (or of all rows, if fewer), and the block masses."""
    b, rows = h_BD.shape[0], table.rows_VD.shape[0]
    k = min(k, rows)

    def visit(best, start, size):
        rows_OD = jax.lax.dynamic_slice_in_dim(table.rows_VD, start, size)
        logits_BO = _logits(table, 'bd,cd->bc', h_BD, rows_OD, temperature_B)
        token_O = first + start + jnp.arange(size, dtype=jnp.int32)
        logits_BO = jnp.where(_drawable(table, token_O), logits_BO, -jnp.inf)
        # kept entries come first, so that ties keep the lower id
        logits = jnp.concatenate([best[0], logits_BO], axis=1)
        tokens = jnp.concatenate([best[1], jnp.broadcast_to(token_O, (b, size))], axis=1)
        logits_BA, index = jax.lax.top_k(logits, k)
        whole = jnp.pad(logits_BO, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
        log_mass_BJ = jax.nn.logsumexp(whole.reshape(b, -1, BLOCK), axis=2)
        return (logits_BA, jnp.take_along_axis(tokens, index, axis=1)), log_mass_BJ

    best = jnp.full((b, k), -jnp.inf), jnp.zeros((b, k), jnp.int32)
    chunks, rest = divmod(rows, table.chunk)
    log_masses = []
    if chunks:
        starts = jnp.arange(chunks) * table.chunk
        best, stacked = jax.lax.scan(lambda best, i: visit(best, i, table.chunk), best, starts)
        log_masses.append(stacked.swapaxes(0, 1).reshape(b, -1))
    if rest:
        best, last = visit(best, chunks * table.chunk, rest)
        log_masses.append(last)
    return *best, jnp.concatenate(log_masses, axis=1)
