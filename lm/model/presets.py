"""Model shapes by name: functions of the vocabulary, from a toy to released checkpoints.

Sizes of the M1 and M2 models are those of Lester et al., TMLR 12/2024, section 3, which count
parameters without the token tables; their learned relative attention is RoPE here.
"""

from typing import Any

from lm.model.config import Config, RopeScaling


def tiny(vocab_size: int = 384) -> Config:
    """Two small layers, for tests and experiments."""
    return Config(vocab_size, 64, 2, 4, 2, 16, 128, max_length=128, unroll=2)


def m1_3m(vocab_size: int = 384) -> Config:
    """The paper's byte model for the arithmetic coder (P1, section 3.2)."""
    return _lester(vocab_size, 256, 4, 3, 1024, max_length=1024)


def m2_25m(vocab_size: int = 65_664) -> Config:
    """The paper's 25m model over compressed text."""
    return _lester(vocab_size, 512, 8, 6, 2048, max_length=512)


def m2_113m(vocab_size: int = 65_664) -> Config:
    """The paper's 113m model over compressed text."""
    return _lester(vocab_size, 768, 12, 12, 3072, max_length=512)


def m2_403m(vocab_size: int = 65_664) -> Config:
    """The paper's 403m model over compressed text."""
    return _lester(vocab_size, 1024, 16, 24, 4096, max_length=512, remat=True)


def m2_2b(vocab_size: int = 65_664) -> Config:
    """The paper's 2b model over compressed text."""
    return _lester(vocab_size, 2048, 32, 24, 8192, max_length=512, dtype='bfloat16', remat=True)


_RELEASED: dict[str, Any] = {'dtype': 'bfloat16', 'param_dtype': 'bfloat16', 'remat': True}


def llama2_7b(vocab_size: int = 32_000) -> Config:
    """Llama 2 7B."""
    return Config(
        vocab_size, 4096, 32, 32, 32, 128, 11_008, max_length=4096, norm_epsilon=1e-5, **_RELEASED
    )


def llama3_8b(vocab_size: int = 128_256) -> Config:
    """Llama 3.1 8B."""
    return Config(
        vocab_size, 4096, 32, 32, 8, 128, 14_336, max_length=131_072, norm_epsilon=1e-5,
        rope_theta=500_000.0, rope_scaling=RopeScaling('llama3', 8.0), **_RELEASED,
    )  # fmt: skip


def mistral_7b(vocab_size: int = 32_000) -> Config:
    """Mistral 7B v0.1: every layer sees a window of 4,096 keys."""
    return Config(
        vocab_size, 4096, 32, 32, 8, 128, 14_336, max_length=32_768, norm_epsilon=1e-5,
        window=4096, **_RELEASED,
    )  # fmt: skip


def qwen2_7b(vocab_size: int = 152_064) -> Config:
    """Qwen 2 7B: biases on q, k and v."""
    return Config(
        vocab_size, 3584, 28, 28, 4, 128, 18_944, max_length=32_768, qkv_bias=True,
        rope_theta=1e6, **_RELEASED,
    )  # fmt: skip


def qwen3_8b(vocab_size: int = 151_936) -> Config:
    """Qwen 3 8B: norms on q and k."""
    return Config(
        vocab_size, 4096, 36, 32, 8, 128, 12_288, max_length=40_960, qk_norm=True,
        rope_theta=1e6, **_RELEASED,
    )  # fmt: skip


_GEMMA: dict[str, Any] = {
    'activation': 'gelu_tanh',
    'unit_offset': True,
    'post_norm': True,
    'scale_embeddings': True,
    'tied': True,
}


def gemma2_9b(vocab_size: int = 256_000) -> Config:
    """Gemma 2 9B: soft caps, post norms, a window in every second layer."""
    return Config(
        vocab_size, 3584, 42, 16, 8, 256, 14_336, max_length=8192, attention_scale=256**-0.5,
        attention_softcap=50.0, logit_softcap=30.0, window=4096, window_pattern=(True, False),
        **_GEMMA, **_RELEASED,
    )  # fmt: skip


def gemma3_27b(vocab_size: int = 262_208) -> Config:
    """Gemma 3 27B (text): five windowed layers to each global one."""
    return Config(
        vocab_size, 5376, 62, 32, 16, 128, 21_504, max_length=131_072, qk_norm=True,
        attention_scale=168**-0.5, rope_theta=1e6, local_rope_theta=10_000.0,
        rope_scaling=RopeScaling('linear', 8.0), window=1024,
        window_pattern=(True, True, True, True, True, False), **_GEMMA, **_RELEASED,
    )  # fmt: skip


def _lester(vocab_size: int, width: int, heads: int, layers: int, hidden: int, **fields) -> Config:
    return Config(vocab_size, width, layers, heads, heads, 64, hidden, activation='relu', **fields)


PRESETS = (
    tiny, m1_3m, m2_25m, m2_113m, m2_403m, m2_2b, llama2_7b, llama3_8b, mistral_7b, qwen2_7b,
    qwen3_8b, gemma2_9b, gemma3_27b,
)  # fmt: skip
