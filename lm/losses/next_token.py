"""Next-token losses of packed batches, without materialised logits `[B, L, V]`.

For tokens t with weights w_t, hidden states h_t and targets y_t,

    loss = sum_t w_t (-log p(y_t | h_t) + z_loss * log_normalizer_t^2) / sum_t w_t
"""

import math

import jax
import jax.numpy as jnp

from lm.losses import cross_entropy, drawn_cross_entropy
from lm.losses.loss import Loss, Sum
from lm.losses.online_softmax import TokenLosses
from lm.model import tables, transformer
from lm.model.config import Config
from lm.model.contract import Nodes
from lm.model.leaves import Params
from lm.model.tables import BatchTables


def next_token_loss(
    params: Params, config: Config, batch: dict[str, jax.Array], z_loss: float = 0.0,
    key: jax.Array | None = None,
) -> Loss:  # fmt: skip
    """Returns the weighted mean loss in nats per token; reports `nats_per_token`.

    With several codebooks the losses of a token's Q ids are summed, and `nats_per_token/codebook=q`
    is reported for each as well.

    Args:
      params, config: the model.
      batch: packed, as `lm.data.batches` makes it.
      z_loss: weight of the squared log normaliser, which keeps logits from drifting (PaLM,
        Chowdhery et al. 2022, section 5).
      key: see `token_losses`.
    """
    losses = token_losses(params, config, batch, key)
    weights_BL = batch['weights']
    count = weights_BL.sum()
    sums = {}
    if config.codebooks > 1:
        nats_Q = (losses.nats * weights_BL[..., None]).sum((0, 1))
        sums = {f'nats_per_token/codebook={q}': Sum(nats, count) for q, nats in enumerate(nats_Q)}
        squared_BL = (losses.log_normalizer**2).sum(-1)
        nats = nats_Q.sum()
    else:
        squared_BL = losses.log_normalizer**2
        nats = (losses.nats * weights_BL).sum()
    penalty = z_loss * (squared_BL * weights_BL).sum()
    value = (nats + penalty) / jnp.maximum(count, 1.0)
    return Loss(value, {'nats_per_token': Sum(nats, count), **sums})


def token_losses(
    params: Params, config: Config, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> TokenLosses:
    """Returns the losses of a packed batch's targets, f32 `[B, L]`, or `[B, L, Q]` with codebooks.

    Args:
      params, config: the model.
      batch: as `lm.data.batches` makes it: `tokens`, `targets`, `positions` and `segments`.
      key: for drawing tables; models with learned tables need none.

    Raises:
      ValueError: the model's tables are drawn, and there is no key.
    """
    own = tables.for_batch(params['tables'], config, batch, key)
    h_BLD = _hidden(params, config, own, batch)
    if own.key_B is not None:
        return drawn_cross_entropy.cross_entropy(
            config, h_BLD, own.tables.get('input_VD'), own.key_B, batch['segments'], own.targets_BL
        )
    table = tables.output_table(own.tables)
    if config.codebooks == 1:
        return cross_entropy.table_losses(h_BLD, table, own.targets_BL, config.logit_softcap)
    each = [
        cross_entropy.table_losses(h_BLD, table_VD, own.targets_BL[..., q], config.logit_softcap)
        for q, table_VD in enumerate(table)
    ]
    return TokenLosses(*(jnp.stack(x, -1) for x in zip(*each)))


def hidden(
    params: Params, config: Config, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> jax.Array:
    """Returns the hidden states of a packed batch, `[B, L, D]`, ready for the output table.

    Arguments are those of `token_losses`; no targets are needed.
    """
    return _hidden(params, config, tables.for_batch(params['tables'], config, batch, key), batch)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Returns a text's summed loss in bits per byte, for any tokenization.

    >>> round(bits_per_byte(1000 * math.log(256), 1000), 6)  # uniform over bytes
    8.0
    """
    return nats / math.log(2) / n_bytes


def _hidden(
    params: Params, config: Config, own: BatchTables, batch: dict[str, jax.Array]
) -> jax.Array:
    x_BLD = tables.embed_batch(own, config, batch['segments'])
    nodes = Nodes(None, batch['positions'], x_BTD=x_BLD)
    return transformer.read(params, config, nodes, batch['segments']).h_BTD
