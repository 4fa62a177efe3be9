"""Moving a language model to another tokenizer: new token tables around the same body.

Every way to make them is a function `(source, vocabulary, key) -> tables`: a hypernetwork
(`predicted`), or one of the heuristics of `tokenization.heuristics`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Config
from lm.params import Params
from tokenization import decompose, hypernetwork
from tokenization.hypernetwork import HypernetworkConfig
from tokenization.tokenizer import Tokenizer


class Source(NamedTuple):
    """A trained model.

    Attributes:
      config, params: the model.
      tokenizer: the one it was trained with.
      bos: the input-only id that starts its documents.
    """

    config: Config
    params: Params
    tokenizer: decompose.Source
    bos: int


class Vocabulary(NamedTuple):
    """What a table has rows for.

    Attributes:
      tokens: the bytes of each row's token; empty for a special one.
      copied: rows of special tokens, and the source's rows that they are copies of.
    """

    tokens: tuple[bytes, ...]
    copied: Mapping[int, int]


# The tables of a model for a vocabulary of V rows: `input_VD` and, of untied models, `output_VD`.
Method = Callable[[Source, Vocabulary, jax.Array], Params]


def vocabulary(source: Source, target: Tokenizer) -> Vocabulary:
    """Returns the rows that a model needs for `target`: one per id, and one for BOS behind them.

    Raises:
      ValueError: the target has no ids; an id does not stand for fixed bytes; two ids stand for
        the same bytes, and would share their probability; or a single byte has no id.
    """
    if not target.vocab_size:
        raise ValueError('the target vocabulary is empty')
    tokens = tuple(target.token_bytes(i) for i in range(target.vocab_size))
    seen: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        if token and seen.setdefault(token, i) != i:
            raise ValueError(f'ids {seen[token]} and {i} stand for the same bytes, {token!r}')
    missing = [byte for byte in range(256) if bytes([byte]) not in seen]
    if missing:
        raise ValueError(
            f'the target has no id for {len(missing)} single bytes, {missing[0]} first'
        )
    return Vocabulary((*tokens, b''), {len(tokens): source.bos})


def with_tables(source: Source, vocabulary: Vocabulary, tables: Params) -> tuple[Config, Params]:
    """Returns the model with other tables; rows of special tokens are the source's, to the bit."""
    config = dataclasses.replace(source.config, vocab_size=len(vocabulary.tokens))
    at, of = (np.array(ids, int) for ids in (list(x) for x in _pairs(vocabulary)))
    cast = {
        name: rows_VD.astype(config.param_dtype).at[at].set(source.params['tables'][name][of])
        for name, rows_VD in tables.items()
    }
    return config, {'body': source.params['body'], 'tables': cast}


def _pairs(vocabulary: Vocabulary):
    return vocabulary.copied.keys(), vocabulary.copied.values()


def pieces(source: Source, vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Returns each token's pieces in the source's vocabulary, int32 `[V, length]`."""
    return decompose.decompose(source.tokenizer, vocabulary.tokens, length)


def predicted(weights: Params, config: HypernetworkConfig) -> Method:
    """Returns the method of a trained hypernetwork."""

    def tables(source: Source, vocabulary: Vocabulary, key: jax.Array) -> Params:
        del key
        pieces_VP = jnp.asarray(pieces(source, vocabulary, config.pieces))
        predict = jax.jit(hypernetwork.predict, static_argnums=1)
        return predict(weights, config, source.params['tables'], pieces_VP)

    return tables


def add_task(fine_tuned: Params, transferred: Params, base: Params, weight: float) -> Params:
    """Returns a fine-tuned variant of `base`, moved to the tokenizer that `transferred` reads.

    Its tables are the transferred base's; its body is `fine_tuned + weight * (transferred -
    base)`, so that a body which was trained on after the transfer counts (task arithmetic,
    Ilharco et al. 2023; ZeTT, section 5, has weights up to 0.7).

    Args:
      fine_tuned, base: models of the old tokenizer.
      transferred: the base with new tables, trained on or not.
      weight: 0 leaves the fine-tuned body alone.
    """

    def add(own, after, before):
        difference = after.astype(jnp.float32) - before.astype(jnp.float32)
        return own + (weight * difference).astype(own.dtype)

    body = jax.tree.map(add, fine_tuned['body'], transferred['body'], base['body'])
    return {'body': body, 'tables': transferred['tables']}
