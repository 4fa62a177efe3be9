"""Tokenizer transfer: new token tables for another tokenizer, around the same body.

A `Method` makes the tables, `(source, vocabulary, key) -> tables`. Methods are hypernetworks
(`predicted`) and the heuristics of `tokenization.transfer.heuristics`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.config import Config
from lm.model.params import Params
from tokenization.tokenizer import Tokenizer
from tokenization.transfer import decompose, hypernetwork
from tokenization.transfer.hypernetwork import HypernetworkConfig


class SourceModel(NamedTuple):
    """The trained model that is moved to another tokenizer.

    Attributes:
      config, params: the model.
      tokenizer: the tokenizer that it was trained with.
      bos: the input-only id that starts its documents.
    """

    config: Config
    params: Params
    tokenizer: decompose.PieceTokenizer
    bos: int


class Vocabulary(NamedTuple):
    """The rows of a new table.

    Attributes:
      tokens: the bytes of each row's token; empty for rows that no text uses.
      copied: row of a special token -> the source's row to copy.
    """

    tokens: tuple[bytes, ...]
    copied: Mapping[int, int]


# Returns the tables for a vocabulary: `input_VD` and, for untied models, `output_VD`.
Method = Callable[[SourceModel, Vocabulary, jax.Array], Params]


def vocabulary(source: SourceModel, target: Tokenizer) -> Vocabulary:
    """Returns the rows that a model needs for `target`: one per id, and a last one for BOS.

    Special tokens are matched by their roles. Rows that `target` never writes are unused: special
    tokens without a counterpart, and a second id for the same bytes (`A` and `<0x41>`).

    Raises:
      ValueError: the target has no ids, or a single byte has none.
    """
    tokens = list(token_table(target))
    if not tokens:
        raise ValueError('the target vocabulary is empty')
    seen: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        if token and seen.setdefault(token, i) != i:
            written = target.encode(token).tolist() == [i]
            tokens[seen[token] if written else i] = b''
            seen[token] = i if written else seen[token]
    missing = [byte for byte in range(256) if bytes([byte]) not in seen]
    if missing:
        raise ValueError(
            f'the target has no id for {len(missing)} single bytes, {missing[0]} first'
        )
    roles = {'bos': source.bos, **getattr(source.tokenizer, 'special', {})}
    special = getattr(target, 'special', {})
    copied = {i: roles[role] for role, i in special.items() if role in roles}
    return Vocabulary((*tokens, b''), {**copied, len(tokens): source.bos})


def token_table(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Returns the bytes of each id; empty for an id without bytes of its own."""

    def data(i: int) -> bytes:
        try:
            return tokenizer.token_bytes(i)
        except ValueError:
            return b''

    return tuple(data(i) for i in range(tokenizer.vocab_size))


def with_tables(
    source: SourceModel, vocabulary: Vocabulary, tables: Params
) -> tuple[Config, Params]:
    """Returns the model with other tables.

    Rows of special tokens are exact copies of the source's. Unused rows are the source's mean row,
    which is improbable in every context.
    """
    config = dataclasses.replace(source.config, vocab_size=len(vocabulary.tokens))
    used_V1 = np.array([[bool(token)] for token in vocabulary.tokens])
    at, of = (np.array(list(ids), int) for ids in zip(*vocabulary.copied.items(), strict=True))
    result = {}
    for name, rows_VD in tables.items():
        own_VD = source.params['tables'][name]
        mean_D = own_VD[: source.tokenizer.vocab_size].astype(jnp.float32).mean(0)
        rows_VD = jnp.where(used_V1, rows_VD, mean_D).astype(config.param_dtype)
        result[name] = rows_VD.at[at].set(own_VD[of])
    return config, {'body': source.params['body'], 'tables': result}


def pieces(source: SourceModel, vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Returns each token's pieces in the source's vocabulary, int32 `[V, length]`."""
    return decompose.decompose(source.tokenizer, vocabulary.tokens, length)


def predicted(weights: Params, config: HypernetworkConfig) -> Method:
    """Returns the method of a trained hypernetwork."""

    def tables(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
        del key
        pieces_VP = jnp.asarray(pieces(source, vocabulary, config.pieces))
        predict = jax.jit(hypernetwork.predict, static_argnums=1)
        return predict(weights, config, source.params['tables'], pieces_VP)

    return tables


def add_task(fine_tuned: Params, transferred: Params, base: Params, weight: float) -> Params:
    """Returns a fine-tuned variant of `base`, moved to the tokenizer of `transferred`.

    Its tables are those of `transferred`, and its body is

        fine_tuned + weight * (transferred - base)

    so that training after the transfer carries over (task arithmetic, Ilharco et al. 2023; ZeTT,
    section 5, uses weights up to 0.7).

    Args:
      fine_tuned, base: models with the old tokenizer.
      transferred: the base with new tables, with or without further training.
      weight: 0 keeps the fine-tuned body.
    """

    def add(own, after, before):
        difference = after.astype(jnp.float32) - before.astype(jnp.float32)
        return own + (weight * difference).astype(own.dtype)

    body = jax.tree.map(add, fine_tuned['body'], transferred['body'], base['body'])
    return {'body': body, 'tables': transferred['tables']}
