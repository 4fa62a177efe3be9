"""What one step costs, counted from the config: memory, FLOPs, traffic.

The compiler's own figure for FLOPs counts the body of a loop once, so that a model scanned over
its layers looks like one layer; these counts follow from the shapes and need no compilation.
They say what the step must do, not what a compiler makes of it: element-wise work is fused into the
matrix products beside it, attention keeps no logits in memory, and communication is as in
fully sharded data parallelism over `data` and `sequence` (Rajbhandari et al. 2020, ZeRO-3), tensor
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
    """Bytes on one device: what stays between steps, exact, and what a step adds, an estimate."""

    params: float
    optimizer: float
    cache: float
    gradients: float
    activations: float

    @property
    def kept(self) -> float:
        """Between steps."""
        return self.params + self.optimizer + self.cache

    @property
    def total(self) -> float:
        """At the peak of a step."""
        return sum(self)


class Costs(NamedTuple):
    """One step.

    Attributes:
      model_flops: of the whole step, all devices: what the model needs, forward three times for
        training. Model FLOP/s utilisation is counted in these.
      device_flops: of one device, with what is computed again in the backward pass and what
        devices compute alike.
      hbm_bytes: that one device reads and writes.
      network_bytes: that one device sends, by axis of the mesh, but for what `ring` has.
      ring: passes of attention over sequences that are cut, all of the step.
    """

    model_flops: float
    device_flops: float
    hbm_bytes: float
    network_bytes: dict[str, float]
    ring: tuple[Pass, ...] = ()


class _Case(NamedTuple):
    """What the counts share: sizes on one device.

    `weights` counts entries of matrices that a device multiplies with: cut over `model`, gathered
    over `data` and `sequence`; `sent` those of them that are gathered over each. `widths` sums what
    goes into and comes out of them, per token.
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
    """Returns bytes that one device holds of a pytree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _case(model: ModelConfig, batch: int, length: int, train: bool, mesh: AbstractMesh) -> _Case:
    data, sequence, ways = (mesh.shape[axis] for axis in mesh_lib.AXES)

    def part(axes, shape, name):  # 1/n of it lies on a device
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
    """Returns the `Costs` of a training step, or of decoding one token per row.

    Args:
      model: its config.
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
    head = case.vocabulary * d  # the output table, whose products are computed again always
    flops = passes * (2 * case.layer_weights + attention) + 4 * 2 * head
    weights = case.layer_weights + head
    kept = bytes_per_device(params.abstract(model, mesh))
    # per token and block: a product reads its input and writes its output, twice in the backward
    # pass; so do the norms and attention
    per_token = case.widths + 4 * d + 2 * (case.heads + case.kv_heads) * model.head_dim
    hbm = (
        (passes - 1 + 2) * weights * case.itemsize  # read in each pass, gradients written and read
        + 7 * kept  # AdamW reads parameter, gradient and moments, and writes three of them back
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
    # matrices are gathered forward and backward and their gradients summed and scattered; those
    # that every device holds whole have their gradients summed everywhere
    data = (3 * case.layer_sent + 2 * (case.layer_weights - case.layer_sent)) * case.itemsize
    if d % case.data == 0:
        # the output table with its f32 gradient; the input's vectors, exchanged, and back in f32
        data += head * (2 * case.itemsize + _F32) + stream * (case.itemsize + _F32)
    else:
        data += 2 * head * _F32 * (1 if model.tied else 2)
    # all-reduces after attention and after the MLP, forward and backward; the recomputation needs
    # one of them, or both where a norm follows
    sums = 4 + (1 + model.post_norm if model.remat else 0)
    result = {
        'data': share * data,
        'model': 2 * around * stream * (n * sums * case.itemsize + case.itemsize + _F32),
    }
    if case.sequence > 1:
        # the same of what lies on the devices of one row of the mesh: cut by `data` already
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

    Of activations are counted: in training the blocks' inputs (or, without recomputation, all
    that they compute), one block's work, its matrices gathered, the output table gathered with
    its gradient, and parameters in the activations' dtype; in decoding one block's gathered
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
    # a matrix whose gather is under way lies beside the one in use
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
