"""Gathered rows of a table as the body's input: their sharding, dtype and scale."""

import jax

from lm.devices import mesh
from lm.model.config import Config


def laid_out(x_BLD: jax.Array) -> jax.Array:
    """Constrains gathered rows to the table's sharding: XLA then reshards one mesh axis at a time.

    Without sequence parallelism, XLA needs no such hint.
    """
    if mesh.in_use('sequence') == 1:
        return x_BLD
    return mesh.constrain(x_BLD, ('batch', None, 'embed'))


def scaled(x_BLD: jax.Array, config: Config) -> jax.Array:
    """Returns gathered rows in the body's dtype, layout and scale (`Config.scale_embeddings`)."""
    x_BLD = mesh.constrain(x_BLD.astype(config.dtype), ('batch', 'length', 'embed'))
    return x_BLD * config.d_model**0.5 if config.scale_embeddings else x_BLD
