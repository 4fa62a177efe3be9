"""A hypernetwork that predicts a token's table rows from its pieces in the old vocabulary.

Minixhofer, Ponti and Vulic 2024, Zero-Shot Tokenizer Transfer (arXiv 2405.07883), section 3:

    pieces_UP  --source rows-->  x_UPD  --encoder-->  h_UD  --head-->  rows of the input table
                                                           \\--head-->  rows of the output table

With s the source's standardised rows, both tables side by side, a token of pieces 1 ... n gets in
each table

    h   = encoder(project(s_1 W), ..., project(s_n W))_1       project(x) = norm(x + ff(x))
    row = scale * (project(h) W_out + [residual] mean(s_1, ..., s_n)) + shift

A row depends only on its own pieces and the source's tables, so a vocabulary may be predicted in
any chunks and in any order.
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
from lm.model import leaves as leaves_lib
from lm.model.config import Config
from lm.model.contract import Nodes
from lm.model.leaves import Leaf, Params, matrix

TABLES = ('input_VD', 'output_VD')
ANCHORS = 2048


@dataclasses.dataclass(frozen=True)
class HypernetworkConfig:
    """The shape of a hypernetwork.

    Attributes:
      vocab_size: number of ids of the source tokenizer. Piece `vocab_size + b` is a byte b without
        an id, and has a learned fallback row.
      d_model: width of the source model's tables, and of the hypernetwork (D).
      tied: whether the source model has one table for input and output; then there is one head.
      n_layers, head_dim: of the encoder.
      d_ff: hidden width of the encoder and of the projections; 0 means `2 * d_model`.
      pieces: number of pieces read per token, from the first (P).
      residual: whether the mean of the pieces' rows is added before rescaling, with heads that
        start at zero. A hypernetwork then starts as the heuristic `mean_of_pieces` (FVT); the
        paper's does not.
      chunk: tokens predicted at once, a fixed number that bounds the memory of activations.
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
            # With one, a longer token would equal its first piece.
            raise ValueError(f'HypernetworkConfig.pieces: {self.pieces}; expected at least 2')
        if self.d_ff < 0:
            raise ValueError(f'HypernetworkConfig.d_ff: {self.d_ff}; expected 0 or more')
        _ = self.encoder  # refuses a head_dim or a dtype that no encoder can have

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the predicted tables."""
        return TABLES[:1] if self.tied else TABLES

    @property
    def encoder(self) -> Config:
        """The encoder's config as a model of `lm`, of which only the body is used."""
        heads = max(self.d_model // self.head_dim, 1)
        return Config(
            1, self.d_model, self.n_layers, heads, heads, min(self.head_dim, self.d_model),
            self.d_ff or 2 * self.d_model, max_length=self.pieces, activation='gelu_tanh',
            tied=True, dtype=self.dtype, unroll=self.n_layers,
        )  # fmt: skip


def for_model(config: HypernetworkConfig, model: Config, vocab_size: int) -> HypernetworkConfig:
    """Returns the config with the sizes of a model whose tokenizer has `vocab_size` ids.

    Raises:
      ValueError: the model's tables are drawn per sequence, or have fewer rows than that.
    """
    if not model.learned_tables:
        raise ValueError('a model without learned tables has no rows to predict others from')
    if model.codebooks > 1:
        raise ValueError(
            f'Config.codebooks: {model.codebooks}; rows are predicted for one codebook'
        )
    if model.vocab_size < vocab_size:
        raise ValueError(
            f'the tokenizer has {vocab_size} ids, the model rows for {model.vocab_size}: expected '
            'the tokenizer that the model was trained with'
        )
    return dataclasses.replace(
        config, vocab_size=vocab_size, d_model=model.d_model, tied=model.tied, dtype=model.dtype
    )


def leaves(config: HypernetworkConfig) -> dict[str, Any]:
    """Returns the nested dict of `Leaf`s of a hypernetwork (see `lm.model.leaves`)."""
    d, f = config.d_model, config.encoder.d_ff
    wide = d * len(config.tables)

    def projector() -> dict[str, Leaf]:
        return {
            'w_up_DF': matrix((d, f), ('embed', 'ff'), d**-0.5),
            'w_down_FD': matrix((f, d), ('ff', 'embed'), f**-0.5),
            'norm_D': Leaf((d,), ('norm',), None, 1.0),
        }

    def head() -> dict[str, Any]:
        return {
            'projector': projector(),
            'w_out_DD': matrix((d, d), ('embed', 'ff'), None if config.residual else d**-0.5),
            'scale_D': Leaf((d,), ('norm',), None, 1.0),
            'shift_D': Leaf((d,), ('norm',), None),
        }

    return {
        'source_mean_E': Leaf((wide,), ('norm',), None),
        'source_deviation_E': Leaf((wide,), ('norm',), None, 1.0),
        'fallback_256E': Leaf((256, wide), ('vocab', 'embed'), 1.0),
        'w_project_ED': matrix((wide, d), ('embed', 'ff'), wide**-0.5),
        'projector': projector(),
        'encoder': params.body_leaves(config.encoder),
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

    The predicted rows of up to 2,048 tokens that the source has, the anchors, have the same mean
    and deviation in each dimension as the source's own rows of these tokens.

    Args:
      source: the model's tables.
    """
    tree = leaves(config)
    start = leaves_lib.initial(tree, 'float32', key)
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
    """Returns the pieces `[U, P]` of tokens that the source has: one piece, the token itself."""
    ids_U = jnp.asarray(ids_U, jnp.int32)
    return jnp.pad(ids_U[:, None], ((0, 0), (0, config.pieces - 1)), constant_values=-1)


def read(weights: Params, config: HypernetworkConfig, source: Params) -> jax.Array:
    """Returns the encoder's inputs for every piece, `[vocab_size + 256, D]`.

    Computed once per source and weights, as the same pieces recur in many tokens. The last 256 rows
    are the fallback rows of bytes.
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

    Processes `config.chunk` tokens at a time, so that memory does not grow with U, and recomputes
    chunks in the backward pass. A row is bit-identical whatever tokens are beside it and however
    many calls predict a vocabulary, if all are calls of one jitted function that takes the weights
    and the source as arguments. (Sums of constants may be compiled in another order.)

    Args:
      weights: of the hypernetwork.
      source: the model's tables.
      pieces_UP: int32 ids of the source tokenizer, `vocab_size + byte` for a byte without one,
        padded with -1 at the end. The rows of a token without pieces are meaningless.
      read_VD: the result of `read`, to share it among calls with the same weights.
    """
    u, chunk = len(pieces_UP), config.chunk
    n = math.ceil(u / chunk)
    # The last chunk is padded: products of other shapes would be summed in another order.
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
    h_UPD = transformer.read(
        {'body': weights['encoder']}, config.encoder, Nodes(None, positions_UP, x_BTD=x_UPD),
        real_UP.astype(jnp.int32), causal=False,
    ).h_BTD  # fmt: skip
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
