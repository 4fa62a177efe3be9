"""Runs an experiment: `python -m experiments.run NAME [--scale S] [--out DIR] [--field value ...]`.

An experiment is a package `experiments/NAME` with three files:

  config.py  a docstring (command, hardware, time, expected numbers), a frozen dataclass `Config`,
             and `SCALES`, a dict from scale to Config whose first entry is the default scale.
             Required fields have the value `tyro.MISSING`. With `RESUMES = True`, a run continues
             from what DIR holds and refuses a DIR of another config. With `MAKES_OUT = True`, DIR
             is itself the result, and nothing else is written into it. `MESH` adds the flag
             `--mesh` and gives its default: `auto` (all devices of all hosts on the data axis) or
             `one`. Without it, an experiment uses one device.
  main.py    `main(config, out) -> metrics or None`: writes into the folder `out`, prints a table.
             With `MESH`, it is `main(config, out, mesh)`.
  README.md  the results.

Creating the folder registers the experiment. One that lives elsewhere is run by its path or by the
dotted name of its package (`experiments.outside`). A run writes `DIR/config.json` (fields, commit,
versions, hardware, mesh) and `DIR/result.json` (flat: key -> number). The mesh is not part of the
config, so that a run can resume on another mesh.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import itertools
import math
import os
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from etils import epath

import experiments
from experiments import outside, report
from lm.devices import preemption

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Errors that the user can fix are shown as one line; all others are bugs and show their traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
TRACEBACK = 'TESSERA_TRACEBACK'


class UsageError(Exception):
    """The command line names an unknown experiment or scale, or holds an invalid value."""


class Command(NamedTuple):
    """The parsed command line; `mesh` is as in `lm.devices.mesh.parse`, or `one`."""

    scale: str
    config: Any
    out: epath.Path
    mesh: str


def main(arguments: Sequence[str]) -> int:
    """Runs a command line; returns the exit code.

    0: success; 1: failure; 2: usage error; 130: interrupted.

    Raises:
      Preempted: SIGTERM arrived; the state is saved, and the same command resumes the run.
    """
    try:
        with preemption.ends_cleanly():
            return _dispatch(arguments)
    except KeyboardInterrupt:
        print('interrupted; run the same command again to resume', file=sys.stderr)
        return 130
    except (UsageError, ImportError, *USER_ERRORS) as error:
        line = describe(error)
        if line is None or os.environ.get(TRACEBACK) == '1':
            raise
        print(f'error: {line}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ('-h', '--help'):
        print(_listing())
        return 0 if arguments else 2
    name, *rest = arguments
    package = _package(name)
    module = importlib.import_module(f'{package}.config')
    for attribute in ('Config', 'SCALES'):
        if not hasattr(module, attribute):
            raise UsageError(f'{module.__file__}: no {attribute}')
    try:
        command = parse(name, module, rest)
    except ValueError as error:  # the config rejects a value
        raise UsageError(str(error)) from error
    from lm.devices import processes  # late: --help and usage errors need no JAX

    with processes.joined():
        run(package, command)
    return 0


def _package(name: str) -> str:
    """Returns the package of the experiment that the command line names."""
    known = list(folders())
    if name in known:
        return f'experiments.{name}'
    if outside.is_outside(name):
        try:
            return outside.package(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
    near = difflib.get_close_matches(name, known, cutoff=0.5)
    hint = f'did you mean {" or ".join(near)}?' if near else f'there are: {", ".join(known)}'
    raise UsageError(f'no experiment {name!r}; {hint}')


def folders() -> dict[str, pathlib.Path]:
    """Returns the folder of each experiment, sorted by name."""
    found = [info for info in pkgutil.iter_modules(experiments.__path__) if info.ispkg]
    places = {info.name: getattr(info.module_finder, 'path', '') for info in found}
    return {name: pathlib.Path(places[name]) / name for name in sorted(places)}


def _listing() -> str:
    lines = ['usage: python -m experiments.run NAME [--scale S] [--out DIR] [--field value ...]']
    lines += ['       python -m experiments.run NAME --help']
    lines += ['NAME: one of those below, a folder (./doubling), or a package (mine.doubling)', '']
    lines += ['experiments:']
    width = max(map(len, folders()), default=0)
    for name, folder in folders().items():
        # Parsed, not imported: fast, and independent of optional dependencies.
        file = folder / 'config.py'
        docstring = ast.get_docstring(ast.parse(file.read_text())) or '' if file.exists() else ''
        lines.append(f'  {name:{width}}  {docstring.partition(chr(10))[0]}')
    return '\n'.join(lines)


def complete(config: Any) -> bool:
    """Returns whether a config can run without arguments: it has no required fields."""
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return all(value is not tyro.MISSING for value in values)


def parse(name: str, module: ModuleType, arguments: Sequence[str]) -> Command:
    """Parses the arguments that follow the name of an experiment.

    Raises:
      UsageError: the scale is unknown.
      ValueError: the config rejects a value.
      SystemExit: an unknown flag or a value of the wrong type (2, with a message); `--help` (0).
    """
    scales = module.SCALES
    scale = _scale(name, scales, arguments)
    folder = module.__name__.split('.')[-2]
    fields: list[tuple[str, Any, Any]] = [
        ('config', Annotated[module.Config, tyro.conf.arg(name='')], scales[scale]),
        ('scale', Annotated[Literal[tuple(scales)], _flag('size of the run')], scale),
        ('out', Annotated[str, _flag('folder for results')], f'out/{folder}-{scale}'),
    ]
    if hasattr(module, 'MESH'):
        devices = 'e.g. data=2,sequence=2,model=2; auto: all devices on data; one: the first device'
        fields.append(('mesh', Annotated[str, _flag(devices)], module.MESH))
    # One parser for the config's fields and the runner's, so that --help shows all of them.
    chosen: Any = tyro.cli(
        dataclasses.make_dataclass('Flags', fields),
        args=list(arguments),
        prog=f'python -m experiments.run {name}',
        description=module.__doc__,
        config=(tyro.conf.AvoidSubcommands,),  # `Part | None` keeps its default
    )
    return Command(scale, chosen.config, epath.Path(chosen.out), getattr(chosen, 'mesh', 'one'))


def _flag(help_text: str) -> Any:
    return tyro.conf.arg(help=help_text)


def _scale(name: str, scales: Mapping[str, Any], arguments: Sequence[str]) -> str:
    # Read before the main parser runs, since the scale sets the defaults of all other fields.
    scale: str | None = next(iter(scales))
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        flag, equals, value = word.partition('=')
        if flag == '--scale':
            scale = value if equals else following
    if scale is None or scale not in scales:
        raise UsageError(f'{name}: no scale {scale or ""!r}; there are: {", ".join(scales)}')
    return scale


def run(package: str, command: Command) -> dict[str, float]:
    """Runs one experiment and returns its metrics; writes `config.json` and then `result.json`.

    Args:
      package: importable name of the experiment, `experiments.NAME` for one of this repository.
      command: see `Command`.

    Raises:
      ValueError: the mesh does not fit the devices, or a metric is not finite (the others are
        written).
    """
    # Imported late: --help and usage errors need no JAX.
    from experiments import resume
    from lm.devices import processes

    scale, config, out, _ = command
    settings = importlib.import_module(f'{package}.config')
    experiment = importlib.import_module(f'{package}.main')
    name = package.removeprefix('experiments.')
    mesh = _mesh(command.mesh) if hasattr(settings, 'MESH') else None
    if not getattr(settings, 'MAKES_OUT', False):
        out.mkdir(parents=True, exist_ok=True)
        description = {'experiment': name, 'scale': scale, 'config': config}
        processes.check_together(out, report.to_json({**description, 'mesh': command.mesh}))
        if getattr(settings, 'RESUMES', False):
            resume.claim(out, config)
        surroundings = {**report.environment(), **report.devices()}
        surroundings['mesh'] = None if mesh is None else dict(mesh.shape)
        report.write_json_atomic(out / 'config.json', {**description, **surroundings})
    with _heard_once(processes.is_first()):
        found = experiment.main(config, out) if mesh is None else experiment.main(config, out, mesh)
    metrics = {key: float(value) for key, value in (found or {}).items()}
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    if finite and not getattr(settings, 'MAKES_OUT', False):
        report.write_json_atomic(out / 'result.json', finite)
    if len(finite) < len(metrics):
        bad = sorted(metrics.keys() - finite.keys())
        raise ValueError(f'{out}: not a finite number: {", ".join(bad)}')
    return metrics


def _mesh(text: str) -> 'Mesh':
    import jax

    from lm.devices import mesh as mesh_lib

    if text != 'one':
        return mesh_lib.make(text)
    if jax.process_count() > 1:
        raise ValueError(f'--mesh one: there are {jax.process_count()} processes; use --mesh auto')
    return mesh_lib.make(devices=jax.devices()[:1])


@contextlib.contextmanager
def _heard_once(first: bool) -> Iterator[None]:
    """Silences stdout of all processes but the first, which would print the same tables."""
    if first:
        yield
        return
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def describe(error: BaseException) -> str | None:
    """Returns an error as one line for the user, or None if only a traceback would help."""
    if isinstance(error, ImportError):
        return _missing_module(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return ' '.join(str(error).split()) or None


def _missing_module(error: ImportError) -> str | None:
    if 'gcsfs' in str(error):  # raised by fsspec, which names no module
        return "gs:// paths need the module gcsfs: pip install 'etils[epath-gcs]'"
    module = (error.name or '').partition('.')[0]
    if module == 'torch':
        return 'PyTorch is not installed: make torch'
    try:
        requirements = importlib.metadata.requires('tessera-lm') or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        distribution = re.split(r'[^\w.-]', requirement)[0]
        if re.sub(r'[-.]', '_', distribution).lower() == module.lower():
            extra = re.search(r'extra == "(\w+)"', requirement)
            part = f'.[{extra[1]}]' if extra else '.'
            return f"the module {module} is not installed: pip install -e '{part}'"
    return None


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except preemption.Preempted as stopped:
        preemption.leave(stopped)
