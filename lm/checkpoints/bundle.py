"""A model on disk: its config, its tokenizer, its parameters, and where they come from.

PATH/config.json    format, model config, metrics, commit
PATH/tokenizer/     written by the tokenizer's own `save`
PATH/params/        Orbax
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from lm.checkpoints import restore
from lm.devices import mesh as mesh_lib
from lm.devices import processes
from lm.files import atomic, checksums, json_fields, provenance
from lm.model import config as config_lib
from lm.model import params as params_lib
from lm.model.config import Config
from lm.model.params import Params

FORMAT = 1
# Parameters may take so many times their bytes on disk, and so many more: what was trained hardly
# packs at all.
MOST_TIMES, MOST_MORE = 64, 1 << 30


class Saves(Protocol):
    """Anything that can write itself into a folder: a tokenizer."""

    def save(self, path: epath.PathLike) -> None:
        """Writes into the folder `path`."""
        ...


class Bundle(NamedTuple):
    """A loaded model; `tokenization.loading.load(bundle.tokenizer_path)` gives its tokenizer.

    Attributes:
      config, params: the model.
      tokenizer_path: folder of its tokenizer.
      bos: the id that starts a document, not one of the tokenizer's; None if there is none.
      metrics: as they were saved.
    """

    config: Config
    params: Params
    tokenizer_path: epath.Path
    bos: int | None
    metrics: dict[str, float]


def save(
    path: epath.PathLike,
    config: Config,
    params: Params,
    tokenizer: Saves,
    bos: int | None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes a bundle, replacing an older one at `path`; a failure leaves the older one.

    All processes that hold parts of `params` call it; each writes its own.

    Args:
      path: a folder, local or on `gs://`, that all processes see.
      config: of the model.
      params: its parameters.
      tokenizer: writes itself into the bundle.
      bos: the input-only id in front of each document that the model was trained on, or None.
      metrics: what is known of the model; numbers that are not finite are left out.

    Raises:
      FileExistsError: `path` is there and is no bundle.
      OSError: the bundle could not be written; says why.
    """
    check_replaceable(path)
    hashed = digest(config, params)
    with processes.new_folder(path) as folder:
        if processes.is_first():
            tokenizer.save(folder / 'tokenizer')
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / 'params', params)
        described = {
            'format': FORMAT,
            'model': config_lib.to_dict(config),
            'digest': hashed,
            'checksums': checksums.of(params),
            'bos': bos,
            'metrics': {n: x for n, x in (metrics or {}).items() if math.isfinite(x)},
            'commit': provenance.commit()[0],
        }
        if processes.is_first():
            (folder / 'config.json').write_text(json.dumps(described, indent=2) + '\n')


def check_replaceable(path: epath.PathLike) -> None:
    """Raises FileExistsError where `save` would: `path` is there and is no bundle."""
    atomic.check_replaceable(path, 'bundle', 'format')


def load(path: epath.PathLike, mesh: Mesh | None = None) -> Bundle:
    """Returns the bundle at `path`, its parameters sharded over `mesh` (default: all devices).

    Reads JSON and arrays; executes nothing from there.

    Raises:
      FileNotFoundError: no bundle at `path`.
      ValueError: the format is unknown; leaves are missing, left over or of another shape; or a
        byte of them has changed.
    """
    folder, config, described = _described(path)
    bos, metrics = described.get('bos'), described.get('metrics', {})
    if not (bos is None or (type(bos) is int and 0 <= bos < config.vocab_size)):
        raise ValueError(
            f'{folder / "config.json"}: bos: {bos!r}; expected null or an id below '
            f'{config.vocab_size}'
        )
    if not isinstance(metrics, dict):
        raise ValueError(f'{folder / "config.json"}: metrics: expected an object')
    params = _read(path, folder, params_lib.abstract(config, mesh or mesh_lib.make()), ())
    if 'digest' in described and described['digest'] != digest(config, params):
        raise ValueError(f'{path}: params/ is not what was saved: damaged; copy the bundle again')
    return Bundle(config, params, folder / 'tokenizer', bos, metrics)


