"""Initialises attention as induction heads, for models whose symbols have no learned embedding.

If the rows of token tables are drawn at random for each text, weights can only use whether two
symbols are equal. Such a model first has to learn the induction head (Olsson et al. 2022, arXiv
2209.11895): a head that attends to the previous token, and a head of a later layer that finds an
earlier occurrence of the current token and copies the token after it. Initialising weights near the
structure that training would find saves steps (mimetic initialisation, Trockman & Kolter 2023,
arXiv 2305.09828). Applying it to these two heads is ours.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lm.model import rope
from lm.model.config import Config

# Attention logit of the previous token above those of its neighbours, in nats.
_LEAD = 6.0
# Later layers together write this many times the magnitude of what they read: the copied token must
# outweigh the current one.
_GAIN = 5.0


def begin(layers: dict[str, Any], config: Config) -> dict[str, Any]:
    """Returns a model's initial layers with their attention weights replaced.

    Each output matrix is the transpose of its value matrix, so that a layer writes what it reads.
    The first layer attends to the previous token, whatever the symbols, and writes each channel
    into the next channel, to separate the previous token from the current one. Keys of later layers
    read the shifted channels; otherwise they equal the queries of their group's first head.

    Args:
      layers: initial values of at least two stacked layers, with biases of queries and keys.
      config: of the model.
    """
    group, later = config.n_heads // config.n_kv_heads, config.n_layers - 1
    wk_NDKC = jnp.roll(layers['wq_NDHC'][:, :, ::group], 1, axis=1).at[0].set(0)
    wo_NHCD = jnp.einsum('ndhc->nhcd', jnp.repeat(layers['wv_NDKC'], group, axis=2))
    wo_NHCD = wo_NHCD.at[1:].multiply(_GAIN / later).at[0].set(jnp.roll(wo_NHCD[0], 1, axis=-1))
    biases = {
        name: jnp.zeros_like(layers[name]).at[0].set(bias_C.astype(layers[name].dtype))
        for name, bias_C in zip(('bq_NHC', 'bk_NKC'), _looking_back(config))
    }
    return {**layers, 'wk_NDKC': wk_NDKC, 'wo_NHCD': wo_NHCD, **biases}


def _looking_back(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns biases of queries and keys, `[C]`, whose product under RoPE peaks at distance 1.

    With few channels the fast frequencies realign: at C = 16 there is a second peak at distance
    378, 2.5 nats below the first.
    """
    frequency = rope.frequencies(config)[0]
    fast = np.arange(len(frequency)) < len(frequency) / 2  # slow ones hardly distinguish neighbours
    fall = config.query_scale * np.sum((1 - np.cos(frequency)) * fast)
    key = np.where(fast, np.sqrt(_LEAD / fall), 0.0)
    # rotated back by one position, to align with the key of the previous token
    query = np.concatenate([key * np.cos(frequency), -key * np.sin(frequency)])
    return query, np.concatenate([key, np.zeros_like(key)])
