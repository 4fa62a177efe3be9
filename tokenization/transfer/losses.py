"""The losses of a hypernetwork: first the source's own rows, then text of other tokenizers.

Minixhofer et al. 2024 (arXiv 2405.07883), section 3.1. The source model, body and tables, is
`frozen` (see `lm.training.train.run`).
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
    """Squared distance of predicted rows r_t to the source's rows s_t, a mean over tables of

        1/U sum_t |r_t - s_t|^2

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
    """Loss of the frozen model with the predicted tables, plus `auxiliary` times `auxiliary_loss`.

    Reports `nats_per_token` and `auxiliary`, the distance (see `auxiliary_loss`).

    Args:
      weights: of the hypernetwork.
      model: config of the source; its `vocab_size` is ignored.
      bos: the source's id that starts documents.
      auxiliary: weight of the auxiliary loss; 0.5 in the paper.
      source: the frozen model.
      batch: a packed batch of the other tokenizer's ids (`lm.data.batches`), and `pieces`
        `[V, P]` of its tokens, all -1 for BOS.
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
    """Squared distance of predicted rows to the source's, relative to the norm of the latter.

    Over the tokens S that the source has (those of one piece), with predicted rows r and the
    source's rows s, a mean over tables of

        (mean_S |r_t - s_t|^2) / (mean_S |s_t|)

    It keeps the rows of tokens that both vocabularies share in place. For example, one shared token
    of row s = (3, 4) that is predicted as (3, 3) gives 1 / 5:

    >>> predicted = {'input_VD': jnp.array([[3.0, 3.0]])}
    >>> source = {'input_VD': jnp.array([[3.0, 4.0]])}
    >>> pieces_VP = jnp.array([[0, -1]])
    >>> round(float(auxiliary_loss(predicted, source, pieces_VP, vocab_size=1)), 4)
    0.2

    Args:
      vocab_size: number of ids of the source tokenizer; further pieces are bytes without an id.
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
