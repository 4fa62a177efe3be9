"""Initial values for attention over symbols of which weights can know only whether they are alike.

The rows of drawn tables (`lm.model.lexinvariant`) look the same from every side, so that all a
weight matrix can use of two symbols is whether they are one. What such a model has to find before
anything else is the induction head (Olsson et al. 2022, arXiv 2209.11895): a head that looks at the
token before, and one in a later layer that looks up what followed an earlier token like this one.
Models that begin near what they would find need fewer steps (mimetic initialisation, Trockman &
Kolter 2023, arXiv 2305.09828); that they begin with these two heads is ours.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lm.model import rope
from lm.model.config import Config

# By so much the logit of the token before leads those of its neighbours, in nats.
_LEAD = 6.0
# So many times as large as what they have read is what later layers write, together: a token must
# not be drowned out by the one it follows.
_GAIN = 5.0


def begin(layers: dict[str, Any], config: Config) -> dict[str, Any]:
    """Returns a model's initial layers, attention being set.

    Outputs are those of the values, transposed, so that a layer writes what it reads. The first
    looks back one token, whatever the symbols, and writes each channel into the next one: there
    the token before is told from the token itself. The keys of later layers read it from there;
    else they equal their queries (of each group's first head).

    Args:
      layers: initial values of the stacked layers, two at least, with biases of queries and keys.
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
    """Returns biases of queries and keys, `[C]`, that RoPE turns into a peak at distance 1.

    Of few channels, the fast ones meet again: at C = 16 there is a second peak 378 tokens away, 2.5
    nats below the first.
    """
    frequency = rope.frequencies(config)[0]
    fast = np.arange(len(frequency)) < len(frequency) / 2  # slow ones hardly tell neighbours apart
    fall = config.query_scale * np.sum((1 - np.cos(frequency)) * fast)
    key = np.where(fast, np.sqrt(_LEAD / fall), 0.0)
    # turned back by one position, so that they meet the key of the token before
    query = np.concatenate([key * np.cos(frequency), -key * np.sin(frequency)])
    return query, np.concatenate([key, np.zeros_like(key)])
