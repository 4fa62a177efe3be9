"""Token tables drawn for each sequence: symbols without a fixed meaning.

A lexinvariant model gives a text the same probability after any renaming of its symbols (Huang et
al. 2023, arXiv 2305.16349). Its table, shared by input and output, is drawn anew for each sequence,
so the model can learn a symbol's role only from that sequence.

Here a sequence is a segment of a row: documents packed into one row never share a table. A table
row depends only on the sequence's key and the symbol's id. So no parameter has a V axis, any id
works at any time, and a large table is never materialised: its rows are drawn on use, and drawn
again in the backward pass.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm.devices import mesh
from lm.model import embedding
from lm.model.config import Config, Lexinvariant
from lm.model.leaves import Params

# Keys are folded with segments and ids, and with two constants beyond all of them. Sampling folds a
# text's key with positions, which never reach the second.
_CHOICE = 1 << 30
_DECODING = (1 << 31) - 1
_FIXED = 0  # key of the table whose rows `permuted` shuffles


def sequence_keys(key: jax.Array, batch: int) -> jax.Array:
    """Returns a key for each row of a batch, `[B]`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def of_segment(key_B: jax.Array, segment: jax.Array | int) -> jax.Array:
    """Returns the keys of one segment in each row."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, segment)


def fixed_table(config: Config, ids: jax.Array) -> jax.Array:
    """Returns unit-norm rows of the table shared by all `permuted` sequences, `[..., D]`.

    Rows are cosines, `row_f[j] ~ cos(pi f (2j + 1) / 2D)`, with random signs. The D rows of a block
    are orthogonal, so that up to D symbols do not interfere; the inner products of normal rows
    would be about 1 / sqrt(D). Each block has its own signs.
    """
    d = config.d_model
    block, frequency = ids // d, (ids % d)[..., None]
    # an integer number of quarter turns / D: exact, unlike a product of floats
    turn = frequency * (2 * jnp.arange(d) + 1) % (4 * d)
    wave = jnp.where(frequency == 0, 1.0, 2**0.5 * jnp.cos(turn * (math.pi / (2 * d))))

    def signs(key, block):
        return jax.random.rademacher(jax.random.fold_in(key, block), (d,), jnp.float32)

    sign = _each(signs, jax.random.key(_FIXED), block)
    return (sign * wave * d**-0.5).astype(config.dtype)


def order(config: Config, key_B: jax.Array) -> jax.Array | None:
    """Returns each symbol's row of the fixed table, int32 `[B, V]`; None for `gaussian`."""
    if _spec(config).kind == 'gaussian':
        return None
    row_BV = jax.vmap(lambda key: jax.random.permutation(key, config.vocab_size))(key_B)
    return mesh.constrain(row_BV, ('batch', 'length'))


def rows(config: Config, key_B: jax.Array, row_BV: jax.Array | None, ids_O: jax.Array) -> jax.Array:
    """Returns the drawn rows of symbols in each sequence, `[B, O, D]`.

    Args:
      config: of the model.
      key_B: of the sequences.
      row_BV: their `order`.
      ids_O: ids below V.
    """
    if row_BV is not None:
        rows_BOD = fixed_table(config, row_BV[:, ids_O])
    else:
        rows_BOD = _normal(
            config, key_B[:, None], jnp.broadcast_to(ids_O, (len(key_B), len(ids_O)))
        )
    return mesh.constrain(rows_BOD, ('batch', 'vocab', 'embed'))  # drawn where they are used


