"""The same model and AdamW step in PyTorch, for comparison where torch is installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.bench_train.config import Config
from lm.model.config import Config as ModelConfig


class Block(nn.Module):
    """RMSNorm, causal attention with RoPE, gated MLP, as in `lm.model.transformer.block`."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        d, self.heads = model.d_model, model.n_heads
        self.norms = nn.ModuleList([nn.RMSNorm(d), nn.RMSNorm(d)])
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * model.d_ff, bias=False)
        self.down = nn.Linear(model.d_ff, d, bias=False)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        """Returns the residual stream after the block, `[B, L, D]`."""
        b, l, d = x.shape
        qkv = self.qkv(self.norms[0](x)).view(b, l, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, l, d))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def step(model: ModelConfig, config: Config) -> Callable[[], None]:
    """Returns a function that runs one training step."""
    torch.manual_seed(0)
    table = nn.Embedding(model.vocab_size, model.d_model)
    blocks = nn.ModuleList(Block(model) for _ in range(model.n_layers))
    norm = nn.RMSNorm(model.d_model)
    head = nn.Linear(model.d_model, model.vocab_size, bias=False)
    modules = nn.ModuleList([table, blocks, norm, head])
    adamw = torch.optim.AdamW(modules.parameters(), 1e-3, fused=True)
    tokens = torch.zeros(config.batch_size, config.length, dtype=torch.long)
    frequencies = model.rope_theta ** (-torch.arange(0, model.head_dim, 2) / model.head_dim)
    angles = torch.arange(config.length)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def run():
        x = table(tokens)
        for block in blocks:
            x = block(x, cos, sin)
        logits = head(norm(x)).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, torch.ones_like(tokens).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return run
