"""What stands before and after the body: token tables, as pure functions of a nested dict.

input_VD               learned; the output's as well, unless there is another
output_VD              learned, of untied models
input_BVD              one table per sequence (`lm.model.lexinvariant.draw`)
input_VD, row_BV       one table for all, in which each sequence has rows of its own
"""

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.model import layers
from lm.model.config import Config
from lm.model.params import Params


def embed(tables: Params, config: Config, tokens_BL: jax.Array) -> jax.Array:
    """Returns the vectors of tokens, `[B, L, D]`.

    Raises:
      ValueError: the model's tables are drawn per sequence, and have not been.
    """
    if not tables:
        raise ValueError(
            'this model has no learned table: draw one per sequence (lexinvariant.drawn_for)'
        )
    if 'row_BV' in tables:
        tokens_BL = jnp.take_along_axis(tables['row_BV'], tokens_BL, axis=1)
    if 'input_BVD' in tables:
        x_BLD = tables['input_BVD'][jnp.arange(tokens_BL.shape[0])[:, None], tokens_BL]
    else:
        x_BLD = tables['input_VD'][tokens_BL]
    return scaled(laid_out(x_BLD.astype(config.dtype)), config)


def laid_out(x_BLD: jax.Array) -> jax.Array:
    """Returns rows of a table, one per token, on their way to where the tokens are.

    As cut as the table's rows: exchanged over one axis of the mesh, and then over the other. Where
    sequences are whole, the compiler needs no help.
    """
    if mesh.in_use('sequence') == 1:
        return x_BLD
    return mesh.constrain(x_BLD, ('batch', None, 'embed'))


def scaled(x_BLD: jax.Array, config: Config) -> jax.Array:
    """Returns rows of a table as the body wants them: in its dtype, and at its scale."""
    x_BLD = mesh.constrain(x_BLD.astype(config.dtype), ('batch', 'length', 'embed'))
    return x_BLD * config.d_model**0.5 if config.scale_embeddings else x_BLD


def output_table(tables: Params) -> jax.Array:
    """Returns the table whose rows meet hidden states in the logits, `[V, D]`."""
    return tables['output_VD'] if 'output_VD' in tables else tables['input_VD']


def unembed(tables: Params, config: Config, h_BLD: jax.Array) -> jax.Array:
    """Returns logits, f32 `[B, ..., V]`, of hidden states `[B, ..., D]`."""
    if 'input_BVD' in tables:
        logits = layers.einsum('b...d,bvd->b...v', h_BLD, tables['input_BVD'], jnp.float32)
    else:
        logits = layers.einsum('...d,vd->...v', h_BLD, output_table(tables), jnp.float32)
    if 'row_BV' in tables:
        row_BV = tables['row_BV']
        between = (1,) * (logits.ndim - 2)
        logits = jnp.take_along_axis(logits, row_BV.reshape(len(row_BV), *between, -1), axis=-1)
    return layers.softcap(logits, config.logit_softcap)
