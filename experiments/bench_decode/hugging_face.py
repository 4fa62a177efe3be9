"""The same weights in Llama of Hugging Face transformers, for comparison if it is installed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm.model.config import Config as ModelConfig
from lm.model.params import Params


def generator(
    params: Params, config: ModelConfig, device: str
) -> Callable[[np.ndarray, int], np.ndarray]:
    """Returns a function (prompts `[B, L]`, new tokens) -> greedy tokens `[B, new tokens]`."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model,
            intermediate_size=config.d_ff, num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim, max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_epsilon, rope_theta=config.rope_theta,
            tie_word_embeddings=config.tied, attn_implementation='sdpa',
        )
    )  # fmt: skip
    model.load_state_dict(_state(params, config), strict=True)
    model = model.to(device, getattr(torch, config.dtype)).eval()

    def generate(prompt_BL: np.ndarray, new_tokens: int) -> np.ndarray:
        ids = torch.as_tensor(np.asarray(prompt_BL, np.int64), device=device)
        with torch.inference_mode():
            text = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                pad_token_id=0, min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            )  # fmt: skip
        return text[:, ids.shape[1] :].cpu().numpy()

    return generate


def _state(params: Params, config: ModelConfig) -> dict[str, Any]:
    def tensor(x: Any) -> Any:
        return torch.from_numpy(np.array(x, np.float32))

    d = config.d_model
    layers, tables = params['body']['layers'], params['tables']
    state = {
        'model.embed_tokens.weight': tensor(tables['input_VD']),
        'lm_head.weight': tensor(tables.get('output_VD', tables['input_VD'])),
        'model.norm.weight': tensor(params['body']['final_norm_D']),
    }
    matrices = {
        'self_attn.q_proj': ('wq_NDHC', d), 'self_attn.k_proj': ('wk_NDKC', d),
        'self_attn.v_proj': ('wv_NDKC', d), 'self_attn.o_proj': ('wo_NHCD', -1),
        'mlp.gate_proj': ('w_gate_NDF', d), 'mlp.up_proj': ('w_up_NDF', d),
        'mlp.down_proj': ('w_down_NFD', -1),
    }  # fmt: skip
    norms = {'input_layernorm': 'attention_norm_ND', 'post_attention_layernorm': 'mlp_norm_ND'}
    for i in range(config.n_layers):
        for name, (leaf, inputs) in matrices.items():
            w = np.array(layers[leaf][i], np.float32)
            w = w.reshape(d, -1) if inputs == d else w.reshape(-1, d)
            state[f'model.layers.{i}.{name}.weight'] = torch.from_numpy(w.T.copy())
        for name, leaf in norms.items():
            state[f'model.layers.{i}.{name}.weight'] = tensor(layers[leaf][i])
    return state
