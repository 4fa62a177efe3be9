"""Imports and exports Hugging Face checkpoints: Llama, Mistral, Qwen and Gemma in safetensors.

A folder holds config.json and model.safetensors, or several shards and an index. Loading reads JSON
and arrays and executes no code.
"""

import functools
import json
import math
import mmap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.devices import mesh as mesh_lib
from lm.files import atomic, json_fields
from lm.huggingface import config as huggingface_config
from lm.huggingface import safetensors_files
from lm.huggingface.families import FAMILIES, Family
from lm.huggingface.safetensors_files import LazyTensor, Tensor
from lm.huggingface.weight_map import LeafSlice, by_name, leaf_slices, mismatches, text_tensors
from lm.model import params as params_lib
from lm.model.config import DTYPES, Config
from lm.model.params import Params

MOST_SHARD_BYTES = 5_000_000_000


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors have been checked against its config.

    Attributes:
      family: the model's family.
      config: the model's config.
      tensors: the location of each tensor, by its name in a text-only checkpoint of the family.
    """

    family: Family
    config: Config
    tensors: dict[str, Tensor]


def check(folder: epath.PathLike, dtype: str | None = None) -> Checkpoint:
    """Validates a checkpoint; reads only JSON and the headers of its tensor files.

    Args:
      folder: local or on `gs://`.
      dtype: dtype of the parameters, 'float32' or 'bfloat16'. Default: bfloat16 if all tensors are
        bfloat16, else float32, which represents every float16 exactly.

    Raises:
      FileNotFoundError: the folder, its config.json or its safetensors files do not exist.
      ValueError: lists every problem: missing or damaged files; an unsupported family or setting;
        missing or unexpected tensors; shapes and dtypes other than config.json implies.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f'dtype: {dtype!r}; expected one of {", ".join(DTYPES)}')
    root = atomic.absolute(folder)
    described = json_fields.read(root / 'config.json')
    multimodal = described.get('model_type') == huggingface_config.MULTIMODAL
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    try:
        tensors = text_tensors(safetensors_files.read_folder(root), multimodal)
    except ValueError as error:
        problems.append(str(error))
    narrow = tensors and all(t.dtype == 'BF16' for t in tensors.values())
    try:
        family, config = huggingface_config.read(
            described, dtype or ('bfloat16' if narrow else 'float32')
        )
    except ValueError as error:
        problems.append(f'config.json: {error}')
    else:
        # count first: a claimed number of layers must not make a name for each of them
        if tensors and config.n_layers > len(tensors):
            problems.append(f'{config.n_layers} layers, but only {len(tensors)} tensors')
        elif tensors:
            problems += mismatches(leaf_slices(config, family), tensors)
    if problems:
        raise ValueError(f'{folder}: {"; ".join(problems)}')
    return Checkpoint(family, config, tensors)


