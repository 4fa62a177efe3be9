"""The shape of one decoder transformer, as a frozen and validated dataclass."""

import dataclasses
import math
from typing import Any, Literal

from lm.files import dataclass_json

# Fields added later, with their value in older models.
_LATER = {'lexinvariant': None, 'induction_init': False, 'ring': 'keys', 'codebooks': 1}
DTYPES = ('float32', 'bfloat16')
ACTIVATIONS = ('silu', 'gelu_tanh', 'relu')
RINGS = ('keys', 'queries')


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretches rotary frequencies to a context longer than the one trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023, position interpolation).
    `llama3` divides the low ones, keeps the high ones and blends between (Llama 3.1 release).
    """

    kind: Literal['linear', 'llama3']
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ('linear', 'llama3'):
            raise ValueError(f"RopeScaling.kind: {self.kind!r}; expected 'linear' or 'llama3'")
        if self.factor < 1:
            raise ValueError(f'RopeScaling.factor: {self.factor}; expected at least 1')


@dataclasses.dataclass(frozen=True)
class Lexinvariant:
    """The rows of the token table that are drawn anew per sequence (`lm.model.lexinvariant`).

    Attributes:
      kind: `gaussian`, independent normal rows (Huang et al. 2023, arXiv 2305.16349), or
        `permuted`, the rows of one fixed table in a random order (ours).
      probability: of a symbol's row being drawn rather than learned, independently per sequence and
        symbol. Below 1 there is also a learned table (the paper's regulariser uses 0.2).
      always, never: ids of symbols whose rows are always, or never, drawn.
    """

    kind: Literal['gaussian', 'permuted'] = 'gaussian'
    probability: float = 1.0
    always: tuple[int, ...] = ()
    never: tuple[int, ...] = ()

    def __post_init__(self):
        if self.kind not in ('gaussian', 'permuted'):
            raise ValueError(f"Lexinvariant.kind: {self.kind!r}; expected 'gaussian' or 'permuted'")
        if not 0 <= self.probability <= 1:
            raise ValueError(f'Lexinvariant.probability: {self.probability}; expected 0 to 1')
        if not all(isinstance(i, int) for i in (*self.always, *self.never)):
            raise ValueError('Lexinvariant: `always` and `never` hold integer ids')
        both = sorted(set(self.always) & set(self.never))
        if both:
            raise ValueError(f'Lexinvariant: id {both[0]} is in `always` and in `never`')

    @property
    def partial(self) -> bool:
        """Whether any row is learned."""
        return self.probability < 1 or bool(self.never)

    @property
    def draws(self) -> bool:
        """Whether any row is drawn."""
        return self.probability > 0 or bool(self.always)


@dataclasses.dataclass(frozen=True)
class Config:
    """One decoder transformer, general enough for Llama, Mistral, Qwen and Gemma checkpoints.

    Attributes:
      vocab_size: rows of the token tables (V); input-only symbols count.
      d_model: width of the residual stream (D).
      n_layers: blocks (N).
      n_heads: query heads (H), a multiple of `n_kv_heads` (K).
      head_dim: channels per head (C), even.
      d_ff: width of the gated MLP (F).
      max_length: maximum positions; bounds caches and windows.
      activation: of the MLP's gate.
      norm_epsilon: added to the mean square in every RMSNorm.
      unit_offset: RMSNorm multiplies by `1 + w` instead of `w` (Gemma).
      post_norm: another RMSNorm after attention and after the MLP (Gemma 2, 3).
      qk_norm: RMSNorm over each query and key head before RoPE (Qwen 3, Gemma 3).
      qkv_bias: biases on the q, k and v projections (Qwen 2); q and k biases start random.
      attention_scale: multiplies q . k; `None` means `head_dim ** -0.5`.
      attention_softcap: attention logits become `cap * tanh(logits / cap)` (Gemma 2).
      logit_softcap: the same for output logits.
      scale_embeddings: token vectors are multiplied by `sqrt(d_model)` (Gemma).
      tied: output logits use the input table.
      lexinvariant: token tables drawn for each sequence; `None`: learned ones.
      induction_init: attention is initialised as induction heads (`lm.model.induction`).
      rope_theta: base of the rotary frequencies; `local_rope_theta` that of windowed layers.
      rope_scaling: if `local_rope_theta` is set, applies only to layers without a window.
      window: in windowed layers, a query sees keys at a distance below this; `None`: all keys.
      window_pattern: which layers are windowed, repeated over the depth.
      dtype: of activations and the weights they multiply; norms, softmax and logits are f32.
      param_dtype: of the stored parameters.
      remat: recompute each block's activations in the backward pass.
      unroll: blocks per iteration of the scan over layers. `n_layers` unrolls it entirely: faster
        for a few small layers on a CPU, slower to compile for many.
      ring: the operands that ring attention passes around the mesh's `sequence` axis: `keys` with
        their values, or `queries`, whose results are passed back (`lm.attention.ring`).
      codebooks: ids per position (Q), each with its own table. The input is the sum of their rows;
        logits and losses are per codebook. Above 1, a model can be trained but not decoded yet.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int = 2048
    activation: Literal['silu', 'gelu_tanh', 'relu'] = 'silu'
    norm_epsilon: float = 1e-6
    unit_offset: bool = False
    post_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embeddings: bool = False
    tied: bool = False
    lexinvariant: Lexinvariant | None = None
    induction_init: bool = False
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    dtype: str = 'float32'
    param_dtype: str = 'float32'
    remat: bool = False
    unroll: int = 1
    ring: Literal['keys', 'queries'] = 'keys'
    codebooks: int = 1

    def __post_init__(self):
        for name in ('vocab_size', 'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim'):
            _check(self, name, getattr(self, name) >= 1, 'at least 1')
        _check(self, 'd_ff', self.d_ff >= 1, 'at least 1')
        _check(self, 'max_length', self.max_length >= 1, 'at least 1')
        _check(self, 'unroll', self.unroll >= 1, 'at least 1')
        _check(self, 'codebooks', self.codebooks >= 1, 'at least 1')
        _check(self, 'head_dim', self.head_dim % 2 == 0, 'an even number, for RoPE')
        divides = self.n_heads % self.n_kv_heads == 0
        _check(self, 'n_heads', divides, f'a multiple of n_kv_heads = {self.n_kv_heads}')
        _check(self, 'ring', self.ring in RINGS, f'one of {RINGS}')
        _check(self, 'activation', self.activation in ACTIVATIONS, f'one of {ACTIVATIONS}')
        for name in ('dtype', 'param_dtype'):
            _check(self, name, getattr(self, name) in DTYPES, f'one of {DTYPES}')
        for name in ('rope_theta', 'norm_epsilon'):
            _check(self, name, getattr(self, name) > 0, 'a positive number')
        _check(self, 'window', self.window is None or self.window >= 1, 'at least 1, or none')
        _check(self, 'window_pattern', len(self.window_pattern) >= 1, 'at least one entry')
        # a norm of queries and keys, or a soft cap, would flatten the peak due to the biases
        looks_back = self.qkv_bias and self.n_layers > 1
        looks_back &= not self.qk_norm and self.attention_softcap is None
        expected = 'False, or two layers, qkv_bias, no qk_norm and no attention_softcap'
        _check(self, 'induction_init', looks_back or not self.induction_init, expected)
        if self.lexinvariant is not None:
            _check(self, 'tied', self.tied, 'True: lexinvariant symbols have one row each')
            _check(self, 'codebooks', self.codebooks == 1, '1 if rows are drawn (lexinvariant)')
            ids = (*self.lexinvariant.always, *self.lexinvariant.never)
            known = all(0 <= i < self.vocab_size for i in ids)
            _check(self, 'lexinvariant', known, f'ids in [0, {self.vocab_size})')

    @property
    def learned_tables(self) -> bool:
        """Whether all texts use the parameters' own tables: no row is drawn."""
        return self.lexinvariant is None or not self.lexinvariant.draws

    @property
    def query_scale(self) -> float:
        """The factor on q . k before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """Whether each of the N layers sees only a window of keys."""
        if self.window is None:
            return (False,) * self.n_layers
        repeats = math.ceil(self.n_layers / len(self.window_pattern))
        return (self.window_pattern * repeats)[: self.n_layers]


def _check(config: Config, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f'Config.{name}: {getattr(config, name)!r}; expected {expected}')


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as plain JSON values.

    Fields added later are written only if set, so that digests of older models do not change.
    """
    fields = dataclasses.asdict(config)
    return {name: x for name, x in fields.items() if name not in _LATER or x != _LATER[name]}


def from_dict(fields: dict[str, Any]) -> Config:
    """Inverse of `to_dict`.

    Raises:
      ValueError: a field is unknown or missing, or a value is not allowed.
    """
    return dataclass_json.read(Config, fields, 'model config')
