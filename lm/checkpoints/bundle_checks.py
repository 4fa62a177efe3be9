"""Checks of a bundle, run by `bundle.save` before writing and by `bundle.load`."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lm.checkpoints.architecture import Architecture
from lm.files import checksums
from lm.model.params import Params

# Parameters may take this many times their bytes on disk, plus this many bytes: trained ones hardly
# compress.
MOST_TIMES, MOST_MORE = 64, 1 << 30


def check_config(architecture: Architecture, config: Any) -> None:
    """Raises ValueError unless a config round-trips through JSON."""
    try:
        text = json.dumps(architecture.to_json(config), allow_nan=False)
        again = architecture.from_json(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f'the {architecture.name} config is not valid as JSON: {error}') from None
    if again != config:
        raise ValueError(
            f'the {architecture.name} config does not come back from its JSON: {config!r} is read '
            f'as {again!r}'
        )


def check_bos(bos: Any, vocab_size: int) -> None:
    """Raises ValueError unless `bos` is None or one of `vocab_size` ids."""
    if bos is not None and not (type(bos) is int and 0 <= bos < vocab_size):
        raise ValueError(f'bos: {bos!r}; expected null or an id below {vocab_size}')


def check_metrics(metrics: Any) -> None:
    """Raises ValueError unless metrics map names to numbers."""
    if not isinstance(metrics, Mapping):
        raise ValueError(f'metrics: {metrics!r}; expected an object')
    for name, value in metrics.items():
        if not (isinstance(name, str) and isinstance(value, int | float)):
            raise ValueError(f'metrics: {name!r}: {value!r}; expected a name and a number')


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics that JSON can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def check_params(params: Params, like: Params) -> None:
    """Raises ValueError, naming every difference, unless parameters have the leaves of `like`."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: x is None)
    problems = _differences({checksums.name(p): _kind(x) for p, x in leaves}, like)
    have, want = (str(jax.tree.structure(tree)) for tree in (params, like))
    if not problems and have != want:
        problems = [f'nested as {have}, not as {want}']
    if problems:
        raise ValueError('params do not fit the config: ' + '; '.join(problems))


def check_saved(saved: Params, like: Params) -> None:
    """Raises ValueError, naming every difference, unless the saved leaves are those of `like`."""
    problems = _differences(checksums.kinds(saved), like)
    # a chunk is unpacked whole, even if the array needs little of it
    problems += [
        f'{checksums.name(p)} is stored in pieces of {x.storage.chunk_shape}'
        for p, x in jax.tree_util.tree_leaves_with_path(saved)
        if any(piece > size for piece, size in zip(x.storage.chunk_shape, x.shape))
    ]
    if problems:
        raise ValueError('params do not fit config.json: ' + '; '.join(problems))


def check_size(folder: epath.Path, like: Params) -> None:
    """Raises ValueError if a few bytes on disk would unpack to far more memory.

    TensorStore reads missing chunks as zeros, however large an array the header claims.
    """
    wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    if wanted <= MOST_MORE:
        return
    held = sum((at / name).stat().length for at, _, names in folder.walk() for name in names)
    if wanted > MOST_TIMES * held + MOST_MORE:
        raise ValueError(
            f'config.json asks for {wanted:,} bytes of parameters, params/ has {held:,}: damaged; '
            'copy the bundle again'
        )


def _kind(leaf: Any) -> str:
    """Returns dtype and shape like `checksums.kinds`, or the type's name if not an array."""
    if hasattr(leaf, 'dtype') and hasattr(leaf, 'shape'):
        return f'{leaf.dtype}{list(leaf.shape)}'
    return type(leaf).__name__


def _differences(have: Mapping[str, str], like: Params) -> list[str]:
    """Lists each leaf that is missing, unexpected, or of another dtype or shape."""
    want = checksums.kinds(like)
    problems = [f'{name} is missing' for name in sorted(set(want) - set(have))]
    problems += [f'{name} is not part of this model' for name in sorted(set(have) - set(want))]
    return problems + [
        f'{name} is {have[name]}, expected {want[name]}'
        for name in sorted(set(want) & set(have))
        if have[name] != want[name]
    ]