def load(
    folder: epath.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[Config, Params]:
    """Loads a checkpoint's config and its parameters, sharded over `mesh`.

    Tensors stream one at a time from their file to their devices. In addition to the parameters,
    this process holds one tensor at most, or only the shards of it that its devices need.

    Args:
      folder: local or on `gs://`.
      mesh: default: all devices.
      dtype: see `check`; values of a wider dtype are rounded to the nearest.

    Raises:
      FileNotFoundError, ValueError: see `check`; raised before any tensor is loaded.
    """
    family, config, tensors = check(folder, dtype)
    abstract = params_lib.abstract(config, mesh or mesh_lib.make())
    leaves, wanted = by_name(abstract), leaf_slices(config, family)
    found: dict[str, jax.Array] = {}
    for name in sorted(wanted, key=lambda name: (str(tensors[name].file), tensors[name].begin)):
        target, leaf = wanted[name], leaves[wanted[name].leaf]
        value = _to_devices(tensors[name], target, leaf)
        if target.layer is not None:
            stack = found.pop(target.leaf, None)
            if stack is None:
                stack = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            value = _insert(stack, value, target.layer, order=target.order, sharding=leaf.sharding)
        found[target.leaf] = jax.block_until_ready(value)  # at most one tensor in flight
    return config, jax.tree.unflatten(jax.tree.structure(abstract), [found[x] for x in leaves])


@functools.partial(jax.jit, static_argnames=('order', 'sharding'), donate_argnums=0)
def _insert(stack, tensor, layer, *, order: tuple[int, ...], sharding: NamedSharding):
    """Writes a tensor into its layer of a stacked leaf, in place; transposes on the device."""
    # as integers: for bfloat16, the CPU backend would rewrite the whole stack
    bits = jnp.dtype(f'uint{8 * stack.dtype.itemsize}')
    layer_bits = jax.lax.bitcast_convert_type(tensor, bits).transpose(order)
    stack_bits = jax.lax.bitcast_convert_type(stack, bits)
    stack_bits = jax.lax.dynamic_update_index_in_dim(stack_bits, layer_bits, layer, 0)
    stack = jax.lax.bitcast_convert_type(stack_bits, stack.dtype)
    return jax.lax.with_sharding_constraint(stack, sharding)


def _to_devices(tensor: Tensor, target: LeafSlice, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a tensor on its devices: one axis per letter, each sharded as in the leaf."""
    assert isinstance(leaf.sharding, NamedSharding)
    spec = [*leaf.sharding.spec, *[None] * (len(leaf.shape) - len(leaf.sharding.spec))]
    of_letter = dict(zip(target.order, spec[-len(target.order) :]))
    axes = PartitionSpec(*[of_letter[i] for i in range(len(of_letter))])
    sharding = NamedSharding(leaf.sharding.mesh, axes)
    shape = target.split_shape
    parts = {
        device: tuple(range(size)[s] for s, size in zip(index or (), shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {part: _empty([len(axis) for axis in part], leaf.dtype) for part in parts.values()}
    unit = math.prod(target.sizes[x] for x in target.groups[0][1:])
    for row, rows in safetensors_files.blocks(tensor, unit):
        _fill(buffers, row // unit, rows.reshape(-1, *shape[1:]))
    arrays = [jax.device_put(buffers[part], device) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an mmap-backed array, so that its pages return to the OS when it is freed."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype, math.prod(shape)).reshape(shape)


def _fill(buffers: dict[tuple[range, ...], np.ndarray], start: int, rows: np.ndarray) -> None:
    """Copies rows, the first of index `start`, into the buffers that cover any of them."""
    for (mine, *others), buffer in buffers.items():
        first, last = max(mine.start, start), min(mine.stop, start + len(rows))
        if first < last:
            inside = tuple(slice(axis.start, axis.stop) for axis in others)
            part = rows[(slice(first - start, last - start), *inside)]
            buffer[first - mine.start : last - mine.start] = part


def save(
    folder: epath.PathLike,
    config: Config,
    params: Params,
    family: str | None = None,
    *,
    ids: Mapping[str, int] | None = None,
    files: Mapping[str, str] | None = None,
    most_shard_bytes: int = MOST_SHARD_BYTES,
) -> str:
    """Writes a checkpoint that `load` and transformers can read, complete or not at all.

    Args:
      folder: an existing checkpoint there is replaced.
      config, params: the model; parameters keep their dtype.
      family: `model_type` to write; default: the first family that can represent the model.
      ids: `bos_token_id`, `eos_token_id` and `pad_token_id`; missing ones are written as null.
      files: name and text of additional files, such as a tokenizer's.
      most_shard_bytes: limit on the bytes of tensors in one file.

    Returns:
      The family's `model_type`.

    Raises:
      ValueError: no family, or not this one, can represent the model; or parameters are sharded
        over several processes.
      FileExistsError: `folder` exists and is not a checkpoint.
      OSError: the checkpoint could not be written; says why.
    """
    known = {candidate.model_type: candidate for candidate in FAMILIES}
    if family is not None and family not in known:
        raise ValueError(f'family: {family!r}; expected one of {", ".join(known)}')
    chosen = huggingface_config.find(config) if family is None else known[family]
    described = huggingface_config.write(config, chosen)
    described |= dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')) | dict(ids or {})
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        raise ValueError('parameters are sharded over several processes; export from a single one')
    check_replaceable(folder)
    leaves = by_name(params)
    slices = leaf_slices(config, chosen)
    tensors = {name: _tensor(leaves[source.leaf], source) for name, source in slices.items()}
    with atomic.new_folder(folder) as partial:
        for name, text in (files or {}).items():
            (partial / name).write_text(text)
        safetensors_files.write_folder(partial, tensors, most_shard_bytes)
        (partial / 'config.json').write_text(json.dumps(described, indent=2) + '\n')
    return chosen.model_type


def check_replaceable(folder: epath.PathLike) -> None:
    """Raises FileExistsError as `save` would: `folder` exists and is not a checkpoint."""
    atomic.check_replaceable(folder, 'checkpoint', 'model_type')


def _tensor(leaf: jax.Array, source: LeafSlice) -> LazyTensor:
    order = tuple(int(i) for i in np.argsort(source.order))

    def make() -> np.ndarray:
        value = leaf if source.layer is None else _extract(leaf, source.layer, order=order)
        return np.asarray(value).reshape(source.shape)

    return LazyTensor(np.dtype(leaf.dtype), source.shape, make)


@functools.partial(jax.jit, static_argnames='order')
def _extract(stack, layer, *, order: tuple[int, ...]):
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False).transpose(order)