def load_part(path: epath.PathLike, part: str, mesh: Mesh | None = None) -> tuple[Config, Params]:
    """Returns a bundle's config and one part of its parameters, and reads no other part.

    Args:
      path: the bundle.
      part: `body` or `tables`.
      mesh: over which the part is sharded; all devices if not given.

    Raises:
      FileNotFoundError, ValueError: as `load`; or the model has no such part.
    """
    folder, config, described = _described(path)
    abstract = params_lib.abstract(config, mesh or mesh_lib.make())
    if not abstract.get(part):
        raise ValueError(
            f'{path}: no part {part!r}; there are: {", ".join(filter(abstract.get, abstract))}'
        )
    others = tuple(name for name in abstract if name != part)
    params = _read(path, folder, {part: abstract[part]}, others)
    if 'checksums' in described and checksums.differing(params, described['checksums']):
        raise ValueError(f'{path}: params/ is not what was saved: damaged; copy the bundle again')
    return config, params[part]


def _described(path: epath.PathLike) -> tuple[epath.Path, Config, dict[str, Any]]:
    """Returns the folder of a bundle, its model's config, and what else config.json says."""
    folder = atomic.absolute(path)
    if not folder.exists() and folder.with_name(f'{folder.name}.old').exists():
        folder = folder.with_name(f'{folder.name}.old')  # killed while it was replaced
    file = folder / 'config.json'
    if not file.exists():
        raise FileNotFoundError(f'{path}: no bundle here (config.json is missing)')
    try:
        described = json_fields.read(file)
        version, model = described['format'], described['model']
    except (ValueError, KeyError) as error:
        raise ValueError(f'{file}: not the config of a bundle ({error})') from None
    if version != FORMAT:
        raise ValueError(f'{file}: format {version!r}; this version reads format {FORMAT}')
    try:
        return folder, config_lib.from_dict(model), described
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None


def _check_size(path: epath.PathLike, folder: epath.Path, abstract: Params) -> None:
    """Refuses a few bytes on disk that stand for a memory full of zeros.

    Missing pieces of an array are zeros to TensorStore, however large its header says it is.
    """
    wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    if wanted <= MOST_MORE:
        return
    held = sum((at / name).stat().length for at, _, names in folder.walk() for name in names)
    if wanted > MOST_TIMES * held + MOST_MORE:
        raise ValueError(
            f'{path}: config.json asks for {wanted:,} bytes of parameters, params/ has {held:,}: '
            'damaged; copy the bundle again'
        )


def _read(path, folder: epath.Path, like: Params, others: tuple[str, ...]) -> Params:
    """Returns the leaves of `like`; there may be those of `others`, too, which stay unread."""
    _check_size(path, folder / 'params', like)
    try:
        saved = dict(restore.metadata(folder / 'params'))
    except Exception:
        raise ValueError(f'{path}: params/ is missing or damaged; copy the bundle again') from None
    _check_leaves(path, {name: x for name, x in saved.items() if name not in others}, like)
    try:
        return restore.leaves(folder / 'params', like)
    except Exception as error:
        raise ValueError(f'{path}: params cannot be read; copy them again: {error}') from error


def _check_leaves(path: epath.PathLike, saved: Params, like: Params) -> None:
    """Compares what is saved with what the config asks for, and names every difference."""
    have, want = checksums.kinds(saved), checksums.kinds(like)
    problems = [f'{name} is missing' for name in sorted(set(want) - set(have))]
    problems += [f'{name} is not part of this model' for name in sorted(set(have) - set(want))]
    problems += [
        f'{name} is {have[name]}, expected {want[name]}'
        for name in sorted(set(want) & set(have))
        if have[name] != want[name]
    ]
    # a piece is unpacked whole, whatever part of it the array needs
    problems += [
        f'{checksums.name(p)} is stored in pieces of {x.storage.chunk_shape}'
        for p, x in jax.tree_util.tree_leaves_with_path(saved)
        if any(piece > size for piece, size in zip(x.storage.chunk_shape, x.shape))
    ]
    if problems:
        raise ValueError(f'{path}: params do not fit config.json: ' + '; '.join(problems))


def digest(config: Config, params: Params) -> str:
    """Returns a hex SHA-256 of the config and of every parameter's bytes."""
    result = hashlib.sha256(json.dumps(config_lib.to_dict(config), sort_keys=True).encode())
    for path, leaf in sorted(
        jax.tree_util.tree_leaves_with_path(params), key=lambda entry: checksums.name(entry[0])
    ):
        result.update(f'{checksums.name(path)} {leaf.shape} {leaf.dtype}'.encode())
        result.update(np.ascontiguousarray(processes.whole(leaf)).reshape(-1).view(np.uint8).data)
    return result.hexdigest()
