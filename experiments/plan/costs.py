"""Estimates the cost of one step from the config: memory, FLOPs, traffic.

The compiler's own FLOP count includes the body of a loop once, so a model scanned over its layers
looks like one layer. These estimates follow from the shapes and need no compilation. They are the
step's necessary cost, not that of a compiled program: element-wise operations are assumed to be
fused into adjacent matmuls, attention logits are not stored, and communication is that of fully
sharded data parallelism over `data` and `sequence` (Rajbhandari et al. 2020, ZeRO-3), tensor
parallelism over `model` (Shoeybi et al. 2019, Megatron-LM), and ring attention over `sequence`
(`experiments.plan.ring`).
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from experiments.plan import ring
from experiments.plan.ring import Pass
from lm.devices import mesh as mesh_lib
from lm.losses import cross_entropy
from lm.model import params
from lm.model.config import Config as ModelConfig
from lm.model.params import Leaf

_F32 = 4


class Memory(NamedTuple):
    """Bytes per device: exact for what is kept between steps, approximate for what a step adds."""

    params: float
    optimizer: float
    cache: float
    gradients: float
    activations: float

    @property
    def kept(self) -> float:
        """Bytes kept between steps."""
        return self.params + self.optimizer + self.cache

    @property
    def total(self) -> float:
        """Peak bytes during a step."""
        return sum(self)


class Costs(NamedTuple):
    """Cost of one step.

    Attributes:
      model_flops: FLOPs that the model needs on all devices; for training, three times the forward
        pass. Model FLOP/s utilisation (MFU) is defined by these.
      device_flops: FLOPs of one device, including recomputation and work replicated over devices.
      hbm_bytes: bytes that one device reads and writes.
      network_bytes: bytes that one device sends, by mesh axis, except those in `ring`.
      ring: all ring-attention passes of the step.
    """

    model_flops: float
    device_flops: float
    hbm_bytes: float
    network_bytes: dict[str, float]
    ring: tuple[Pass, ...] = ()


class _Case(NamedTuple):
    """Sizes per device, shared by the estimates.

    `weights` counts matrix entries that a device multiplies with: sharded over `model`, gathered
    over `data` and `sequence`; `sent` counts those that are gathered over each. `widths` is the sum
    of their input and output widths, per token.
    """

    model: ModelConfig
    length: int
    tokens: float  # of one device
    data: int
    sequence: int
    ways: int  # of the model axis
    layer_weights: float  # of all layers
    layer_sent: float
    layer_sent_sequence: float
    widths: float
    heads: float
    kv_heads: float
    vocabulary: float  # rows of a table
    itemsize: int  # of activations and of the matrices that they meet


def bytes_per_device(tree: Any) -> float:
    """Returns the bytes per device of a pytree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _case(model: ModelConfig, batch: int, length: int, train: bool, mesh: AbstractMesh) -> _Case:
    data, sequence, ways = (mesh.shape[axis] for axis in mesh_lib.AXES)

    def part(axes, shape, name):  # n, if a device holds 1/n of the leaf
        spec = mesh_lib.sharding(mesh, axes, shape).spec
        on = any(name == of or (isinstance(of, tuple) and name in of) for of in spec)
        return mesh.shape[name] if on else 1

    weights = sent = sent_sequence = widths = 0.0
    table = params.leaves(model)
    layers: dict[str, Leaf] = table['body']['layers']
    for name, leaf in layers.items():
        if not name.startswith('w'):
            continue
        entries = math.prod(leaf.shape) / part(leaf.axes, leaf.shape, 'model')
        weights += entries
        sent += entries if part(leaf.axes, leaf.shape, 'data') > 1 else 0
        sent_sequence += entries if part(leaf.axes, leaf.shape, 'sequence') > 1 else 0
        widths += model.d_model + entries / model.n_layers / model.d_model
    tokens = batch * (length if train else 1) / (data * sequence)

    def share(axis, size):
        return size / part((axis,), (size,), 'model')

    return _Case(
        model, length, tokens, data, sequence, ways, weights, sent, sent_sequence, widths,
        share('heads', model.n_heads), share('kv_heads', model.n_kv_heads),
        share('vocab', model.vocab_size), 2 if model.dtype == 'bfloat16' else 4,
    )  # fmt: skip


def count(model: ModelConfig, batch: int, length: int, step: str, mesh: AbstractMesh) -> Costs:
    """Returns the `Costs` of a training step, or of decoding one token in each row.

    Args:
      model: the model's config.
      batch: rows over all devices.
      length: tokens per row, or rows of the cache, all in use.
      step: `train` or `decode`.
    """
    case = _case(model, batch, length, step == 'train', mesh)
    return _train(case, batch, mesh) if step == 'train' else _decode(case, batch)


def _attention_flops(model: ModelConfig, length: int) -> float:
    """Forward FLOPs per token of causal attention, over all heads and layers."""
    matrices = params.count_body(model) + model.d_model * model.vocab_size
    return params.flops_per_token(model, length) - 2 * matrices


def _train(case: _Case, batch: int, mesh: Any) -> Costs:
    model, n, d = case.model, case.model.n_layers, case.model.d_model
    passes = 4 if model.remat else 3
    attention = _attention_flops(model, case.length) * case.heads / model.n_heads
    head = case.vocabulary * d  # the output table; its matmul is always recomputed
    flops = passes * (2 * case.layer_weights + attention) + 4 * 2 * head
    weights = case.layer_weights + head
    kept = bytes_per_device(params.abstract(model, mesh))
    # per token and block: a matmul reads its input and writes its output, twice in the backward
    # pass; the same holds for norms and attention
    per_token = case.widths + 4 * d + 2 * (case.heads + case.kv_heads) * model.head_dim
    hbm = (
        (passes - 1 + 2) * weights * case.itemsize  # read in each pass, gradients written and read
        + 7 * kept  # AdamW reads parameter, gradient and two moments, and writes three of them
        + passes * n * case.tokens * per_token * case.itemsize
        + 4 * case.tokens * case.vocabulary * _F32
    )
    model_flops = 3 * params.flops_per_token(model, case.length) * batch * case.length
    return Costs(model_flops, flops * case.tokens, hbm, _train_network(case), _passes(case))


