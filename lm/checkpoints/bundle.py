"""A model on disk: architecture, config, tokenizer, parameters and provenance.

PATH/config.json    format, architecture (default: transformer), config, metrics, commit
PATH/tokenizer/     written by the tokenizer's own `save`
PATH/params/        Orbax
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from lm.checkpoints import architecture as architecture_lib
from lm.checkpoints import bundle_checks, restore
from lm.checkpoints.architecture import KNOWN, TRANSFORMER, Architecture
from lm.devices import mesh as mesh_lib
from lm.devices import processes
from lm.files import atomic, checksums, json_fields, provenance
from lm.model.params import Params

FORMAT = 1


class Saves(Protocol):
    """Anything that can write itself into a folder: a tokenizer."""

    def save(self, path: epath.PathLike) -> None:
        """Writes into the folder `path`."""
        ...


class Bundle(NamedTuple):
    """A loaded model; `tokenization.loading.load(bundle.tokenizer_path)` gives its tokenizer.

    Attributes:
      config, params: the model; the config is `lm.model.config.Config` for a transformer.
      tokenizer_path: folder of its tokenizer.
      bos: the id that starts a document, not one of the tokenizer's; None if there is none.
      metrics: as saved.
      architecture: of the config and the parameters.
    """

    config: Any
    params: Params
    tokenizer_path: epath.Path
    bos: int | None
    metrics: dict[str, float]
    architecture: Architecture = TRANSFORMER


def save(
    path: epath.PathLike,
    config: Any,
    params: Params,
    tokenizer: Saves,
    bos: int | None,
    metrics: Mapping[str, float] | None = None,
    *,
    architecture: Architecture = TRANSFORMER,
) -> None:
    """Writes a bundle, replacing an older one at `path`; on failure the older one stays.

    Before writing, refuses whatever `load` would refuse. All processes that hold shards of `params`
    call it; each writes its own.

    Args:
      path: a folder, local or on `gs://`, that all processes see.
      config: of the model.
      params: its parameters.
      tokenizer: writes itself into the bundle.
      bos: the input-only id in front of every document in training, or None.
      metrics: measurements of the model, by name; non-finite ones are dropped.
      architecture: of the model.

    Raises:
      FileExistsError: `path` exists and is not a bundle.
      ValueError: leaves are missing, unexpected, or of another shape or dtype than the config's,
        all of them named; the config does not round-trip through JSON; `bos` is not an id of the
        model; a metric is not a number.
      OSError: the bundle could not be written; says why.
    """
    check_replaceable(path)
    try:
        bundle_checks.check_config(architecture, config)
        bundle_checks.check_bos(bos, architecture.vocab_size(config))
        bundle_checks.check_metrics(metrics or {})
        bundle_checks.check_params(params, architecture_lib.abstract(architecture, config))
    except ValueError as error:
        raise ValueError(f'{path}: not saved: {error}') from None
    described = {
        'format': FORMAT,
        # omitted by default: bundles are older than architectures
        **({} if architecture.name == TRANSFORMER.name else {'architecture': architecture.name}),
        'model': architecture.to_json(config),
        'digest': digest(config, params, architecture),
        'checksums': checksums.of(params),
        'bos': bos,
        'metrics': bundle_checks.finite(metrics or {}),
        'commit': provenance.commit()[0],
    }
    with processes.new_folder(path) as folder:
        if processes.is_first():
            tokenizer.save(folder / 'tokenizer')
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / 'params', params)
        if processes.is_first():
            (folder / 'config.json').write_text(json.dumps(described, indent=2) + '\n')


def check_replaceable(path: epath.PathLike) -> None:
    """Raises FileExistsError if `save` would: `path` exists and is not a bundle."""
    atomic.check_replaceable(path, 'bundle', 'format')


def load(
    path: epath.PathLike,
    mesh: Mesh | None = None,
    *,
    architectures: Mapping[str, Architecture] = KNOWN,
) -> Bundle:
    """Returns the bundle at `path`, its parameters sharded over `mesh` (default: all devices).

    Reads JSON and arrays; executes no code from the bundle.

    Args:
      path: the bundle.
      mesh: shards the parameters.
      architectures: those that it may have, by name; by default the transformer.

    Raises:
      FileNotFoundError: no bundle at `path`.
      ValueError: the format or the architecture is unknown; leaves are missing, unexpected or of
        another shape; or a byte of them has changed.
    """
    folder, architecture, config, fields = _described(path, architectures)
    bos, metrics = fields.get('bos'), fields.get('metrics', {})
    try:
        bundle_checks.check_bos(bos, architecture.vocab_size(config))
        bundle_checks.check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f'{folder / "config.json"}: {error}') from None
    like = architecture_lib.abstract(architecture, config, mesh or mesh_lib.make())
    params = _read(path, folder, like, ())
    if 'digest' in fields and fields['digest'] != digest(config, params, architecture):
        raise ValueError(f'{path}: params/ is not what was saved: damaged; copy the bundle again')
    return Bundle(config, params, folder / 'tokenizer', bos, metrics, architecture)


def load_part(
    path: epath.PathLike,
    part: str,
    mesh: Mesh | None = None,
    *,
    architectures: Mapping[str, Architecture] = KNOWN,
) -> tuple[Any, Params]:
    """Returns a bundle's config and one part of its parameters; other parts are not read.

    Args:
      path: the bundle.
      part: a top-level entry of the architecture's leaves: `body` or `tables` of a transformer.
      mesh: shards the part; by default all devices.
      architectures: as for `load`.

    Raises:
      FileNotFoundError, ValueError: as `load`; or the model has no such part.
    """
    folder, architecture, config, fields = _described(path, architectures)
    like = architecture_lib.abstract(architecture, config, mesh or mesh_lib.make())
    parts = [name for name in like if jax.tree.leaves(like[name])]
    if part not in parts:
        raise ValueError(f'{path}: no part {part!r}; there are: {", ".join(parts)}')
    others = tuple(name for name in like if name != part)
    params = _read(path, folder, {part: like[part]}, others)
    if 'checksums' in fields and checksums.differing(params, fields['checksums']):
        raise ValueError(f'{path}: params/ is not what was saved: damaged; copy the bundle again')
    return config, params[part]


class _Described(NamedTuple):
    """The content of config.json; `fields` holds all of it as JSON."""

    folder: epath.Path
    architecture: Architecture
    config: Any
    fields: dict[str, Any]


def digest(config: Any, params: Params, architecture: Architecture = TRANSFORMER) -> str:
    """Returns a hex SHA-256 of the architecture, the config and every parameter's bytes."""
    described = json.dumps(architecture.to_json(config), sort_keys=True)
    if architecture.name != TRANSFORMER.name:  # digests are older than architectures
        described = f'{architecture.name} {described}'
    result = hashlib.sha256(described.encode())
    for path, leaf in sorted(
        jax.tree_util.tree_leaves_with_path(params), key=lambda entry: checksums.name(entry[0])
    ):
        result.update(f'{checksums.name(path)} {leaf.shape} {leaf.dtype}'.encode())
        result.update(np.ascontiguousarray(processes.whole(leaf)).reshape(-1).view(np.uint8).data)
    return result.hexdigest()


