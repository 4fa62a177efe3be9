"""Reading config.json of released checkpoints gives the presets."""

import dataclasses

import pytest

from lm.huggingface import config as huggingface_config
from lm.model import presets
from lm.model.config import Config

# The fields that determine the model, as spelled in the released files.
RELEASED = {
    presets.llama2_7b: {
        'model_type': 'llama', 'hidden_act': 'silu', 'hidden_size': 4096,
        'intermediate_size': 11008, 'max_position_embeddings': 4096, 'num_attention_heads': 32,
        'num_hidden_layers': 32, 'num_key_value_heads': 32, 'pretraining_tp': 1,
        'rms_norm_eps': 1e-05, 'rope_scaling': None, 'tie_word_embeddings': False,
        'torch_dtype': 'float16', 'vocab_size': 32000,
    },
    presets.llama3_8b: {
        'model_type': 'llama', 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 4096,
        'intermediate_size': 14336, 'max_position_embeddings': 131072, 'mlp_bias': False,
        'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_theta': 500000.0,
        'rope_scaling': {
            'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192, 'rope_type': 'llama3',
        },
        'tie_word_embeddings': False, 'torch_dtype': 'bfloat16', 'vocab_size': 128256,
    },
    presets.mistral_7b: {
        'model_type': 'mistral', 'hidden_act': 'silu', 'hidden_size': 4096,
        'intermediate_size': 14336, 'max_position_embeddings': 32768, 'num_attention_heads': 32,
        'num_hidden_layers': 32, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-05,
        'rope_theta': 10000.0, 'sliding_window': 4096, 'tie_word_embeddings': False,
        'vocab_size': 32000,
    },
    presets.qwen2_7b: {
        'model_type': 'qwen2', 'attention_dropout': 0.0, 'hidden_act': 'silu', 'hidden_size': 3584,
        'intermediate_size': 18944, 'max_position_embeddings': 32768, 'max_window_layers': 28,
        'num_attention_heads': 28, 'num_hidden_layers': 28, 'num_key_value_heads': 4,
        'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 131072,
        'tie_word_embeddings': False, 'use_sliding_window': False, 'vocab_size': 152064,
    },
    presets.qwen3_8b: {
        'model_type': 'qwen3', 'attention_bias': False, 'head_dim': 128, 'hidden_act': 'silu',
        'hidden_size': 4096, 'intermediate_size': 12288, 'max_position_embeddings': 40960,
        'max_window_layers': 36, 'num_attention_heads': 32, 'num_hidden_layers': 36,
        'num_key_value_heads': 8, 'rms_norm_eps': 1e-06, 'rope_scaling': None,
        'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': False,
        'use_sliding_window': False, 'vocab_size': 151936,
    },
    presets.gemma2_9b: {
        'model_type': 'gemma2', 'attention_bias': False, 'attn_logit_softcapping': 50.0,
        'cache_implementation': 'hybrid', 'final_logit_softcapping': 30.0, 'head_dim': 256,
        'hidden_act': 'gelu_pytorch_tanh', 'hidden_activation': 'gelu_pytorch_tanh',
        'hidden_size': 3584, 'intermediate_size': 14336, 'max_position_embeddings': 8192,
        'num_attention_heads': 16, 'num_hidden_layers': 42, 'num_key_value_heads': 8,
        'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06, 'rope_theta': 10000.0,
        'sliding_window': 4096, 'sliding_window_size': 4096, 'vocab_size': 256000,
    },
    presets.gemma3_27b: {
        'model_type': 'gemma3', 'boi_token_index': 255999, 'mm_tokens_per_image': 256,
        'text_config': {
            'head_dim': 128, 'hidden_size': 5376, 'intermediate_size': 21504,
            'model_type': 'gemma3_text', 'num_attention_heads': 32, 'num_hidden_layers': 62,
            'num_key_value_heads': 16, 'query_pre_attn_scalar': 168,
            'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize('preset', RELEASED, ids=lambda preset: preset.__name__)
def test_released_files_give_the_presets(preset):
    _, config = huggingface_config.read(RELEASED[preset], 'bfloat16')
    wanted = dataclasses.replace(preset(), remat=False)
    # a scale of head_dim ** -0.5 may be explicit or left out
    scale = config.query_scale if wanted.attention_scale is None else wanted.attention_scale
    assert dataclasses.replace(config, attention_scale=scale) == dataclasses.replace(
        wanted, attention_scale=scale
    )


def test_windows_are_read_as_transformers_reads_them():
    qwen = RELEASED[presets.qwen2_7b] | {'num_hidden_layers': 4}

    def windows(**fields) -> Config:
        config = huggingface_config.read(qwen | fields, 'float32')[1]
        return config.window, config.windowed_layers

    none = (None, (False,) * 4)
    assert windows() == none
    assert windows(use_sliding_window=True) == none  # the first 28 layers have full attention
    some = {'use_sliding_window': True, 'max_window_layers': 3}
    assert windows(**some) == (131072, (False, False, False, True))
    assert windows(**some, sliding_window=None) == none
    kinds = ['sliding_attention', 'full_attention'] * 2
    assert windows(**some, layer_types=kinds) == (131072, (True, False, True, False))
    with pytest.raises(ValueError, match='sliding_window: 131072; expected a window'):
        windows(layer_types=kinds)


@pytest.mark.parametrize('preset', presets.PRESETS, ids=lambda preset: preset.__name__)
def test_presets_are_written_as_their_own_family(preset):
    config = preset()
    family = huggingface_config.find(config)
    named = RELEASED.get(preset, {'model_type': 'llama'})['model_type']
    assert family.model_type == {'gemma3': 'gemma3_text'}.get(named, named)
    again = huggingface_config.read(huggingface_config.write(config, family), config.dtype)[1]
    assert again.windowed_layers == config.windowed_layers
