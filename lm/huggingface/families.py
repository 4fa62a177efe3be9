"""Supported families of Hugging Face checkpoints, one declaration each.

A table maps each tensor of a checkpoint to a leaf of `lm.model.params` and to the tensor's axes, in
the letters of the leaf's name; `(HC)` denotes two axes that the file merges into one. The letters
determine the transposes and reshapes of import and export:

    'self_attn.q_proj.weight': ('wq_NDHC', '(HC)D')    [H * C, D] is layer i of [N, D, H, C]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Table = dict[str, tuple[str, str]]

ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu'}

# config.json -> lm.model.config.Config, in all families
SIZES = {
    'vocab_size': 'vocab_size', 'hidden_size': 'd_model', 'num_hidden_layers': 'n_layers',
    'num_attention_heads': 'n_heads', 'num_key_value_heads': 'n_kv_heads',
    'head_dim': 'head_dim', 'intermediate_size': 'd_ff', 'max_position_embeddings': 'max_length',
}  # fmt: skip

# in all families; axes in the leaf's order
OUTER: Table = {
    'model.embed_tokens.weight': ('tables/input_VD', 'VD'),
    'model.norm.weight': ('body/final_norm_D', 'D'),
    'lm_head.weight': ('tables/output_VD', 'VD'),
}
_MATRICES: Table = {
    'input_layernorm.weight': ('attention_norm_ND', 'D'),
    'self_attn.q_proj.weight': ('wq_NDHC', '(HC)D'),
    'self_attn.k_proj.weight': ('wk_NDKC', '(KC)D'),
    'self_attn.v_proj.weight': ('wv_NDKC', '(KC)D'),
    'self_attn.o_proj.weight': ('wo_NHCD', 'D(HC)'),
    'mlp.gate_proj.weight': ('w_gate_NDF', 'FD'),
    'mlp.up_proj.weight': ('w_up_NDF', 'FD'),
    'mlp.down_proj.weight': ('w_down_NFD', 'DF'),
}
_MLP_NORM: Table = {'post_attention_layernorm.weight': ('mlp_norm_ND', 'D')}
_FOUR_NORMS: Table = {
    'post_attention_layernorm.weight': ('post_attention_norm_ND', 'D'),
    'pre_feedforward_layernorm.weight': ('mlp_norm_ND', 'D'),
    'post_feedforward_layernorm.weight': ('post_mlp_norm_ND', 'D'),
}
_QK_NORMS: Table = {
    'self_attn.q_norm.weight': ('q_norm_NC', 'C'),
    'self_attn.k_norm.weight': ('k_norm_NC', 'C'),
}
_QKV_BIASES: Table = {
    'self_attn.q_proj.bias': ('bq_NHC', '(HC)'),
    'self_attn.k_proj.bias': ('bk_NKC', '(KC)'),
    'self_attn.v_proj.bias': ('bv_NKC', '(KC)'),
}


class Family(NamedTuple):
    """One `model_type` of config.json.

    Attributes:
      model_type, architecture: as spelled in config.json.
      layer: tensors of a layer, without the prefix `model.layers.0.`, and their leaves.
      same: fields of `lm.model.config.Config` that all models of the family share.
      defaults: values of fields missing from config.json, if not null.
      activation: the field of config.json that names the activation.
      windowed: from the fields of config.json and the number of layers to a flag per layer: whether
        it uses a sliding window. Applies if `layer_types` is missing.
      lists_layers: whether `layer_types` is supported.
      local_rope: whether sliding-window layers have RoPE frequencies of their own.
      scalar: whether `query_pre_attn_scalar` sets the attention scale.
      softcaps: pairs of a field of config.json and its field of Config.
      divides: whether transformers requires the width to be a multiple of the number of heads.
    """

    model_type: str
    architecture: str
    layer: Table
    same: dict[str, Any]
    defaults: dict[str, Any]
    activation: str = 'hidden_act'
    windowed: Callable[[dict[str, Any], int], list[bool]] = lambda fields, n: [False] * n
    lists_layers: bool = False
    local_rope: bool = False
    scalar: bool = False
    softcaps: tuple[tuple[str, str], ...] = ()
    divides: bool = False


_DEFAULTS: dict[str, Any] = {
    'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0,
    'tie_word_embeddings': False,
}  # fmt: skip


def _qwen_windows(fields: dict[str, Any], n: int) -> list[bool]:
    if not fields['use_sliding_window'] or fields['sliding_window'] is None:
        return [False] * n
    return [i >= fields['max_window_layers'] for i in range(n)]


_QWEN: dict[str, Any] = {'windowed': _qwen_windows, 'lists_layers': True}
_QWEN_DEFAULTS = _DEFAULTS | {
    'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28,
}  # fmt: skip

_GEMMA: dict[str, Any] = {
    'activation': 'hidden_activation', 'lists_layers': True, 'scalar': True, 'divides': True,
}  # fmt: skip
_GEMMA_SAME = {'unit_offset': True, 'post_norm': True, 'scale_embeddings': True}
_GEMMA_DEFAULTS: dict[str, Any] = {
    'hidden_activation': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-6, 'tie_word_embeddings': True,
    'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256,
    'query_pre_attn_scalar': 256, 'sliding_window': 4096,
}  # fmt: skip

FAMILIES = (
    Family(
        'llama', 'LlamaForCausalLM', _MATRICES | _MLP_NORM, {}, _DEFAULTS, divides=True,
    ),
    Family(
        'mistral', 'MistralForCausalLM', _MATRICES | _MLP_NORM, {},
        _DEFAULTS | {'num_key_value_heads': 8, 'sliding_window': 4096},
        windowed=lambda fields, n: [fields['sliding_window'] is not None] * n,
    ),
    Family(
        'qwen2', 'Qwen2ForCausalLM', _MATRICES | _MLP_NORM | _QKV_BIASES, {'qkv_bias': True},
        _QWEN_DEFAULTS, **_QWEN,
    ),
    Family(
        'qwen3', 'Qwen3ForCausalLM', _MATRICES | _MLP_NORM | _QK_NORMS, {'qk_norm': True},
        _QWEN_DEFAULTS | {'head_dim': 128}, **_QWEN,
    ),
    Family(
        'gemma2', 'Gemma2ForCausalLM', _MATRICES | _FOUR_NORMS, _GEMMA_SAME,
        _GEMMA_DEFAULTS | {
            'rope_theta': 10_000.0, 'final_logit_softcapping': 30.0,
            'attn_logit_softcapping': 50.0,
        },
        windowed=lambda fields, n: [i % 2 == 0 for i in range(n)],
        softcaps=(
            ('final_logit_softcapping', 'logit_softcap'),
            ('attn_logit_softcapping', 'attention_softcap'),
        ),
        **_GEMMA,
    ),
    Family(
        'gemma3_text', 'Gemma3ForCausalLM', _MATRICES | _FOUR_NORMS | _QK_NORMS,
        _GEMMA_SAME | {'qk_norm': True},
        _GEMMA_DEFAULTS | {
            'vocab_size': 262_208, 'hidden_size': 2304, 'intermediate_size': 9216,
            'num_hidden_layers': 26, 'max_position_embeddings': 131_072,
            'sliding_window_pattern': 6, 'rope_theta': 1e6, 'rope_local_base_freq': 10_000.0,
        },
        windowed=lambda fields, n: [
            (i + 1) % fields['sliding_window_pattern'] != 0 for i in range(n)
        ],
        softcaps=(('final_logit_softcapping', 'logit_softcap'),),
        local_rope=True, **_GEMMA,
    ),
)  # fmt: skip
