"""Parameters in the layout that decodes fastest on a CPU.

With few nodes per pass, reading the weights dominates, so each should be read once. XLA's CPU
backend does so only under these conditions (JAX 0.10.2, 134M parameters in f32, 2 cores):

- Each layer's matrices are separate arrays. A scan over stacked layers copies every slice before
  multiplying by it.
- The weights come first, `w[O, I] @ x[I, B]`. With several columns, `x[B, I] @ w[I, O]` and
  `x[B, I] @ w[O, I].T` take two to three times as long; with one column there is no difference.
- Products are few, since the cores synchronise after each. Matrices that multiply the same vectors
  are concatenated.

`prepare` returns parameters in that layout. They are accepted wherever parameters are
(`lm.model.transformer`); the compiled program then unrolls the layers.
"""

import itertools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.model.config import Config
from lm.model.leaves import Params

# Matrices of a layer that multiply the same vectors, and how many of their axes are contracted.
PRODUCTS = (
    (('wq_NDHC', 'wk_NDKC', 'wv_NDKC'), 1),
    (('wo_NHCD',), 2),
    (('w_gate_NDF', 'w_up_NDF'), 1),
    (('w_down_NFD',), 1),
)


@flax.struct.dataclass
class WeightsFirst:
    """Matrices that multiply the same vectors, concatenated, with a row per output.

    Attributes:
      w_ED: outputs by inputs, each flattened in the order of its axes.
      outputs: for each matrix, the sizes of its output axes.
    """

    w_ED: jax.Array
    outputs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


def join(names: tuple[str, ...]) -> str:
    """Returns the joint name of matrices in a prepared layer."""
    return '+'.join(names)


def products(x: jax.Array, weights: WeightsFirst, out: DTypeLike | None = None) -> list[jax.Array]:
    """Contracts the last axes of `x` with the inputs; returns `[..., *outputs]` per matrix."""
    w_ED = weights.w_ED.astype(x.dtype)
    contracted = 0
    while math.prod(x.shape[x.ndim - contracted :]) < w_ED.shape[1]:
        contracted += 1
    x_BD = x.reshape(-1, w_ED.shape[1])
    # Without the barriers XLA folds the transpositions into a product with the weights last.
    x_DB = jax.lax.optimization_barrier(x_BD.T)
    out_EB = jnp.matmul(
        w_ED, x_DB, preferred_element_type=out or x.dtype,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )  # fmt: skip
    out_BE = jax.lax.optimization_barrier(out_EB).T
    ends = list(itertools.accumulate(math.prod(axes) for axes in weights.outputs))
    parts = jnp.split(out_BE, ends[:-1], axis=1)
    batch = x.shape[: x.ndim - contracted]
    return [part.reshape(*batch, *axes) for part, axes in zip(parts, weights.outputs)]


def prepare(params: Params, config: Config) -> Params:
    """Returns a copy for decoding, in the config's dtype: a tuple of layers, laid out as above.

    Token tables are not copied.
    """
    stacked = params['body']['layers']
    layers = tuple(_layer(stacked, i, config) for i in range(config.n_layers))
    tables = params['tables']
    if config.learned_tables and config.codebooks == 1:
        table_VD = tables.get('output_VD', tables['input_VD'])
        tables = {**tables, 'output_VD': WeightsFirst(table_VD, (table_VD.shape[:1],))}
    return {'body': {**params['body'], 'layers': layers}, 'tables': tables}


def is_prepared(params: Params) -> bool:
    """Returns whether parameters come from `prepare`."""
    return isinstance(params['body']['layers'], tuple)


def _layer(stacked: Params, i: int, config: Config) -> Params:
    layer = {name: leaf[i] for name, leaf in stacked.items()}
    for names, contracted in PRODUCTS:
        matrices = [layer.pop(name) for name in names]
        outputs = tuple(w.shape[contracted:] for w in matrices)
        inputs = math.prod(matrices[0].shape[:contracted])
        rows = [w.reshape(inputs, -1).T.astype(config.dtype) for w in matrices]
        layer[join(names)] = WeightsFirst(jnp.concatenate(rows), outputs)
    return layer
