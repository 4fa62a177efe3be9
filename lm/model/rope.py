"""Rotary position embeddings (Su et al. 2021): a config's frequencies, and the rotation.

The pair (x_c, x_{c + C/2}) at position p is rotated by the angle p * theta^(-2c / C), so that q . k
depends on the distance of two positions alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.config import Config, RopeScaling


def frequencies(config: Config) -> np.ndarray:
    """Returns radians per position for each layer, f32 `[N, C/2]`."""
    rows = []
    for windowed in config.windowed_layers:
        local = windowed and config.local_rope_theta is not None
        theta = config.local_rope_theta if local else config.rope_theta
        row = theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)  # type: ignore[operator]
        if config.rope_scaling is not None and not local:
            row = _scaled(row, config.rope_scaling)
        rows.append(row)
    return np.asarray(rows, np.float32)


def rotate(x_BLHC: jax.Array, positions_BL: jax.Array, frequency: jax.Array) -> jax.Array:
    """Rotates channel pairs (c, c + C/2) by `position * frequency`, in f32.

    Args:
      x_BLHC: queries or keys, head axis third.
      positions_BL: int32.
      frequency: of one layer, f32 `[C/2]`.
    """
    angle = positions_BL[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHC.dtype)


def _scaled(row: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    slow = row / scaling.factor
    if scaling.kind == 'linear':
        return slow
    # number of turns over the trained length; fast channels keep their frequency
    turns = scaling.original_length * row / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return slow * (1 - keep) + row * keep
