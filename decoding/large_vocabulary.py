"""Logits over a table too large to hold them: exact top-k, normaliser and draws, by chunks.

Rows may lie on all devices of a mesh. Each goes through its own rows, a chunk at a time, and keeps
its k greatest logits and the mass of each block of tokens; `[B, V]` never exists. In f32 all of it
is exact: nothing is searched for by an index. `project` makes one, for those who want it.
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
    """The rows that hidden states meet in the logits.

    Attributes:
      rows_VD: those from `size` on are padding. Computed with in the dtype of the hidden states.
      size: tokens.
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
      logits_BK, tokens_BK: the k greatest, f32, and their ids, int32; of equal ones the lower id
        is first.
      log_mass_BG: f32, log of the sum of exp(logit) of each block of 256 tokens.
      temperature_B: f32.
    """

    logits_BK: jax.Array
    tokens_BK: jax.Array
    log_mass_BG: jax.Array
    temperature_B: jax.Array

    @property
    def log_normalizer_B(self) -> jax.Array:
        """Log of the softmax's normaliser over the whole table."""
        return jax.nn.logsumexp(self.log_mass_BG, axis=1)

    @property
    def kept_mass_B(self) -> jax.Array:
        """Probability of the k together, the share that a draw among them keeps."""
        return jnp.exp(jax.nn.logsumexp(self.logits_BK, axis=1) - self.log_normalizer_B)


def place(table: Table, mesh: Mesh) -> Table:
    """Returns the table with its rows divided among all devices of a mesh, padded as that needs."""
    unit = mesh.size * BLOCK
    padding = -table.rows_VD.shape[0] % unit
    rows_VD = jnp.pad(table.rows_VD, ((0, padding), (0, 0))) if padding else table.rows_VD
    return dataclasses.replace(table, rows_VD=jax.device_put(rows_VD, NamedSharding(mesh, _ROWS)))


def search(table: Table, h_BD: jax.Array, k: int, temperature: jax.Array | float = 1.0) -> Found:
    """Returns the k greatest logits and the mass of all, in one pass over the table.

    Over a mesh in use (`jax.set_mesh`) each device searches its own rows, and k candidates of each
    are merged.

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
    logits, tokens, log_mass_BG = _over_rows(table, on_device, gather, h_BD, temperature_B)
    logits_BK, best = jax.lax.top_k(logits, k)
    tokens_BK = jnp.take_along_axis(tokens, best, axis=1)
    blocks = -(-table.size // BLOCK)
    return Found(logits_BK, tokens_BK, log_mass_BG[:, :blocks], temperature_B)


def draw(
    table: Table, h_BD: jax.Array, found: Found, key_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """Draws from the softmax over the whole table, int32 `[B]`: exact, and no logits are held.

    The Gumbel-max trick picks a block by its mass and then a token of the block, whose logits are
    computed again. The same key and position draw what `sample.draw` would from dense logits.

    Args:
      table, h_BD: as given to `search`.
      found: its result.
      key_B, position_B: see `sample.draw`.
    """
    blocks = found.log_mass_BG.shape[1]
    within = min(table.size, BLOCK)
    noise = sample.gumbel(sample.at_position(key_B, position_B), (blocks + within,))
    block_B = jnp.argmax(found.log_mass_BG + noise[:, :blocks], axis=1)
    tokens_BX = block_B[:, None] * BLOCK + jnp.arange(within)

    def on_device(rows_VD, h_BD, tokens_BX, temperature_B, first):
        local_BX = tokens_BX - first
        here = (local_BX >= 0) & (local_BX < rows_VD.shape[0])
        rows_BXD = rows_VD.at[local_BX].get(mode='clip')
        logits_BX = _logits(table, 'bd,bxd->bx', h_BD, rows_BXD, temperature_B)
        return jnp.where(here, logits_BX, 0)

    # a block lies on one device: the others add zeros
    add = functools.partial(jax.lax.psum, axis_name=mesh_lib.AXES)
    logits_BX = _over_rows(table, on_device, add, h_BD, tokens_BX, found.temperature_B)
    logits_BX = jnp.where(_drawable(table, tokens_BX), logits_BX, -jnp.inf)
    within_B = jnp.argmax(logits_BX + noise[:, blocks:], axis=1)
    drawn_B = (block_B * BLOCK + within_B).astype(jnp.int32)
    return jnp.where(found.temperature_B > 0, drawn_B, found.tokens_BK[:, 0])


def draw_among(found: Found, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Draws among the k found, by their probabilities renormalised to 1: int32 `[B]`.

    That is the distribution of `Sampler(top_k=k)`, not the model's: `found.kept_mass_B` is the
    share of the model's that it keeps.
    """
    best_B = sample.draw(jax.nn.log_softmax(found.logits_BK), key_B, position_B)
    best_B = jnp.where(found.temperature_B > 0, best_B, 0)
    return jnp.take_along_axis(found.tokens_BK, best_B[:, None], axis=1)[:, 0]


def _over_rows(
    table: Table, function: Callable[..., Any], join: Callable[..., Any], *operands: Any
) -> Any:
    """Returns `function(rows_VD, *operands, first)`, run by each device on its rows from `first`.

    `join` makes one result of the devices'; without a mesh there is one already.
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

    # every device computes with all of h, which is small beside the table
    specs = (_ROWS, *(PartitionSpec() for _ in operands))
    mapped = jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return mapped(table.rows_VD, *operands)


def _logits(table: Table, spec: str, h_BD: jax.Array, rows, temperature_B: jax.Array) -> jax.Array:
    """Returns logits f32 `[B, ...]` of some rows, capped and divided by the temperature."""
    logits = layers.softcap(layers.einsum(spec, h_BD, rows, jnp.float32), table.softcap)
    return logits / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]


def _drawable(table: Table, tokens: jax.Array) -> jax.Array:
    """Returns which ids may be drawn."""
    drawable = tokens < table.size
    for token in table.never:
        drawable &= tokens != token
    return drawable


def _search_rows(
    table: Table, h_BD: jax.Array, temperature_B: jax.Array, first: jax.Array | int, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns logits and ids of the k greatest, all where they are fewer, and the block masses."""
    b, rows = h_BD.shape[0], table.rows_VD.shape[0]
    k = min(k, rows)

    def visit(best, start, size):
        rows_CD = jax.lax.dynamic_slice_in_dim(table.rows_VD, start, size)
        logits_BC = _logits(table, 'bd,cd->bc', h_BD, rows_CD, temperature_B)
        token_C = first + start + jnp.arange(size, dtype=jnp.int32)
        logits_BC = jnp.where(_drawable(table, token_C), logits_BC, -jnp.inf)
        # those kept come first, so that of equal ones the lower id stays
        logits = jnp.concatenate([best[0], logits_BC], axis=1)
        tokens = jnp.concatenate([best[1], jnp.broadcast_to(token_C, (b, size))], axis=1)
        logits_BK, index = jax.lax.top_k(logits, k)
        whole = jnp.pad(logits_BC, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
        log_mass_BG = jax.nn.logsumexp(whole.reshape(b, -1, BLOCK), axis=2)
        return (logits_BK, jnp.take_along_axis(tokens, index, axis=1)), log_mass_BG

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
