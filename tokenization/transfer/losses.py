"""What a hypernetwork is trained on: the source's own rows first, then other tokenizers' text.

Minixhofer et al. 2024 (arXiv 2405.07883), section 3.1. The body stays as it is: its parameters and
the source's tables are `frozen` (see `lm.training.train.run`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.losses import next_token as losses
from lm.losses.loss import Loss, Sum
from lm.model.config import Config
from lm.model.leaves import Params
from tokenization.transfer import hypernetwork
from tokenization.transfer.hypernetwork import HypernetworkConfig


def identity_loss(
    weights: Params,
    config: HypernetworkConfig,
    source: Params,
    batch: dict[str, jax.Array],
) -> Loss:
    """Squared distance of predicted rows to the source's: summed over D, mean over tokens.

    Reports `squared_distance_per_token`.

    Args:
      weights: of the hypernetwork.
      source: the frozen model.
      batch: `ids` int32 `[U]` of the source tokenizer.
    """
    ids_U = batch['ids']
    predicted = hypernetwork.predict(
        weights, config, source['tables'], hypernetwork.single(config, ids_U)
    )
    squared = [
        ((rows_UD - source['tables'][name][ids_U].astype(jnp.float32)) ** 2).sum(-1).mean()
        for name, rows_UD in predicted.items()
    ]
    loss = sum(squared, jnp.zeros(())) / len(squared)
    tokens = jnp.asarray(len(ids_U), jnp.float32)
    return Loss(loss, {'squared_distance_per_token': Sum(loss * tokens, tokens)})


def transfer_loss(
    weights: Params,
    config: HypernetworkConfig,
    model: Config,
    bos: int,
    auxiliary: float,
    source: Params,
    batch: dict[str, Any],
) -> Loss:
    """Loss of the frozen model in another vocabulary, plus `auxiliary` times the distance of rows.

    Reports `nats_per_token` and `auxiliary`, the distance (see `auxiliary_loss`).

    Args:
      weights: of the hypernetwork.
      model: config of the source; its vocabulary does not matter.
      bos: the source's id that starts documents.
      auxiliary: the paper has 0.5.
      source: the frozen model.
      batch: a packed batch of the other tokenizer's ids (`lm.data.batches`), and `pieces` `[V,
        P]` of its tokens, empty (-1) for BOS alone.
    """
    pieces_VP = batch['pieces']
    predicted = hypernetwork.predict(weights, config, source['tables'], pieces_VP)
    special_V1 = pieces_VP[:, :1] < 0
    tables = {
        name: jnp.where(special_V1, source['tables'][name][bos], rows_VD).astype(model.param_dtype)
        for name, rows_VD in predicted.items()
    }
    moved = dataclasses.replace(model, vocab_size=len(pieces_VP))
    loss, sums = losses.next_token_loss({'body': source['body'], 'tables': tables}, moved, batch)
    distance = auxiliary_loss(predicted, source['tables'], pieces_VP, config.vocab_size)
    return Loss(loss + auxiliary * distance, {**sums, 'auxiliary': Sum(distance, jnp.ones(()))})


def auxiliary_loss(
    predicted: Params, source: Params, pieces_VP: jax.Array, vocab_size: int
) -> jax.Array:
    """Squared distance of predicted rows to the source's, over tokens that the source has.

    A mean over the tokens that are one piece, divided by the mean norm of the rows aimed at, and
    averaged over the tables: it keeps what is common to both vocabularies in place.

    Args:
      vocab_size: ids of the source tokenizer; pieces from there on are bytes that it lacks.
    """
    same_V = (pieces_VP[:, 0] >= 0) & (pieces_VP[:, 0] < vocab_size) & (pieces_VP[:, 1] < 0)
    count = jnp.maximum(same_V.sum(), 1)
    total = jnp.zeros(())
    for name, rows_VD in predicted.items():
        aim_VD = source[name][jnp.maximum(pieces_VP[:, 0], 0) % vocab_size].astype(jnp.float32)
        squared_V = ((rows_VD - aim_VD) ** 2).sum(-1)
        norm_V = jnp.sqrt((aim_VD**2).sum(-1))
        norm = jnp.where(same_V, norm_V, 0).sum() / count
        total += jnp.where(same_V, squared_V, 0).sum() / count / jnp.maximum(norm, 1e-6)
    return total / len(predicted)
