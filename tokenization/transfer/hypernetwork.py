"""A network that predicts a token's rows in a model's tables from its pieces in the old vocabulary.

Minixhofer, Ponti and Vulic 2024, Zero-Shot Tokenizer Transfer (arXiv 2405.07883), section 3:

    pieces_UP  --source rows-->  x_UPD  --encoder-->  h_UD  --head-->  rows of the input table
                                                           \\--head-->  rows of the output table

A row depends on its own pieces and on the source tables, on nothing else: a vocabulary may be
predicted in any chunks and in any order.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.checkpoints.architecture import Architecture
from lm.devices import mesh
from lm.files import dataclass_json
from lm.model import layers, params, transformer
from lm.model.config import Config
from lm.model.params import Leaf, Params

TABLES = ('input_VD', 'output_VD')
ANCHORS = 2048


@dataclasses.dataclass(frozen=True)
class HypernetworkConfig:
    """The shape of a hypernetwork.

    Attributes:
      vocab_size: ids of the source tokenizer. Piece `vocab_size + b` is the byte b where no id
        stands for it, and has a learned row of its own.
      d_model: width of the source model's tables, and of the hypernetwork (D).
      tied: whether the source model has one table for both ends; then there is one head.
      n_layers, head_dim: of the encoder.
      d_ff: its hidden width, and that of the projections; 0 means `2 * d_model`.
      pieces: read of a token, the first ones (P).
      residual: the mean of the pieces' rows is added before the rescalers, and the heads start at
        zero. A hypernetwork then starts as that heuristic (FVT); the paper's does not.
      chunk: tokens predicted at once, always so many; the memory of activations follows it.
      dtype: of the computation.
    """

    vocab_size: int = 1
    d_model: int = 64
    tied: bool = False
    n_layers: int = 3
    head_dim: int = 64
    d_ff: int = 0
    pieces: int = 7
    residual: bool = False
    chunk: int = 512
    dtype: str = 'float32'

    def __post_init__(self):
        for name in ('vocab_size', 'd_model', 'n_layers', 'head_dim', 'chunk'):
            if getattr(self, name) < 1:
                raise ValueError(
                    f'HypernetworkConfig.{name}: {getattr(self, name)}; expected at least 1'
                )
        if self.pieces < 2:
            # of one alone, a longer token could not be told from its first piece
            raise ValueError(f'HypernetworkConfig.pieces: {self.pieces}; expected at least 2')
        if self.d_ff < 0:
            raise ValueError(f'HypernetworkConfig.d_ff: {self.d_ff}; expected 0 or more')
        _ = self.encoder  # refuses a head_dim or a dtype that no encoder can have

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that are predicted."""
        return TABLES[:1] if self.tied else TABLES

    @property
    def encoder(self) -> Config:
        """The encoder as a model of `lm`: its body is all that is used of it."""
        heads = max(self.d_model // self.head_dim, 1)
        return Config(
            1, self.d_model, self.n_layers, heads, heads, min(self.head_dim, self.d_model),
            self.d_ff or 2 * self.d_model, max_length=self.pieces, activation='gelu_tanh',
            tied=True, dtype=self.dtype, unroll=self.n_layers,
        )  # fmt: skip


def for_model(config: HypernetworkConfig, model: Config, vocab_size: int) -> HypernetworkConfig:
    """Returns the config made to fit a model whose tokenizer has `vocab_size` ids.

    Raises:
      ValueError: the model's tables are drawn per sequence, or have fewer rows than that.
    """
    if model.lexinvariant is not None:
        raise ValueError('a model without learned tables has no rows to predict others from')
    if model.vocab_size < vocab_size:
        raise ValueError(
            f'the tokenizer has {vocab_size} ids, the model rows for {model.vocab_size}: they do '
            'not belong together'
        )
    return dataclasses.replace(
        config, vocab_size=vocab_size, d_model=model.d_model, tied=model.tied, dtype=model.dtype
    )


def leaves(config: HypernetworkConfig) -> dict[str, Any]:
    """Returns the nested dict of `Leaf`s of a hypernetwork (see `lm.model.params`)."""
    d, f = config.d_model, config.encoder.d_ff
    wide = d * len(config.tables)

    def projector() -> dict[str, Leaf]:
        return {
            'w_up_DF': Leaf((d, f), ('embed', 'ff'), d**-0.5),
            'w_down_FD': Leaf((f, d), ('ff', 'embed'), f**-0.5),
            'norm_D': Leaf((d,), ('norm',), None, 1.0),
        }

    def head() -> dict[str, Any]:
        return {
            'projector': projector(),
            'w_out_DD': Leaf((d, d), ('embed', 'ff'), None if config.residual else d**-0.5),
            'scale_D': Leaf((d,), ('norm',), None, 1.0),
            'shift_D': Leaf((d,), ('norm',), None),
        }

    return {
        'source_mean_E': Leaf((wide,), ('norm',), None),
        'source_deviation_E': Leaf((wide,), ('norm',), None, 1.0),
        'fallback_256E': Leaf((256, wide), ('vocab', 'embed'), 1.0),
        'w_project_ED': Leaf((wide, d), ('embed', 'ff'), wide**-0.5),
        'projector': projector(),
        'encoder': params.leaves(config.encoder)['body'],
        'heads': {name: head() for name in config.tables},
    }


# Reads tables, not ids: a bundle of it has no BOS.
ARCHITECTURE = Architecture(
    'hypernetwork',
    dataclasses.asdict,
    lambda fields: dataclass_json.read(HypernetworkConfig, fields, 'hypernetwork config'),
    leaves,
)


def init(config: HypernetworkConfig, source: Params, key: jax.Array) -> Params:
    """Returns initial parameters, rescaled to the source.

    Predictions of tokens that the source has (up to 2,048 of them, the anchors) then have the
    same mean and deviation in each dimension as the source's own rows.

    Args:
      source: the model's tables.
    """
    tree = leaves(config)
    start = params.initial(tree, 'float32', key)
    anchors_U = np.random.default_rng(0).permutation(config.vocab_size)[:ANCHORS]
    rows_UE = _joined(config, source, anchors_U)
    start['source_mean_E'] = rows_UE.mean(0)
    start['source_deviation_E'] = jnp.maximum(rows_UE.std(0), 1e-6)
    predicted = predict(start, config, source, single(config, anchors_U))
    for name in config.tables:
        target_UD, from_UD = source[name][anchors_U].astype(jnp.float32), predicted[name]
        scale_D = target_UD.std(0) / jnp.maximum(from_UD.std(0), 1e-6)
        head = start['heads'][name]
        start['heads'][name] = {
            **head, 'scale_D': scale_D, 'shift_D': target_UD.mean(0) - scale_D * from_UD.mean(0)
        }  # fmt: skip
    return start


def single(config: HypernetworkConfig, ids_U: Any) -> jax.Array:
    """Returns the pieces `[U, P]` of tokens that the source has: themselves."""
    ids_U = jnp.asarray(ids_U, jnp.int32)
    return jnp.pad(ids_U[:, None], ((0, 0), (0, config.pieces - 1)), constant_values=-1)


def read(weights: Params, config: HypernetworkConfig, source: Params) -> jax.Array:
    """Returns the source's rows as the encoder reads them, `[vocab_size + 256, D]`.

    Once per source and weights: a vocabulary has the same pieces again and again. The last 256
    rows are those of bytes that the source lacks.
    """
    own_VE = _standardised(weights, _joined(config, source, slice(config.vocab_size)))
    x_VE = jnp.concatenate([own_VE, weights['fallback_256E']]).astype(config.dtype)
    return _project(weights['projector'], layers.einsum('ve,ed->vd', x_VE, weights['w_project_ED']))


def predict(
    weights: Params,
    config: HypernetworkConfig,
    source: Params,
    pieces_UP: jax.Array,
    read_VD: jax.Array | None = None,
) -> Params:
    """Returns the rows of U tokens: `input_VD` and, of untied models, `output_VD`; f32 `[U, D]`.

    Works on `config.chunk` tokens at a time, so that memory does not grow with U, and recomputes
    them for a gradient. Each row is the same to the bit whatever tokens stand beside it, in
    however many calls a vocabulary is predicted: of one jitted function, which has the weights and
    the source as arguments. What the compiler knows as constants it may sum in another order.

    Args:
      weights: of the hypernetwork.
      source: the model's tables.
      pieces_UP: int32 ids of the source tokenizer, `vocab_size + byte` for a byte that it lacks,
        padded with -1 at the end. A token without pieces gets rows that mean nothing.
      read_VD: what `read` returned, for many calls with the same weights.
    """
    u, chunk = len(pieces_UP), config.chunk
    n = math.ceil(u / chunk)
    # a short chunk is filled up: matrices of other sizes would be summed in another order
    padded = jnp.pad(pieces_UP, ((0, n * chunk - u), (0, 0)), constant_values=-1)
    read_VD = read(weights, config, source) if read_VD is None else read_VD

    def step(pieces_UP):
        pieces_UP = mesh.constrain(pieces_UP, ('batch', 'length'))
        return _predict_chunk(weights, config, source, read_VD, pieces_UP)

    rows = jax.lax.map(
        jax.checkpoint(step) if n > 1 else step, padded.reshape(n, chunk, config.pieces)
    )
    return {name: x.reshape(n * chunk, config.d_model)[:u] for name, x in rows.items()}


def _predict_chunk(weights, config: HypernetworkConfig, source, read_VD, pieces_UP) -> Params:
    real_UP = pieces_UP >= 0
    positions_UP = jnp.broadcast_to(jnp.arange(pieces_UP.shape[1]), pieces_UP.shape)
    x_UPD = mesh.constrain(read_VD[pieces_UP * real_UP], transformer.ACTIVATIONS)
    h_UPD, _ = transformer.body(
        weights['encoder'], config.encoder, x_UPD, positions_UP,
        segments_BL=real_UP.astype(jnp.int32), causal=False,
    )  # fmt: skip
    result = {}
    for name, mean_UD in zip(config.tables, _means(weights, config, source, pieces_UP)):
        p = weights['heads'][name]
        h_UD = mesh.constrain(_project(p['projector'], h_UPD[:, 0]), ('batch', 'embed'))
        row_UD = layers.einsum('ud,de->ue', h_UD, p['w_out_DD'], jnp.float32)
        row_UD = row_UD + mean_UD if config.residual else row_UD
        row_UD = mesh.constrain(row_UD * p['scale_D'] + p['shift_D'], ('batch', 'embed'))
        result[name] = row_UD
    return result


def _means(weights, config: HypernetworkConfig, source, pieces_UP) -> list[jax.Array]:
    """Returns the mean of the pieces' standardised rows in each table, f32 `[U, D]`."""
    real_UP1 = (pieces_UP >= 0)[..., None]
    known_UP = jnp.clip(pieces_UP, 0, config.vocab_size - 1)
    rows_UPE = _standardised(weights, _joined(config, source, known_UP))
    lacks_UP1 = (pieces_UP >= config.vocab_size)[..., None]
    byte_UP = jnp.clip(pieces_UP - config.vocab_size, 0, 255)
    rows_UPE = jnp.where(lacks_UP1, weights['fallback_256E'][byte_UP], rows_UPE)
    rows_UPE = mesh.constrain(rows_UPE, transformer.ACTIVATIONS)
    mean_UE = (rows_UPE * real_UP1).sum(1) / jnp.maximum(real_UP1.sum(1), 1)
    return jnp.split(mean_UE, len(config.tables), axis=-1)


def _joined(config: HypernetworkConfig, source: Params, at: Any) -> jax.Array:
    """Returns some rows of all tables, side by side, f32 `[..., E]`."""
    rows = [source[name][at].astype(jnp.float32) for name in config.tables]
    return jnp.concatenate(rows, axis=-1)


def _standardised(weights: Params, rows_E: jax.Array) -> jax.Array:
    mean_E, deviation_E = (weights[f'source_{name}_E'] for name in ('mean', 'deviation'))
    return (rows_E - jax.lax.stop_gradient(mean_E)) / jax.lax.stop_gradient(deviation_E)


def _project(p: Params, x: jax.Array) -> jax.Array:
    """Returns `norm(x + gelu(W2 gelu(W1 x)))`."""
    y = jax.nn.gelu(layers.einsum('...d,df->...f', x, p['w_up_DF']))
    y = jax.nn.gelu(layers.einsum('...f,fd->...d', y, p['w_down_FD']))
    return layers.rms_norm(x + y, p['norm_D'], 1e-6, False)
