"""Makes the small checkpoints beside `test_huggingface.py`, and checks our exports of them.

    PYTHONPATH=. python tests/lm/huggingface/make_fixtures.py

Only this script needs torch and transformers. For each family it makes a random model whose
settings matter at this size (windows shorter than the text, soft caps in their nonlinear range,
norms and biases away from their initial values), and stores the folder that transformers writes,
tokens, and the logits that transformers computes. It then loads and exports the folder with
`lm.huggingface.checkpoint`, and loads the export with transformers: its logits must be
bit-identical.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers

from lm.huggingface import checkpoint as huggingface

FOLDER = pathlib.Path(__file__).parent
LENGTH = 20
PADDING = 6
SIZES = {
    'vocab_size': 48, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 3,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 6,
    'max_position_embeddings': 64, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0,
}  # fmt: skip
LLAMA3 = {
    'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 4.0, 'low_freq_factor': 1.0,
    'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
}  # fmt: skip
GEMMA3_TEXT = SIZES | {
    'num_hidden_layers': 4, 'sliding_window': 5, 'query_pre_attn_scalar': 9,
    'final_logit_softcapping': 9.0,
    'layer_types': [f'{kind}_attention' for kind in ('sliding', 'sliding', 'full', 'sliding')],
    'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e4},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
    },
}  # fmt: skip
VISION = {
    'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 1,
    'image_size': 8, 'patch_size': 4,
}  # fmt: skip


def older(config: dict) -> None:
    """Spells a config as transformers before version 5 did, without the fields that it omitted."""
    rope = config.pop('rope_parameters')
    config['torch_dtype'] = config.pop('dtype', None)
    kind = 'type'
    if 'full_attention' in rope:
        config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
        rope, kind = rope['full_attention'], 'rope_type'
    config['rope_theta'] = rope.pop('rope_theta')
    scaling = {kind: rope.pop('rope_type'), **rope}
    config['rope_scaling'] = None if scaling == {kind: 'default'} else scaling
    for name in ('attention_bias', 'mlp_bias', 'layer_types', 'hidden_act'):
        config.pop(name, None)


def oldest(config: dict) -> None:
    """Spells a Llama's config as before grouped-query attention."""
    older(config)
    del config['head_dim'], config['num_key_value_heads']


def older_text(config: dict) -> None:
    """Spells the text part of a multimodal Gemma 3 as transformers before version 5 did."""
    text = config['text_config']
    older(text)
    text['sliding_window_pattern'] = text.pop('_sliding_window_pattern')


def models() -> dict[str, tuple]:
    """Returns per fixture: its config, the size of its shards, and an edit of config.json."""
    t = transformers
    return {
        'llama2': (
            t.LlamaConfig(**SIZES | {'head_dim': None, 'num_key_value_heads': None}),
            '1GB', oldest,
        ),
        'llama3': (
            t.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True), '1GB', None,
        ),
        'mistral': (t.MistralConfig(**SIZES, sliding_window=5), '16KB', None),
        'qwen2': (
            t.Qwen2Config(
                **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1,
                tie_word_embeddings=True,
            ),
            '1GB', older,
        ),
        'qwen3': (
            t.Qwen3Config(
                **SIZES, rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 100.0}
            ),
            '1GB', older,
        ),
        'gemma2': (
            t.Gemma2Config(
                **SIZES, sliding_window=5, query_pre_attn_scalar=9, attn_logit_softcapping=2.0,
                final_logit_softcapping=9.0,
            ),
            '1GB', older,
        ),
        'gemma3': (t.Gemma3TextConfig(**GEMMA3_TEXT), '1GB', None),
        'gemma3_multimodal': (
            t.Gemma3Config(
                text_config=GEMMA3_TEXT
                | {'layer_types': None, 'sliding_window_pattern': 2}
                | {'final_logit_softcapping': None},
                vision_config=VISION, mm_tokens_per_image=1, boi_token_index=40,
                eoi_token_index=41, image_token_index=42,
            ),
            '1GB', older_text,
        ),
    }  # fmt: skip


def random_model(config) -> transformers.PreTrainedModel:
    """Returns a model with random values for all parameters, norms and biases included."""
    kinds = transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM
    kind = kinds[0] if isinstance(config, transformers.Gemma3Config) else kinds[1]
    generator = torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation='eager').float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms and biases
                parameter += 0.5 * noise
            else:
                parameter.copy_(noise * (1.0 if 'embed_tokens' in name else 0.25))
    return model


def text() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and a mask of real ones; rows 1 and 2 are padded left and right."""
    tokens = np.random.default_rng(0).integers(3, 40, (3, LENGTH))
    real = np.ones((3, LENGTH), bool)
    real[1, :PADDING] = real[2, -PADDING:] = False
    return np.where(real, tokens, 0), real


def logits(model, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Returns the logits of transformers, with zeros for padding."""
    mask = torch.from_numpy(real.astype(np.int64))
    positions = torch.clamp(torch.cumsum(mask, 1) - 1, min=0)
    with torch.inference_mode():
        ids = torch.from_numpy(tokens)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return np.where(real[..., None], out.numpy(), np.float32(0))


def load(folder: pathlib.Path):
    """Returns the model that transformers reads from a folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kinds = transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM
    kind = kinds[0] if isinstance(config, transformers.Gemma3Config) else kinds[1]
    model = kind.from_pretrained(folder, attn_implementation='eager', dtype=torch.float32)
    return model.eval()


def main() -> None:
    """Writes each fixture and checks its export."""
    tokens, real = text()
    for name, (config, shard, change) in models().items():
        folder = FOLDER / name
        model = random_model(config)
        model.save_pretrained(folder, max_shard_size=shard)
        (folder / 'generation_config.json').unlink(missing_ok=True)
        file = folder / 'config.json'
        described = json.loads(file.read_text())
        if change is not None:
            change(described)
        file.write_text(json.dumps(described, indent=1) + '\n')
        expected = logits(model, tokens, real)
        np.testing.assert_array_equal(logits(load(folder), tokens, real), expected, name)
        np.savez_compressed(folder / 'expected.npz', tokens=tokens, real=real, logits=expected)
        ours, params = huggingface.load(folder)
        with tempfile.TemporaryDirectory() as export:
            family = huggingface.save(f'{export}/x', ours, params, most_shard_bytes=20_000)
            np.testing.assert_array_equal(
                logits(load(pathlib.Path(export, 'x')), tokens, real), expected, name
            )
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f'{name}: {size:,} bytes, logits {expected.std():.2f}; exported as {family}')


if __name__ == '__main__':
    main()
