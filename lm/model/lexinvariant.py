"""Token tables drawn for each sequence: symbols without a fixed meaning.

A lexinvariant model gives a text the same probability after any renaming of its symbols (Huang et
al. 2023, arXiv 2305.16349). Its table, shared by input and output, is drawn anew for each
sequence, so that all it can know of a symbol is what this text does with it.

Here a sequence is a segment of a row: documents packed in one row never share a table. A row of a
table follows from the sequence's key and the symbol's id alone. So no parameter has a V axis, any
id works at any time, and a large table need never exist as a whole: rows are made where they are
wanted, and made again.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm.devices import mesh
from lm.model import tables
from lm.model.config import Config
from lm.model.params import Params

_CHOICE = 1 << 30  # what keys are folded by, beside segments and ids,
_DECODING = (1 << 31) - 1  # and a position that no text reaches: draws fold a text's key by theirs
_FIXED = 0  # key of the table whose rows `permuted` deals out


def sequence_keys(key: jax.Array, batch: int) -> jax.Array:
    """Returns a key for each row of a batch, `[B]`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def of_segment(key_B: jax.Array, segment: jax.Array | int) -> jax.Array:
    """Returns the keys of one segment in each row."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, segment)


def fixed_table(config: Config, ids: jax.Array) -> jax.Array:
    """Returns rows of the table that all `permuted` sequences share, `[..., D]`, of length 1.

    Rows are cosines, `row_f[j] ~ cos(pi f (2j + 1) / 2D)`, with random signs. Each D of them in a
    row are orthogonal, so that up to D symbols are never mistaken for each other, as normal rows
    are: by 1 / sqrt(D). Those of different blocks of D have signs of their own.
    """
    d = config.d_model
    block, frequency = ids // d, (ids % d)[..., None]
    # a whole number of quarter turns / D, exact where a product of floats would not be
    turn = frequency * (2 * jnp.arange(d) + 1) % (4 * d)
    wave = jnp.where(frequency == 0, 1.0, 2**0.5 * jnp.cos(turn * (math.pi / (2 * d))))

    def signs(key, block):
        return jax.random.rademacher(jax.random.fold_in(key, block), (d,), jnp.float32)

    sign = _each(signs, jax.random.key(_FIXED), block)
    return (sign * wave * d**-0.5).astype(config.dtype)


def order(config: Config, key_B: jax.Array) -> jax.Array | None:
    """Returns which row of the fixed table each symbol has, int32 `[B, V]`; None for `gaussian`."""
    if _law(config).kind == 'gaussian':
        return None
    row_BV = jax.vmap(lambda key: jax.random.permutation(key, config.vocab_size))(key_B)
    return mesh.constrain(row_BV, ('batch', 'length'))


def rows(config: Config, key_B: jax.Array, row_BV: jax.Array | None, ids_C: jax.Array) -> jax.Array:
    """Returns the rows that symbols have in each sequence, where they are drawn: `[B, C, D]`.

    Args:
      config: of the model.
      key_B: of the sequences.
      row_BV: their `order`.
      ids_C: ids below V.
    """
    if row_BV is not None:
        rows_BCD = fixed_table(config, row_BV[:, ids_C])
    else:
        rows_BCD = _normal(
            config, key_B[:, None], jnp.broadcast_to(ids_C, (len(key_B), len(ids_C)))
        )
    return mesh.constrain(rows_BCD, ('batch', 'vocab', 'embed'))  # drawn where they are used


def is_drawn(config: Config, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns which symbols' rows are drawn, and not learned: bool, of the shape of the ids.

    Args:
      config: of the model.
      key: of each id's sequence, of a shape that broadcasts to that of the ids.
      ids: ids.
    """
    law = _law(config)
    probability_V = np.full(config.vocab_size, law.probability, np.float32)
    probability_V[list(law.always)] = 1
    probability_V[list(law.never)] = 0

    def choose(key, token):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _CHOICE), token))

    return _each(choose, key, ids) < jnp.asarray(probability_V)[ids]


