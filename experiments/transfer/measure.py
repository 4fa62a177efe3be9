"""Bits per byte of a transferred model: zero-shot, and after a few steps of continued training."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments import language_model
from experiments.language_model import Fitted
from experiments.transfer.config import Config
from lm.data.documents import Documents
from lm.losses import next_token as losses
from lm.losses.loss import Loss, Sum
from lm.model import params
from lm.model.leaves import Params
from lm.training import train
from tokenization.tokenizer import Tokenizer
from tokenization.transfer import heuristics, transfer
from tokenization.transfer.transfer import Method, SourceModel

# Bytes of text for the auxiliary vectors of `neighbours`, and for continued training.
CONTEXT_BYTES, SHOT_BYTES = 2_000_000, 4_000_000


class Moved(NamedTuple):
    """A model with a target's tables, the `seconds` to make them, and its BOS id."""

    fitted: Fitted
    tokenizer: Tokenizer
    bos: int
    seconds: float


def methods(tokenizer: Tokenizer, documents: Sequence[bytes]) -> dict[str, Method]:
    """Returns the heuristics for a target, by name."""

    def neighbours(*arguments) -> Params:
        vectors = heuristics.context_vectors(tokenizer, documents)
        return heuristics.neighbours(vectors)(*arguments)

    return {
        'random': heuristics.random,
        'mean': heuristics.mean,
        'lexical_copy': heuristics.lexical_copy,
        'neighbours': neighbours,
        'mean_of_pieces': heuristics.mean_of_pieces,
    }


def unmoved(source: SourceModel) -> Moved:
    """Returns the source unchanged, with all rows of its tables."""
    return Moved(Fitted(source.config, source.params, 0.0), source.tokenizer, source.bos, 0.0)


def move(source: SourceModel, tokenizer: Tokenizer, method: Method, mesh: Mesh) -> Moved:
    """Returns the model with tables for a target, made by `method`."""
    vocabulary = transfer.vocabulary(source, tokenizer)
    begin = time.monotonic()
    tables = jax.block_until_ready(method(source, vocabulary, jax.random.key(0)))
    seconds = time.monotonic() - begin
    config, weights = transfer.with_tables(source, vocabulary, tables)
    weights = jax.device_put(weights, params.shardings(config, mesh))
    return Moved(Fitted(config, weights, 0.0), tokenizer, tokenizer.vocab_size, seconds)


def bits_per_byte(moved: Moved, config: Config, texts: Sequence[bytes], mesh: Mesh) -> float:
    """Returns the loss on texts, in bits per byte."""
    v = moved.tokenizer.vocab_size
    batches = language_model.evaluation(
        moved.tokenizer.encode_batch(texts), v, config.continued.batch_size,
        config.continued.length,
    ).map(functools.partial(_with_bos, v, moved.bos))  # fmt: skip
    n_bytes = sum(map(len, texts))
    return losses.bits_per_byte(language_model.nats(moved.fitted, batches, mesh), n_bytes)


def _with_bos(before: int, bos: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces the pipeline's BOS by the model's, which in an imported model is a tokenizer id."""
    tokens_BL = batch['tokens']
    return {**batch, 'tokens': np.where(tokens_BL == before, bos, tokens_BL)}


def train_on(
    moved: Moved, config: Config, steps: int, documents: Documents, folder: epath.Path,
    mesh: Mesh, label: str,
) -> Moved:  # fmt: skip
    """Continues the training of all parameters, regularising token rows towards their start."""
    run = dataclasses.replace(config.continued, steps=steps, checkpoint_every=steps)
    model, start = moved.fitted.config, moved.fitted.params
    v = moved.tokenizer.vocab_size

    def loss(weights, batch, key, tables):
        value, sums = losses.next_token_loss(weights, model, batch, run.z_loss, key)
        distance = distance_of_rows(weights['tables'], tables)
        return Loss(
            value + config.auxiliary * distance, {**sums, 'auxiliary': Sum(distance, jnp.ones(()))}
        )

    batches = language_model.training(run, documents, v).map(
        functools.partial(_with_bos, v, moved.bos)
    )
    state = train.run(
        run, lambda key: jax.tree.map(jnp.copy, start), loss, batches, folder, mesh, label,
        frozen=(start['tables'],), leaves=params.leaves(model),
    )  # fmt: skip
    return moved._replace(fitted=Fitted(model, state.params, 0.0))


def distance_of_rows(tables: Params, start: Params) -> jax.Array:
    """Returns the mean squared distance of rows from `start` over their mean norm, per table."""
    total = jnp.zeros(())
    for name, rows_VD in tables.items():
        aim_VD = start[name].astype(jnp.float32)
        squared = ((rows_VD.astype(jnp.float32) - aim_VD) ** 2).sum(-1).mean()
        total += squared / jnp.maximum(jnp.sqrt((aim_VD**2).sum(-1)).mean(), 1e-6)
    return total / len(tables)
