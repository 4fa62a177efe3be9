"""Losses as functions of hidden states, never of all logits at once."""

import math

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.losses import drawn_cross_entropy
from lm.losses.cross_entropy import TokenLosses, chunked_cross_entropy
from lm.model import lexinvariant, tables, transformer
from lm.model.config import Config
from lm.model.contract import Nodes
from lm.model.params import Params


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Returns a summed loss over a text in bits per byte of that text, whatever its tokens."""
    return nats / math.log(2) / n_bytes


def token_losses(
    params: Params, config: Config, batch: dict[str, jax.Array], key: jax.Array | None = None
) -> TokenLosses:
    """Returns the losses of each target of a packed batch, f32 `[B, L]`.

    Args:
      params, config: the model.
      batch: see `lm.data.documents`.
      key: from which a lexinvariant model's tables are drawn; others need none.
    """
    if config.lexinvariant is not None and config.lexinvariant.draws:
        if key is None:
            raise ValueError('the tables of this model are drawn: give a key')
        return _lexinvariant_losses(params, config, batch, key)
    x_BLD = tables.embed(params['tables'], config, batch['tokens'])
    h_BLD = _hidden(params, config, x_BLD, batch)
    return _against(tables.output_table(params['tables']), config, h_BLD, batch['targets'])


def _lexinvariant_losses(
    params: Params, config: Config, batch: dict[str, jax.Array], key: jax.Array
) -> TokenLosses:
    law, segments_BL = config.lexinvariant, batch['segments']
    assert law is not None
    tokens_BL, targets_BL = batch['tokens'], batch['targets']
    key_B = lexinvariant.sequence_keys(key, len(tokens_BL))
    if law.kind == 'permuted' and not law.partial:
        # one table for all: after renaming, the loss is a learned model's, without its gradient
        tokens_BL, targets_BL = lexinvariant.relabel(
            config, key_B, segments_BL, tokens_BL, targets_BL
        )
        table_VD = lexinvariant.fixed_table(config, jnp.arange(config.vocab_size))
        x_BLD = tables.embed({'input_VD': table_VD}, config, tokens_BL)
        return _against(table_VD, config, _hidden(params, config, x_BLD, batch), targets_BL)
    learned = params['tables']
    x_BLD = lexinvariant.embed(learned, config, key_B, segments_BL, tokens_BL)
    h_BLD = _hidden(params, config, x_BLD, batch)
    return drawn_cross_entropy.cross_entropy(
        config, h_BLD, learned.get('input_VD'), key_B, segments_BL, targets_BL
    )


def _hidden(
    params: Params, config: Config, x_BLD: jax.Array, batch: dict[str, jax.Array]
) -> jax.Array:
    nodes = Nodes(None, batch['positions'], x_BTD=x_BLD)
    return transformer.read(params, config, nodes, batch['segments']).h_BTD


def _against(
    table_VD: jax.Array, config: Config, h_BLD: jax.Array, targets_BL: jax.Array
) -> TokenLosses:
    if mesh.in_use('sequence') > 1:
        return chunked_cross_entropy(h_BLD, table_VD, targets_BL, config.logit_softcap)
    losses = chunked_cross_entropy(
        h_BLD.reshape(-1, config.d_model), table_VD, targets_BL.reshape(-1), config.logit_softcap
    )
    return TokenLosses(*(x.reshape(targets_BL.shape) for x in losses))


def next_token_loss(
    params: Params, config: Config, batch: dict[str, jax.Array], z_loss: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Returns the weighted mean loss in nats per token, and sums for metrics.

    `z_loss` times the squared log normaliser is added (PaLM, section 5): it keeps logits from
    drifting. `key`: see `token_losses`.
    """
    losses = token_losses(params, config, batch, key)
    weights = batch['weights']
    total = jnp.maximum(weights.sum(), 1.0)
    nats = (losses.nats * weights).sum()
    penalty = z_loss * (losses.log_normalizer**2 * weights).sum()
    return (nats + penalty) / total, {'nats': nats, 'tokens': weights.sum()}