def embed(
    learned: Params, config: Config, key_B: jax.Array, segments_BL: jax.Array, tokens_BL: jax.Array
) -> jax.Array:
    """Returns the vectors of packed tokens, `[B, L, D]`: each segment has a table of its own.

    Args:
      learned: the `tables` of the parameters; empty unless the model is partially lexinvariant.
      config: of the model.
      key_B: of the rows.
      segments_BL: int32, the segment of each token in its row.
      tokens_BL: ids.
    """
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    key_BL = fold(key_B, segments_BL)
    if _law(config).kind == 'gaussian':
        x_BLD = _normal(config, key_BL, tokens_BL)
    else:
        (row_BL,) = relabel(config, key_B, segments_BL, tokens_BL)
        x_BLD = fixed_table(config, row_BL)
    if _law(config).partial:
        drawn_BL = is_drawn(config, key_BL, tokens_BL)
        known_BLD = tables.laid_out(learned['input_VD'][tokens_BL].astype(config.dtype))
        x_BLD = jnp.where(drawn_BL[..., None], x_BLD, known_BLD)
    return tables.scaled(x_BLD, config)


def relabel(
    config: Config, key_B: jax.Array, segments_BL: jax.Array, *ids_BL: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns ids of packed rows as rows of the fixed table, each segment in its own `order`.

    A model over the fixed table that reads and predicts these is the `permuted` one: renaming
    targets with the table's rows leaves the softmax as it was. Segment 0, padding, stays as it is.
    """

    def one_segment(segment, done):
        row_BV = order(config, of_segment(key_B, segment))
        assert row_BV is not None
        here_BL = segments_BL == segment
        return tuple(
            jnp.where(here_BL, jnp.take_along_axis(row_BV, old_BL, axis=1), new_BL)
            for old_BL, new_BL in zip(ids_BL, done)
        )

    # as many rounds as the fullest row has segments: only ids pass through, no gradient
    return jax.lax.fori_loop(1, segments_BL.max() + 1, one_segment, ids_BL)


def draw(learned: Params, config: Config, key_B: jax.Array) -> Params:
    """Returns the whole tables of sequences, to stand in for the parameters' `tables`.

    For decoding and for looking at: `[B, V, D]`, or for `permuted` one `[V, D]` and a row number
    per symbol. Training never holds them.

    Args:
      learned: the `tables` of the parameters; empty unless the model is partially lexinvariant.
      config: of the model.
      key_B: of the sequences.

    Raises:
      ValueError: the learned table has another number of rows than the config.
    """
    ids_V, row_BV = jnp.arange(config.vocab_size), order(config, key_B)
    if row_BV is not None and not _law(config).partial:
        return {'input_VD': fixed_table(config, ids_V), 'row_BV': row_BV}
    rows_BVD = rows(config, key_B, row_BV, ids_V)
    if _law(config).partial:
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


def drawn_for(params: Params, config: Config, key_B: jax.Array) -> Params | None:
    """Returns the tables of texts that are decoded, to be kept beside their cache.

    Args:
      params: of the model.
      config: its config.
      key_B: each text's own key, of which a table's is folded.

    Returns:
      What `draw` makes; None where nothing is drawn, and the parameters' own tables serve.
    """
    if config.lexinvariant is None or not config.lexinvariant.draws:
        return None
    return draw(params['tables'], config, of_segment(key_B, _DECODING))


def with_tables(params: Params, drawn: Params | None) -> Params:
    """Returns parameters to decode texts with: `drawn_for` them, or as they are."""
    return params if drawn is None else {**params, 'tables': drawn}


def _law(config: Config):
    assert config.lexinvariant is not None
    return config.lexinvariant


def _normal(config: Config, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns normal rows `[..., D]`, each from a key and an id, of length 1 on average.

    The paper's are of length sqrt(D). Here, as with learned tables, that factor is left to the
    input (`scale_embeddings`): in the logits it would only have to be divided out again.
    """

    def draw_one(key, token):
        return jax.random.normal(jax.random.fold_in(key, token), (config.d_model,), jnp.float32)

    return (_each(draw_one, key, ids) * config.d_model**-0.5).astype(config.dtype)


def _each(function: Callable, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns `function(key, id)` of each id, with keys that broadcast to the ids."""
    for _ in ids.shape:
        function = jax.vmap(function)
    return function(jnp.broadcast_to(key, ids.shape), ids)


def regret_bound(vocab_size: int, distinct: int) -> float:
    """Returns log(d! / (d - k)!) in nats, the most that not knowing the symbols can cost on a text.

    A law p averaged over all renamings gives a text of k distinct symbols at least the share
    (d - k)! / d! of what p does, since so many renamings leave it as it is.
    """
    return math.lgamma(vocab_size + 1) - math.lgamma(vocab_size - distinct + 1)