def _passes(case: _Case) -> tuple[Pass, ...]:
    """Returns the passes of ring attention in a training step."""
    if case.sequence == 1:
        return ()
    model = case.model
    flops = _attention_flops(model, case.length) * case.heads / model.n_heads * case.tokens
    forward, backward = ring.passes(
        model.ring, case.sequence, case.tokens, case.heads, case.kv_heads, model.head_dim,
        case.itemsize, flops / model.n_layers,
    )  # fmt: skip
    again = (forward,) if model.remat else ()
    return (forward, *again, backward) * model.n_layers


def _train_network(case: _Case) -> dict[str, float]:
    model, n, d = case.model, case.model.n_layers, case.model.d_model
    share, around = (case.data - 1) / case.data, (case.ways - 1) / case.ways
    head, stream = case.vocabulary * d, case.tokens * d
    # sharded matrices: all-gather forward and backward, reduce-scatter of the gradients; replicated
    # matrices: all-reduce of the gradients
    data = (3 * case.layer_sent + 2 * (case.layer_weights - case.layer_sent)) * case.itemsize
    if d % case.data == 0:
        # output table and its f32 gradient; exchange of input embeddings, and back in f32
        data += head * (2 * case.itemsize + _F32) + stream * (case.itemsize + _F32)
    else:
        data += 2 * head * _F32 * (1 if model.tied else 2)
    # all-reduces after attention and after the MLP, forward and backward; recomputation repeats one
    # of them, or both if a norm follows
    sums = 4 + (1 + model.post_norm if model.remat else 0)
    result = {
        'data': share * data,
        'model': 2 * around * stream * (n * sums * case.itemsize + case.itemsize + _F32),
    }
    if case.sequence > 1:
        # the same over `sequence`, for the part of each matrix that is already sharded over `data`
        here, whole = case.layer_sent_sequence, case.layer_weights - case.layer_sent_sequence
        cut = (3 * here + 2 * whole) * case.itemsize + head * (2 * case.itemsize + _F32)
        exchanged = stream * (case.itemsize + _F32)
        result['sequence'] = (1 - 1 / case.sequence) * (cut / case.data + exchanged)
    return result


def _decode(case: _Case, batch: int) -> Costs:
    model, n, d, c = case.model, case.model.n_layers, case.model.d_model, case.model.head_dim
    keys = sum(
        min(case.length, model.window) if windowed and model.window else case.length
        for windowed in model.windowed_layers
    )
    head = case.vocabulary * d
    attention = 4 * case.heads * c * keys
    weights = case.layer_weights + head
    flops = (2 * weights + attention) * case.tokens
    row = 2 * case.kv_heads * c * case.itemsize + case.kv_heads * _F32  # key, value, position
    width = case.widths + 4 * d + 2 * (case.heads + case.kv_heads) * c
    hbm = (
        weights * case.itemsize
        + case.tokens * (keys + n) * row
        + case.tokens * (n * width * case.itemsize + 2 * case.vocabulary * _F32)
    )
    share, around = (case.data - 1) / case.data, (case.ways - 1) / case.ways
    stream = case.tokens * d * case.itemsize
    tables = head * case.itemsize + stream if d % case.data == 0 else 0
    network = {
        'data': share * (case.layer_sent * case.itemsize + tables),
        'model': 2 * around * stream * (2 * n + 1),
    }
    whole = params.count_body(model) + d * model.vocab_size
    model_flops = (2 * whole + 4 * model.n_heads * c * keys) * batch
    return Costs(model_flops, flops, hbm, network)


def memory(
    model: ModelConfig, batch: int, length: int, parts: dict[str, Any], mesh: AbstractMesh
) -> Memory:
    """Returns bytes per device; `parts` are those of `steps.Step`.

    Activations in training: the inputs of all blocks (without recomputation: all intermediate
    results), the working memory of one block, its gathered matrices, the gathered output table and
    its gradient, and parameters in the dtype of activations. In decoding: one block's gathered
    matrices and the logits.
    """
    kept = {name: bytes_per_device(tree) for name, tree in parts.items()}
    train = 'cache' not in parts
    case = _case(model, batch, length, train, mesh)
    gathered = case.data * case.sequence > 1
    sent = max(case.layer_sent, case.layer_sent_sequence)
    one_layer = sent / model.n_layers * case.itemsize
    table = case.vocabulary * model.d_model
    block = case.tokens * (case.widths + 4 * model.d_model) * case.itemsize
    # the next layer's matrices are gathered while the current ones are in use
    working = block + 2 * one_layer
    gradients = 0.0
    if train:
        gradients = kept['params']
        cast = kept['params'] * case.itemsize / np.dtype(model.param_dtype).itemsize
        working += cast if model.param_dtype != model.dtype else 0
        saved = case.tokens * model.d_model if model.remat else block / case.itemsize
        working += model.n_layers * saved * case.itemsize
        working += case.tokens * (cross_entropy.VOCABULARY_CHUNK + model.d_model) * _F32
        working += table * case.itemsize if gathered else 0
    else:
        working += case.tokens * case.vocabulary * _F32
        working += table * case.itemsize if gathered else 0
    return Memory(
        kept['params'], kept.get('optimizer', 0.0), kept.get('cache', 0.0), gradients, working
    )
