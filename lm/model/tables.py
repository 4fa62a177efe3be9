"""Token tables before and after the body: pure functions of the parameters' `tables`.

    input_VD               learned; also the output table unless there is an output_VD
    output_VD              learned, of untied models
    input_QVD, output_QVD  learned, one table per codebook (`Config.codebooks`)
    input_BVD              drawn, one table per text
    input_VD, row_BV       one table for all texts; each text has its own order of rows

The last two are never parameters: `for_texts` and `for_batch` draw them for lexinvariant models
(`lm.model.lexinvariant`), and otherwise return or keep the parameters' own.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from lm.model import embedding, layers, lexinvariant
from lm.model.config import Config
from lm.model.leaves import Leaf, Params


def leaves(config: Config) -> dict[str, Leaf]:
    """Returns the leaves of the learned tables; none if every row is drawn."""
    if config.lexinvariant is not None and not config.lexinvariant.partial:
        return {}
    v, d, q = config.vocab_size, config.d_model, config.codebooks
    table, suffix = Leaf((v, d), ('vocab', 'embed'), d**-0.5), 'VD'
    if q > 1:
        table, suffix = Leaf((q, v, d), ('codebook', 'vocab', 'embed'), d**-0.5), 'QVD'
    names = ('input',) if config.tied else ('input', 'output')
    return {f'{name}_{suffix}': table for name in names}


def embed(tables: Params, config: Config, tokens_BL: jax.Array) -> jax.Array:
    """Returns the vectors of tokens, `[B, L, D]`.

    Args:
      tables: as above.
      config: of the model.
      tokens_BL: ids. With several codebooks `[B, L, Q]`: their rows are summed.

    Raises:
      ValueError: the model's tables are drawn per text, and have not been drawn.
    """
    if not tables:
        raise ValueError(
            'this model has no learned table: draw one per sequence (lm.model.tables.for_texts)'
        )
    if 'row_BV' in tables:
        tokens_BL = jnp.take_along_axis(tables['row_BV'], tokens_BL, axis=1)
    if 'input_QVD' in tables:
        chex.assert_shape(tokens_BL, (None, None, config.codebooks))
        rows = [table_VD[tokens_BL[..., q]] for q, table_VD in enumerate(tables['input_QVD'])]
        x_BLD = sum(rows[1:], rows[0])
    elif 'input_BVD' in tables:
        x_BLD = tables['input_BVD'][jnp.arange(tokens_BL.shape[0])[:, None], tokens_BL]
    else:
        x_BLD = tables['input_VD'][tokens_BL]
    return embedding.scaled(embedding.laid_out(x_BLD.astype(config.dtype)), config)


def output_table(tables: Params) -> jax.Array:
    """Returns the table of the logits, `[V, D]` or `[Q, V, D]`."""
    names = ('output_VD', 'output_QVD', 'input_VD', 'input_QVD')
    return next(tables[name] for name in names if name in tables)


def unembed(tables: Params, config: Config, h_BLD: jax.Array) -> jax.Array:
    """Returns logits of hidden states `[B, ..., D]`: f32 `[B, ..., V]`, or `[B, ..., Q, V]`."""
    if config.codebooks > 1:
        logits = layers.einsum('...d,qvd->...qv', h_BLD, output_table(tables), jnp.float32)
    elif 'input_BVD' in tables:
        logits = layers.einsum('b...d,bvd->b...v', h_BLD, tables['input_BVD'], jnp.float32)
    else:
        logits = layers.einsum('...d,vd->...v', h_BLD, output_table(tables), jnp.float32)
    if 'row_BV' in tables:
        row_BV = tables['row_BV']
        between = (1,) * (logits.ndim - 2)
        logits = jnp.take_along_axis(logits, row_BV.reshape(len(row_BV), *between, -1), axis=-1)
    return layers.softcap(logits, config.logit_softcap)


def for_texts(tables: Params, config: Config, key_B: jax.Array) -> Params | None:
    """Returns tables for decoding texts, to keep with their cache; None if `tables` suffice.

    Args:
      tables: of the parameters.
      config: of the model.
      key_B: each text's own key, which determines its table.

    Raises:
      ValueError: the model has several codebooks, which no loop decodes yet.
    """
    if config.codebooks > 1:
        raise ValueError(
            f'Config.codebooks: {config.codebooks}; decoding writes one id per position: expected 1'
        )
    return None if config.learned_tables else lexinvariant.for_texts(tables, config, key_B)


class BatchTables(NamedTuple):
    """The tables of a packed batch, and its ids as rows of them.

    Attributes:
      tables: as above; inputs of `embed` and `output_table` unless `key_B` is given.
      tokens_BL, targets_BL: ids as rows of `tables`.
      key_B: of the rows, if each segment has its own table, which is never materialised
        (`lm.losses.drawn_cross_entropy`); None if one table serves all.
    """

    tables: Params
    tokens_BL: jax.Array
    targets_BL: jax.Array
    key_B: jax.Array | None


def for_batch(
    tables: Params, config: Config, batch: dict[str, jax.Array], key: jax.Array | None
) -> BatchTables:
    """Returns the tables of a packed batch, drawn per segment for a lexinvariant model.

    Args:
      tables: of the parameters.
      config: of the model.
      batch: `tokens`, `segments`, and `targets` if there are any (see `lm.data.batches`).
      key: for drawing tables; models with learned ones need none.

    Raises:
      ValueError: tables are drawn and there is no key.
    """
    tokens_BL = batch['tokens']
    targets_BL = batch.get('targets', tokens_BL)
    if config.learned_tables:
        return BatchTables(tables, tokens_BL, targets_BL, None)
    if key is None:
        raise ValueError('the tables of this model are drawn: give a key')
    key_B = lexinvariant.sequence_keys(key, len(tokens_BL))
    if not lexinvariant.one_table(config):
        return BatchTables(tables, tokens_BL, targets_BL, key_B)
    # after relabelling, the loss is a learned model's, but the table gets no gradient
    table_VD = lexinvariant.fixed_table(config, jnp.arange(config.vocab_size))
    tokens_BL, targets_BL = lexinvariant.relabel(
        config, key_B, batch['segments'], tokens_BL, targets_BL
    )
    return BatchTables({'input_VD': table_VD}, tokens_BL, targets_BL, None)


def embed_batch(own: BatchTables, config: Config, segments_BL: jax.Array) -> jax.Array:
    """Returns the vectors of a packed batch's tokens, `[B, L, D]`."""
    if own.key_B is None:
        return embed(own.tables, config, own.tokens_BL)
    return lexinvariant.embed(own.tables, config, own.key_B, segments_BL, own.tokens_BL)