def is_drawn(config: Config, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns whether each symbol's row is drawn rather than learned: bool, in the ids' shape.

    Args:
      config: of the model.
      key: of each id's sequence; its shape broadcasts to that of the ids.
      ids: ids.
    """
    spec = _spec(config)
    probability_V = np.full(config.vocab_size, spec.probability, np.float32)
    probability_V[list(spec.always)] = 1
    probability_V[list(spec.never)] = 0

    def choose(key, token):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _CHOICE), token))

    return _each(choose, key, ids) < jnp.asarray(probability_V)[ids]


def embed(
    learned: Params, config: Config, key_B: jax.Array, segments_BL: jax.Array, tokens_BL: jax.Array
) -> jax.Array:
    """Returns the vectors of packed tokens, `[B, L, D]`, by each segment's own table.

    Args:
      learned: the `tables` of the parameters; empty unless the model is partially lexinvariant.
      config: of the model.
      key_B: of the rows.
      segments_BL: int32, the segment of each token in its row.
      tokens_BL: ids.
    """
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    key_BL = fold(key_B, segments_BL)
    if _spec(config).kind == 'gaussian':
        x_BLD = _normal(config, key_BL, tokens_BL)
    else:
        (row_BL,) = relabel(config, key_B, segments_BL, tokens_BL)
        x_BLD = fixed_table(config, row_BL)
    if _spec(config).partial:
        drawn_BL = is_drawn(config, key_BL, tokens_BL)
        known_BLD = embedding.laid_out(learned['input_VD'][tokens_BL].astype(config.dtype))
        x_BLD = jnp.where(drawn_BL[..., None], x_BLD, known_BLD)
    return embedding.scaled(x_BLD, config)


def relabel(
    config: Config, key_B: jax.Array, segments_BL: jax.Array, *ids_BL: jax.Array
) -> tuple[jax.Array, ...]:
    """Maps ids of packed rows to rows of the fixed table, by each segment's own `order`.

    The `permuted` model is a model over the fixed table that reads and predicts these ids:
    relabelling tokens and targets alike leaves the softmax unchanged. Segment 0, padding, is
    unchanged.
    """

    def one_segment(segment, done):
        row_BV = order(config, of_segment(key_B, segment))
        assert row_BV is not None
        here_BL = segments_BL == segment
        return tuple(
            jnp.where(here_BL, jnp.take_along_axis(row_BV, old_BL, axis=1), new_BL)
            for old_BL, new_BL in zip(ids_BL, done)
        )

    # one iteration per segment of the row with the most; ids have no gradient
    return jax.lax.fori_loop(1, segments_BL.max() + 1, one_segment, ids_BL)


def draw(learned: Params, config: Config, key_B: jax.Array) -> Params:
    """Returns the whole tables of sequences, in place of the parameters' `tables`.

    For decoding and inspection: `[B, V, D]`, or for `permuted` one `[V, D]` and the row of each
    symbol. Training never materialises them.

    Args:
      learned: the `tables` of the parameters; empty unless the model is partially lexinvariant.
      config: of the model.
      key_B: of the sequences.

    Raises:
      ValueError: the learned table has another number of rows than the config.
    """
    ids_V, row_BV = jnp.arange(config.vocab_size), order(config, key_B)
    if row_BV is not None and not _spec(config).partial:
        return {'input_VD': fixed_table(config, ids_V), 'row_BV': row_BV}
    rows_BVD = rows(config, key_B, row_BV, ids_V)
    if _spec(config).partial:
        if learned['input_VD'].shape[0] != config.vocab_size:
            raise ValueError(
                f'a table of {learned["input_VD"].shape[0]} learned rows, and {config.vocab_size} '
                'symbols: a partially lexinvariant model keeps its vocabulary'
            )
        known_VD = learned['input_VD'].astype(config.dtype)
        ids_BV = jnp.broadcast_to(ids_V, rows_BVD.shape[:2])
        drawn_BV = is_drawn(config, key_B[:, None], ids_BV)
        rows_BVD = jnp.where(drawn_BV[..., None], rows_BVD, known_VD)
    return {'input_BVD': mesh.constrain(rows_BVD, ('batch', 'vocab', 'embed'))}


def for_texts(learned: Params, config: Config, key_B: jax.Array) -> Params:
    """Returns the tables for decoding texts, as `draw` does.

    Args:
      learned: the `tables` of the parameters.
      config: of the model.
      key_B: each text's own key, which is folded into its table's key.
    """
    return draw(learned, config, of_segment(key_B, _DECODING))


def one_table(config: Config) -> bool:
    """Returns whether all texts share one table and differ only in the order of its rows."""
    return _spec(config).kind == 'permuted' and not _spec(config).partial


def regret_bound(vocab_size: int, distinct: int) -> float:
    """Returns log(d! / (d - k)!) in nats: a bound on the cost of unknown symbols.

    Let p be a distribution over texts of d symbols, and q its average over all renamings. A text
    with k distinct symbols has q >= (d - k)! / d! * p, since that fraction of the renamings leaves
    it unchanged.

    >>> round(math.exp(regret_bound(4, 2)), 6)  # 4 x 3 ordered pairs of symbols
    12.0
    """
    return math.lgamma(vocab_size + 1) - math.lgamma(vocab_size - distinct + 1)


def _spec(config: Config) -> Lexinvariant:
    assert config.lexinvariant is not None
    return config.lexinvariant


def _normal(config: Config, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns normal rows `[..., D]`, each from a key and an id, of norm 1 on average.

    The paper's have norm sqrt(D). Here, as with learned tables, that factor is applied to the input
    only (`scale_embeddings`): logits would have to divide it out again.
    """

    def draw_one(key, token):
        return jax.random.normal(jax.random.fold_in(key, token), (config.d_model,), jnp.float32)

    return (_each(draw_one, key, ids) * config.d_model**-0.5).astype(config.dtype)


def _each(function: Callable, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns `function(key, id)` for each id; keys broadcast to the ids."""
    for _ in ids.shape:
        function = jax.vmap(function)
    return function(jnp.broadcast_to(key, ids.shape), ids)
