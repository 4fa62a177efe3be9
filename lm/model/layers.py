"""The pieces of a block, as pure functions of arrays."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.model import cpu_layout
from lm.model.cpu_layout import WeightsFirst
from lm.model.leaves import Params


def einsum(
    spec: str, x: jax.Array, w: jax.Array | WeightsFirst, out: DTypeLike | None = None
) -> jax.Array:
    """Contracts activations with a matrix, in the activations' dtype; the output may be wider.

    f32 is full precision: accelerators would otherwise round the operands to bf16 or tf32.
    """
    if isinstance(w, WeightsFirst):
        return cpu_layout.products(x, w, out)[0]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        spec, x, w.astype(x.dtype), precision=precision, preferred_element_type=out or x.dtype
    )


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, unit_offset: bool) -> jax.Array:
    """Returns `x / rms(x) * weight` over the last axis, computed in f32 (Zhang & Sennrich 2019).

    With `unit_offset` the factor is `1 + weight` (Gemma).
    """
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + epsilon)
    weight = weight.astype(jnp.float32) + unit_offset
    return (x_f32 * scale * weight).astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns `cap * tanh(x / cap)`, or `x` without a cap (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def project(x_BLD: jax.Array, p: Params, *names: str) -> list[jax.Array]:
    """Returns the products `[B, L, ...]` of vectors with several matrices `[D, ...]` of a layer."""
    joined = p.get(cpu_layout.join(names))
    if joined is not None:
        return cpu_layout.products(x_BLD, joined)
    return [einsum('bld,d...->bl...', x_BLD, p[name]) for name in names]


def gated_mlp(x_BLD: jax.Array, p: Params, activation: str) -> jax.Array:
    """Returns `(act(x gate) * (x up)) down` (Shazeer 2020, GLU variants)."""
    act = {
        'silu': jax.nn.silu,
        'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
        'relu': jax.nn.relu,
    }[activation]
    gate_BLF, up_BLF = project(x_BLD, p, 'w_gate_NDF', 'w_up_NDF')
    return einsum('blf,fd->bld', act(gate_BLF) * up_BLF, p['w_down_NFD'])