def _described(path: epath.PathLike, known: Mapping[str, Architecture]) -> _Described:
    """Finds the folder of a bundle and reads its config.json."""
    folder = atomic.absolute(path)
    if not folder.exists() and folder.with_name(f'{folder.name}.old').exists():
        folder = folder.with_name(f'{folder.name}.old')  # a save was killed while replacing it
    file = folder / 'config.json'
    if not file.exists():
        raise FileNotFoundError(f'{path}: no bundle here (config.json is missing)')
    try:
        fields = json_fields.read(file)
        version, model = fields['format'], fields['model']
    except (ValueError, KeyError) as error:
        raise ValueError(f'{file}: not the config of a bundle ({error})') from None
    if version != FORMAT:
        raise ValueError(f'{file}: format {version!r}; this version reads format {FORMAT}')
    try:
        architecture = architecture_lib.named(fields.get('architecture', TRANSFORMER.name), known)
        return _Described(folder, architecture, architecture.from_json(model), fields)
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None


def _read(
    path: epath.PathLike, folder: epath.Path, like: Params, others: tuple[str, ...]
) -> Params:
    """Returns the leaves of `like`; parts named in `others` may be present but are not read."""
    try:
        bundle_checks.check_size(folder / 'params', like)
        saved = _metadata(folder / 'params')
        bundle_checks.check_saved({n: x for n, x in saved.items() if n not in others}, like)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    try:
        return restore.leaves(folder / 'params', like)
    except Exception as error:
        raise ValueError(f'{path}: params cannot be read; copy them again: {error}') from error


def _metadata(folder: epath.Path) -> dict[str, Any]:
    try:
        return dict(restore.metadata(folder))
    except Exception:
        raise ValueError('params/ is missing or damaged; copy the bundle again') from None
