"""Safetensors files: validates headers before reading any tensor, and streams tensors in blocks.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype", "shape", "data_offsets"}, padded with spaces
    data      the tensors' bytes, row-major, without gaps

A folder holds one such file, or several shards and an index that maps each tensor to its shard.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from lm.files import json_fields

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
BLOCK = 1 << 22  # bytes read at once

DTYPES = {
    'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16),
}  # fmt: skip
# bits per element of the format's other dtypes, which callers refuse
_OTHER_BITS = {
    'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E5M2': 8, 'F8_E4M3': 8, 'F8_E8M0': 8, 'I16': 16, 'U16': 16,
    'I32': 32, 'U32': 32, 'I64': 64, 'U64': 64, 'F64': 64, 'C64': 64,
}  # fmt: skip
_BITS = _OTHER_BITS | {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_FORBIDDEN = re.compile(r'[/\\\x00-\x1f]|^\.*$')


class Tensor(NamedTuple):
    """The location of a tensor.

    Attributes:
      file: its file.
      dtype: in the format's spelling; `DTYPES` lists those that can be read.
      shape: its shape.
      begin, size: offset in the file and size, in bytes.
    """

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class LazyTensor(NamedTuple):
    """A tensor to be written; `make` computes its values just before."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_folder(folder: epath.Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder, by name.

    Symbolic links are followed, since hub caches consist of them; file names in the index cannot
    leave the folder.

    Raises:
      FileNotFoundError: there is neither `model.safetensors` nor an index.
      ValueError: names every file that is missing, damaged, or at odds with the index.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        others = [file.name for file in folder.glob('*.bin')]
        hint = f'; {others[0]} is a pickle, which is never read: convert it' if others else ''
        raise FileNotFoundError(f'{folder}: contains neither {SINGLE} nor {INDEX}{hint}')
    weight_map = json_fields.read(folder / INDEX).get('weight_map')
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in names) or not weight_map:
        raise ValueError(f'{folder / INDEX}: "weight_map" does not map tensors to file names')
    promised: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        promised.setdefault(name, set()).add(tensor)
    found: dict[str, Tensor] = {}
    problems = []
    for name in sorted(promised):
        if _FORBIDDEN.search(name):
            problems.append(f'{folder / INDEX}: {name!r} is not the name of a file in the folder')
            continue
        try:
            tensors = read_header(folder / name)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        for tensor in sorted(found.keys() & tensors.keys()):
            problems.append(f'{folder / name}: duplicate tensor {tensor}, also in another file')
        absent = sorted(promised[name] - tensors.keys())
        if absent:
            problems.append(
                f'{folder / name}: lacks tensors that the index lists: {", ".join(absent)}'
            )
        found |= tensors
    if problems:
        raise ValueError('; '.join(problems))
    return found


def read_header(file: epath.Path) -> dict[str, Tensor]:
    """Returns the tensors of one file, by name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the header is damaged, or does not fit the file's size.
    """
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such file')
    size = file.stat().length
    with file.open('rb') as reader:
        length = int.from_bytes(reader.read(8), 'little')
        if size < 8 or length > min(size - 8, json_fields.MOST_BYTES):
            raise ValueError(
                f'{file}: damaged or truncated: {size:,} bytes, with a header of {length:,}'
            )
        entries = json_fields.parse(reader.read(length), f'{file}: header')
    entries.pop('__metadata__', None)
    tensors = {name: _tensor(file, name, entry) for name, entry in entries.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin != end:
            raise ValueError(f'{file}: damaged: {name} begins at byte {tensor.begin}, not at {end}')
        end += tensor.size
    if end != size - 8 - length:
        raise ValueError(
            f'{file}: damaged or truncated: {size - 8 - length:,} bytes of tensors, '
            f'but the header lists {end:,}'
        )
    start = 8 + length
    return {name: t._replace(begin=t.begin + start) for name, t in tensors.items()}


def _tensor(file: epath.Path, name: str, entry: Any) -> Tensor:
    damaged = f'{file}: damaged: header entry of {name[:200]!r}: '
    if not name.isprintable():
        raise ValueError(f'{damaged}expected a printable name')
    if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'{damaged}expected dtype, shape and data_offsets')
    dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    for numbers in (shape, offsets):
        # short lists of bounded numbers, so that their product is cheap
        if not isinstance(numbers, list) or len(numbers) > 32 or not all(map(_is_size, numbers)):
            raise ValueError(f'{damaged}shape and data_offsets must be lists of sizes')
    if not isinstance(dtype, str) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f'{damaged}expected the name of a dtype, and two offsets in order')
    begin, size = offsets[0], offsets[1] - offsets[0]
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * size:
        raise ValueError(f'{damaged}{size:,} bytes for {dtype}{shape}')
    return Tensor(file, dtype, tuple(shape), begin, size)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def blocks(tensor: Tensor, unit: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) in order, by a multiple of `unit` rows and about `BLOCK` bytes.

    Raises:
      ValueError: the file ends too soon: it has changed since its header was read.
    """
    dtype = DTYPES[tensor.dtype]
    rows, *rest = tensor.shape or (1,)
    step = unit * max(1, BLOCK // max(1, unit * math.prod(rest) * dtype.itemsize))
    with tensor.file.open('rb') as reader:
        reader.seek(tensor.begin)
        for start in range(0, rows, step):
            shape = (min(step, rows - start), *rest)
            data = reader.read(math.prod(shape) * dtype.itemsize)
            if len(data) < math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{tensor.file}: ends too soon: it changed while it was read')
            yield start, np.frombuffer(data, dtype).reshape(shape)


def write_file(file: epath.Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes one file, one tensor at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers requires it
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.size]
        header[name] = {
            'dtype': names[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': offsets,
        }  # fmt: skip
        end += tensor.size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # aligns the tensors
    with file.open('wb') as writer:
        writer.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.make(), tensor.dtype)
            assert values.shape == tensor.shape, (values.shape, tensor.shape)
            writer.write(values.reshape(-1).view(np.uint8))


def write_folder(folder: epath.Path, tensors: Mapping[str, LazyTensor], most_bytes: int) -> None:
    """Writes one file, or an index and shards of at most `most_bytes` of tensors each.

    A larger tensor gets a shard of its own.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    room = most_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.size > room:
            shards.append({})
            room = most_bytes
        shards[-1][name] = tensor
        room -= tensor.size
    names = _shard_names(len(shards))
    for name, shard in zip(names, shards):
        write_file(folder / name, shard)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        described = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        (folder / INDEX).write_text(json.dumps(described, indent=2) + '\n')


def _shard_names(count: int) -> Sequence[str]:
    if count == 1:
        return [SINGLE]
    return [f'model-{i:05}-of-{count:05}.safetensors' for i in range(1, count + 1)]
