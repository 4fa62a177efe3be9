"""Checkpoints of Hugging Face in and out: Llama, Mistral, Qwen and Gemma in safetensors.

A folder holds config.json and model.safetensors, or several such files and an index. Loading reads
JSON and arrays and executes nothing.
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
from lm.huggingface.safetensors_files import Source, Tensor
from lm.huggingface.weight_map import Place, by_name, mismatches, places, text_tensors
from lm.model import params as params_lib
from lm.model.config import DTYPES, Config
from lm.model.params import Params

MOST_SHARD_BYTES = 5_000_000_000


class Checkpoint(NamedTuple):
    """A folder whose tensors are known to fit its config.

    Attributes:
      family, config: of the model.
      tensors: name -> where it lies; names as the family has them.
    """

    family: Family
    config: Config
    tensors: dict[str, Tensor]


def check(folder: epath.PathLike, dtype: str | None = None) -> Checkpoint:
    """Returns what a folder holds, after reading no more than JSON and headers.

    Args:
      folder: local or on `gs://`.
      dtype: of the parameters, 'float32' or 'bfloat16'; by default bfloat16 where all tensors are,
        else float32, which holds every float16, too.

    Raises:
      FileNotFoundError: no such folder, or it has no config.json or no safetensors.
      ValueError: names everything that is wrong: files that are missing or damaged; a family or a
        setting that is not supported; tensors that are missing, left over, or of another shape or
        dtype than config.json asks for.
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
        # not before it is known that there are so many: a name for each layer takes memory
        if tensors and config.n_layers > len(tensors):
            problems.append(f'{config.n_layers} layers, but only {len(tensors)} tensors')
        elif tensors:
            problems += mismatches(places(config, family), tensors)
    if problems:
        raise ValueError(f'{folder}: {"; ".join(problems)}')
    return Checkpoint(family, config, tensors)


def load(
    folder: epath.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[Config, Params]:
    """Returns the config and the parameters of a checkpoint, sharded over `mesh`.

    Tensors go one by one from their file to their devices; beside the parameters, this process
    holds one tensor at a time, or the part of it that its devices keep.

    Args:
      folder: local or on `gs://`.
      mesh: default: all devices.
      dtype: see `check`; values are rounded to the nearest where it is narrower than theirs.

    Raises:
      FileNotFoundError, ValueError: see `check`; before any tensor is loaded.
    """
    family, config, tensors = check(folder, dtype)
    abstract = params_lib.abstract(config, mesh or mesh_lib.make())
    leaves, wanted = by_name(abstract), places(config, family)
    found: dict[str, jax.Array] = {}
    for name in sorted(wanted, key=lambda name: (str(tensors[name].file), tensors[name].begin)):
        place, leaf = wanted[name], leaves[wanted[name].leaf]
        value = _to_devices(tensors[name], place, leaf)
        if place.layer is not None:
            stack = found.pop(place.leaf, None)
            if stack is None:
                stack = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            value = _insert(stack, value, place.layer, order=place.order, sharding=leaf.sharding)
        found[place.leaf] = jax.block_until_ready(value)  # one tensor at a time, on its way, too
    return config, jax.tree.unflatten(jax.tree.structure(abstract), [found[x] for x in leaves])


@functools.partial(jax.jit, static_argnames=('order', 'sharding'), donate_argnums=0)
def _insert(stack, tensor, layer, *, order: tuple[int, ...], sharding: NamedSharding):
    """Writes a tensor into its layer of the leaf, in place; the device transposes."""
    # as bits: a CPU would go through all of a bfloat16 stack, and write it anew
    bits = jnp.dtype(f'uint{8 * stack.dtype.itemsize}')
    layer_bits = jax.lax.bitcast_convert_type(tensor, bits).transpose(order)
    stack_bits = jax.lax.bitcast_convert_type(stack, bits)
    stack_bits = jax.lax.dynamic_update_index_in_dim(stack_bits, layer_bits, layer, 0)
    stack = jax.lax.bitcast_convert_type(stack_bits, stack.dtype)
    return jax.lax.with_sharding_constraint(stack, sharding)


def _to_devices(tensor: Tensor, place: Place, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a tensor with an axis for each letter, each sharded as it is in the leaf."""
    assert isinstance(leaf.sharding, NamedSharding)
    spec = [*leaf.sharding.spec, *[None] * (len(leaf.shape) - len(leaf.sharding.spec))]
    of_letter = dict(zip(place.order, spec[-len(place.order) :]))
    axes = PartitionSpec(*[of_letter[i] for i in range(len(of_letter))])
    sharding = NamedSharding(leaf.sharding.mesh, axes)
    shape = place.split_shape
    parts = {
        device: tuple(range(size)[s] for s, size in zip(index or (), shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {part: _empty([len(axis) for axis in part], leaf.dtype) for part in parts.values()}
    unit = math.prod(place.sizes[x] for x in place.groups[0][1:])
    for row, rows in safetensors_files.blocks(tensor, unit):
        _fill(buffers, row // unit, rows.reshape(-1, *shape[1:]))
    arrays = [jax.device_put(buffers[part], device) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array that goes back to the system when it is dropped; malloc would keep some."""
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype, math.prod(shape)).reshape(shape)


def _fill(buffers: dict[tuple[range, ...], np.ndarray], start: int, rows: np.ndarray) -> None:
    """Copies to each buffer its part of some rows, which begin at `start` of the first axis."""
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
    """Writes a checkpoint that `load` and transformers read, whole or not at all.

    Args:
      folder: an older checkpoint there is replaced.
      config, params: the model; parameters keep their dtype.
      family: `model_type` to write; by default the first that has models like this.
      ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as there are such.
      files: names and texts of other files, a tokenizer's.
      most_shard_bytes: of tensors in one file.

    Returns:
      The family.

    Raises:
      ValueError: no family, or not this one, has models like this; or parameters are spread over
        other processes.
      FileExistsError: `folder` is there and is no checkpoint.
      OSError: it could not be written; says why.
    """
    known = {candidate.model_type: candidate for candidate in FAMILIES}
    if family is not None and family not in known:
        raise ValueError(f'family: {family!r}; expected one of {", ".join(known)}')
    chosen = huggingface_config.find(config) if family is None else known[family]
    described = huggingface_config.write(config, chosen)
    described |= dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')) | dict(ids or {})
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        raise ValueError('parameters are spread over several processes; export from one')
    check_replaceable(folder)
    leaves = by_name(params)
    sources = {n: _source(leaves[p.leaf], p) for n, p in places(config, chosen).items()}
    with atomic.new_folder(folder) as partial:
        for name, text in (files or {}).items():
            (partial / name).write_text(text)
        safetensors_files.write_folder(partial, sources, most_shard_bytes)
        (partial / 'config.json').write_text(json.dumps(described, indent=2) + '\n')
    return chosen.model_type


def check_replaceable(folder: epath.PathLike) -> None:
    """Raises FileExistsError where `save` would: `folder` is there and is no checkpoint."""
    atomic.check_replaceable(folder, 'checkpoint', 'model_type')


def _source(leaf: jax.Array, place: Place) -> Source:
    order = tuple(int(i) for i in np.argsort(place.order))

    def make() -> np.ndarray:
        value = leaf if place.layer is None else _extract(leaf, place.layer, order=order)
        return np.asarray(value).reshape(place.shape)

    return Source(np.dtype(leaf.dtype), place.shape, make)


@functools.partial(jax.jit, static_argnames='order')
def _extract(stack, layer, *, order: tuple[int, ...]):
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False).transpose(order)
