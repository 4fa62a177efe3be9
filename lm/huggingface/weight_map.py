"""Maps the tensors of a checkpoint to leaves of `lm.model.params`, and finds mismatches."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from lm.huggingface import safetensors_files
from lm.huggingface.families import OUTER, Family
from lm.huggingface.safetensors_files import Tensor
from lm.model import params as params_lib
from lm.model.config import Config
from lm.model.params import Params

_LAYER = 'model.layers.{}.'
# prefixes of the text model in multimodal checkpoints, older and newer
_RENAMED = (
    ('language_model.model.', 'model.'), ('model.language_model.', 'model.'),
    ('language_model.lm_head.', 'lm_head.'),
)  # fmt: skip
_OTHER_PARTS = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\.')
_BUFFER = re.compile(r'.*\.rotary_emb\.inv_freq$')  # derived from config.json


class LeafSlice(NamedTuple):
    """The part of a leaf that one tensor of a checkpoint holds.

    Attributes:
      leaf: name of the leaf, as in `by_name`.
      layer: index along the leaf's first axis if layers are stacked there, else None.
      groups: the tensor's axes, as the letters that each one merges.
      sizes: size of each letter.
      order: for each axis of the leaf except layers, its index among the tensor's letters.
    """

    leaf: str
    layer: int | None
    groups: tuple[str, ...]
    sizes: dict[str, int]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in its file."""
        return tuple(math.prod(self.sizes[x] for x in group) for group in self.groups)

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Shape of the tensor with one axis per letter."""
        return tuple(self.sizes[x] for x in ''.join(self.groups))


def leaf_slices(config: Config, family: Family) -> dict[str, LeafSlice]:
    """Returns the part of a leaf that each tensor of a checkpoint holds, by the tensor's name."""
    leaves = by_name(params_lib.abstract(config))
    found = {}
    for name, (leaf, groups) in OUTER.items():
        if leaf in leaves:
            found[name] = _leaf_slice(leaf, leaves[leaf].shape, groups, None)
    for i in range(config.n_layers):
        for name, (last, groups) in family.layer.items():
            leaf = f'body/layers/{last}'
            found[_LAYER.format(i) + name] = _leaf_slice(leaf, leaves[leaf].shape, groups, i)
    return found


def text_tensors(tensors: dict[str, Tensor], multimodal: bool) -> dict[str, Tensor]:
    """Returns the text model's tensors, named as in a text-only checkpoint.

    Raises:
      ValueError: two tensors have the same name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _BUFFER.match(name) or (multimodal and _OTHER_PARTS.match(name)):
            continue
        for theirs, plain in _RENAMED if multimodal else ():
            if name.startswith(theirs):
                name = plain + name.removeprefix(theirs)
                break
        if name in found:
            raise ValueError(f'{tensor.file}: duplicate tensor {name}')
        found[name] = tensor
    return found


def mismatches(wanted: dict[str, LeafSlice], tensors: dict[str, Tensor]) -> Iterator[str]:
    """Describes each mismatch: tensors missing, unexpected, or of another shape or dtype."""
    head, table = tensors.get('lm_head.weight'), tensors.get('model.embed_tokens.weight')
    extra = tensors.keys() - wanted.keys()
    if 'lm_head.weight' in extra and head and table and head.shape == table.shape:
        extra -= {'lm_head.weight'}  # a tied table may be stored a second time
        if not _equal(head, table):
            yield 'lm_head.weight: differs from the input table, though tie_word_embeddings is true'
    if missing := _together(wanted.keys() - tensors.keys()):
        yield f'missing: {missing}'
    if unknown := _together(extra):
        yield f'not part of this model: {unknown}'
    for name in sorted(wanted.keys() & tensors.keys()):
        tensor, shape = tensors[name], wanted[name].shape
        if tensor.shape != shape:
            yield f'{name}: shape {list(tensor.shape)}, expected {list(shape)}'
        if tensor.dtype not in safetensors_files.DTYPES:
            known = ', '.join(safetensors_files.DTYPES)
            yield f'{name}: dtype {tensor.dtype[:20]}, expected one of {known}'


def by_name(params: Params) -> dict[str, Any]:
    """Returns the leaves of nested parameters in order, by path, such as `body/layers/wq_NDHC`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {'/'.join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _leaf_slice(leaf: str, shape: tuple[int, ...], groups: str, layer: int | None) -> LeafSlice:
    letters = leaf.rpartition('_')[2]
    sizes = dict(zip(letters, shape))
    split = tuple(a or b for a, b in re.findall(r'\((\w+)\)|(\w)', groups))
    order = tuple(''.join(split).index(x) for x in letters.removeprefix('N'))
    return LeafSlice(leaf, layer, split, sizes, order)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors of the same shape are bit-identical; reads both in blocks."""
    if a.dtype != b.dtype or a.dtype not in safetensors_files.DTYPES:
        return False
    both = zip(safetensors_files.blocks(a), safetensors_files.blocks(b))
    return all(x.tobytes() == y.tobytes() for (_, x), (_, y) in both)


def _together(names: Iterable[str]) -> str:
    """Joins names, merging those that differ in one number only, such as a layer's."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in sorted(names):
        before, number, after = re.match(r'(.*?\.|)(\d{1,9})(\..*)|', name).groups()  # type: ignore[union-attr]
        key = (before, after) if number else (name, '')
        groups.setdefault(key, []).extend([int(number)] if number else [])
    listed = []
    for (before, after), numbers in groups.items():
        inside = ','.join(map(str, sorted(numbers)))
        if len(numbers) > 2 and max(numbers) - min(numbers) == len(numbers) - 1:
            inside = f'{min(numbers)}-{max(numbers)}'
        listed.append(f'{before}{inside}{after}' if numbers else before)
    return ', '.join(listed)
