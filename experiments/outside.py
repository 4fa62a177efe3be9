"""Experiments that live outside this repository: a folder, or a package named with dots.

    python -m experiments.run ../mine/doubling     a folder; its parent joins the import path
    python -m experiments.run mine.doubling        a package that Python can import

Imports no JAX, so that errors appear at once.
"""

import importlib
import importlib.util
import keyword
import pathlib
import sys

FILES = ('config.py', 'main.py')


def is_outside(where: str) -> bool:
    """Returns whether `where` is a path or a dotted name, not the name of an experiment here."""
    return is_path(where) or '.' in where


def is_path(where: str) -> bool:
    """Returns whether `where` holds a separator: `./doubling` is a folder, `doubling` a name."""
    return '/' in where or '\\' in where


def package(where: str) -> str:
    """Returns the importable name of an experiment's package.

    Args:
      where: a path of a folder, or a dotted name.

    Raises:
      ValueError: there is no experiment, or it cannot be imported; says why.
    """
    return _of_folder(where) if is_path(where) else _of_module(where)


def _of_folder(where: str) -> str:
    folder = pathlib.Path(where).resolve()
    for file in FILES:
        if not (folder / file).is_file():
            raise ValueError(
                f'{where}: no {file}; an experiment is a folder of {" and ".join(FILES)}'
            )
    name = folder.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f'{where}: a folder called {name!r} cannot be imported; '
            'use letters, digits and underscores'
        )
    # Joined last: its siblings must not hide installed packages. By a name on the path, worker
    # processes can import the experiment too.
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    importlib.invalidate_caches()
    if _origin(f'{name}.config') != folder / 'config.py':
        raise ValueError(f'{where}: another module is called {name}; rename the folder')
    return name


def _of_module(name: str) -> str:
    for file in FILES:
        module = f'{name}.{file.removesuffix(".py")}'
        if not all(name.split('.')) or _origin(module) is None:
            raise ValueError(
                f'no module {module}; an experiment is a package of {" and ".join(FILES)}, '
                'importable from here, or a path with a separator'
            )
    return name


def _origin(module: str) -> pathlib.Path | None:
    """Returns the file of a module, or None if there is none; imports the packages around it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name and f'{module}.'.startswith(f'{error.name}.'):
            return None
        raise  # the package is there, and one of its own imports is not
    return pathlib.Path(spec.origin).resolve() if spec and spec.origin else None
