"""What holds for the whole tree: who imports whom, sizes, docstrings, what an experiment is.

Each rule is a function from a file's name and text to its offences, so that a rule can be tried
on a bad example as well as on the tree.
"""

import ast
import dataclasses
import fnmatch
import importlib
import json
import os
import pathlib
import re
from collections.abc import Iterator

import pytest

from experiments import run

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Folder -> what else of this project it may import.
MAY_IMPORT = {
    'lm/kernels': set(),
    'lm': {'lm/kernels'},
    'tokenization': {'lm', 'lm/kernels'},
    'decoding': {'lm', 'lm/kernels'},
    'experiments': {'lm', 'lm/kernels', 'tokenization', 'decoding'},
}
FILE_LINES = 300
FUNCTION_LINES = 60
NOTEBOOK_LINES = 60
# In two parts, since these rules read their own file too.
UNFINISHED = re.compile(r'\b(TO' r'DO|FIX' r'ME|XX' r'X|NotImplemented' r'Error)\b')
PRIVATE = re.compile(r'/ro' r'ot/|/wo' r'rk/|/ho' r'me/\w|https?://\S*(py' r'pi|/sim' r'ple)\b')


def tree() -> Iterator[pathlib.Path]:
    """Yields every file but those that .gitignore names; works without git."""
    ignored = ['.git', *(line.rstrip('/') for line in (ROOT / '.gitignore').read_text().split())]

    def kept(names: list[str]) -> list[str]:
        return sorted(n for n in names if not any(fnmatch.fnmatch(n, i) for i in ignored))

    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = kept(subfolders)
        yield from (pathlib.Path(folder, name) for name in kept(names))


def read(path: pathlib.Path) -> str | None:
    """Returns a file's text, or None if it is not text."""
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError:
        return None


TEXTS = {
    path.relative_to(ROOT).as_posix(): text for path in tree() if (text := read(path)) is not None
}
SOURCES = {n: t for n, t in TEXTS.items() if n.endswith('.py') and n.split('/')[0] in MAY_IMPORT}


def folder_of(name: str) -> str:
    """The key of MAY_IMPORT for a file or a module's path."""
    parts = name.removesuffix('.py').split('/')
    return 'lm/kernels' if parts[:2] == ['lm', 'kernels'] else parts[0]


def imports(name: str, text: str) -> Iterator[str]:
    """Imports against the direction lm/kernels -> lm -> tokenization, decoding -> experiments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield f'{name}:{node.lineno}: relative import; write the whole name'
                continue
            # `from lm import kernels` imports lm.kernels.
            modules = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        here = folder_of(name)
        for module in modules:
            there = folder_of(module.replace('.', '/'))
            outside = there in {*MAY_IMPORT, 'colab', 'tests'} - {here}
            if outside and there not in MAY_IMPORT[here]:
                yield f'{name}:{node.lineno}: {here} may not import {module}'


def sizes(name: str, text: str) -> Iterator[str]:
    """Files and functions that are too long."""
    if (lines := text.count('\n')) > FILE_LINES:
        yield f'{name}: {lines} lines, at most {FILE_LINES}'
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f'{name}:{node.lineno}: {node.name} has {lines} lines, max {FUNCTION_LINES}'


def docstrings(name: str, text: str) -> Iterator[str]:
    """Modules, public functions, classes and their public methods that say nothing."""
    module = ast.parse(text)
    if module.body and not ast.get_docstring(module):
        yield f'{name}: no docstring'
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in module.body if isinstance(n, kinds) and not n.name.startswith('_')]
    for node in public:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [n for n in inner if isinstance(n, kinds) and not n.name.startswith('_')]
        for item in [node, *methods]:
            if not ast.get_docstring(item):
                yield f'{name}:{item.lineno}: {item.name} has no docstring'


def unfinished(name: str, text: str) -> Iterator[str]:
    """Notes to oneself and stubs."""
    if name.endswith(('/utils.py', '/util.py')) or name in ('utils.py', 'util.py'):
        yield f'{name}: say what it holds'
    for match in UNFINISHED.finditer(text):
        yield f'{name}: {match[0]}'


def private(name: str, text: str) -> Iterator[str]:
    """Paths of somebody's machine, addresses of package indexes."""
    for match in PRIVATE.finditer(text):
        yield f'{name}: {match[0]}'


def notebooks(name: str, text: str) -> Iterator[str]:
    """Notebooks with outputs, or with more code than a reader takes in."""
    cells = [cell for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']
    if any(cell['outputs'] or cell['execution_count'] is not None for cell in cells):
        yield f'{name}: strip the outputs'
    lines = [line for cell in cells for line in ''.join(cell['source']).splitlines()]
    if (count := sum(bool(line.strip()) for line in lines)) > NOTEBOOK_LINES:
        yield f'{name}: {count} lines of code, at most {NOTEBOOK_LINES}'


def _python(names: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in names.items() if name.endswith('.py')}


@pytest.mark.parametrize(
    ('rule', 'texts'),
    [
        (imports, SOURCES),
        (sizes, SOURCES),
        (docstrings, SOURCES),
        (unfinished, _python(TEXTS)),
        (private, TEXTS),
        (notebooks, {n: t for n, t in TEXTS.items() if n.endswith('.ipynb')}),
    ],
)
def test_tree(rule, texts):
    offences = [offence for name, text in texts.items() for offence in rule(name, text)]
    assert not offences, '\n'.join(['', *offences])


LONG = 'def f():\n' + '    x = 1\n' * FUNCTION_LINES
CELL = {'cell_type': 'code', 'outputs': [], 'execution_count': None, 'source': ['x = 1\n']}


@pytest.mark.parametrize(
    ('rule', 'name', 'bad'),
    [
        (imports, 'lm/a.py', 'from tokenization import byte'),
        (imports, 'lm/kernels/a.py', 'from lm import config'),
        (imports, 'lm/kernels/a.py', 'import lm.model.layers'),
        (imports, 'decoding/a.py', 'def f():\n    import tokenization.vocabularies.byte'),
        (imports, 'tokenization/a.py', 'from decoding.tree import mask'),
        (imports, 'decoding/a.py', 'from experiments import report'),
        (imports, 'lm/a.py', 'from . import layers'),
        (sizes, 'lm/a.py', 'x = 1\n' * (FILE_LINES + 1)),
        (sizes, 'lm/a.py', LONG),
        (docstrings, 'lm/a.py', 'x = 1'),
        (docstrings, 'lm/a.py', '"""A."""\ndef f(): pass'),
        (docstrings, 'lm/a.py', '"""A."""\nclass F:\n  """B."""\n  def f(self): pass'),
        (unfinished, 'lm/utils.py', ''),
        (unfinished, 'lm/a.py', '# TO' + 'DO: more'),
        (private, 'README.md', 'see /ro' + 'ot/a'),
        (private, 'README.md', 'pip install -i https://py' + 'pi.org/sim' + 'ple jax'),
        (notebooks, 'a.ipynb', json.dumps({'cells': [CELL | {'execution_count': 3}]})),
        (notebooks, 'a.ipynb', json.dumps({'cells': [CELL] * (NOTEBOOK_LINES + 1)})),
    ],
)
def test_rules_find_what_they_look_for(rule, name, bad):
    assert list(rule(name, bad))


@pytest.mark.parametrize(
    ('rule', 'name', 'good'),
    [
        (imports, 'lm/a.py', 'from lm import kernels\nimport lm.model.layers, jax'),
        (imports, 'experiments/a/main.py', 'from decoding import tree\nfrom tokenization import x'),
        (sizes, 'lm/a.py', LONG.removesuffix('    x = 1\n')),
        (
            docstrings,
            'lm/a.py',
            '"""A."""\ndef _f(): pass\nclass F:\n  """B."""\n  def _f(self): 0',
        ),
        (private, 'README.md', 'https://jax.dev/simply and a frame' + 'work/x, out/wo' + 'rk'),
        (notebooks, 'a.ipynb', json.dumps({'cells': [CELL]})),
    ],
)
def test_rules_let_good_files_pass(rule, name, good):
    assert not list(rule(name, good))


@pytest.mark.parametrize('name', run.folders())
def test_experiment_is_described(name):
    folder = ROOT / 'experiments' / name
    assert len((folder / 'README.md').read_text().splitlines()) > 1, f'{folder}/README.md is empty'
    config = importlib.import_module(f'experiments.{name}.config')
    assert dataclasses.is_dataclass(config.Config) and config.Config.__dataclass_params__.frozen
    assert config.SCALES and all(isinstance(c, config.Config) for c in config.SCALES.values())
    parts = [f'python -m experiments.run {name}']
    if run.complete(next(iter(config.SCALES.values()))):
        assert 'tiny' in list(config.SCALES)[1:], 'a scale that tests can run, not the default'
        parts += [r'\b(cores?|cpu|gpu|tpu)', r'\b(seconds?|minutes?|hours?)\b', 'expected']
    else:  # a tool that needs the user's files
        tests = [text for test, text in TEXTS.items() if test.startswith('tests/experiments/')]
        assert any(re.search(rf'\b{name}\b', text) for text in tests), f'no test of {name}'
    for part in parts:
        found = re.search(part, (config.__doc__ or '').lower())
        assert found, f'experiments/{name}/config.py: no {part!r} in the docstring'
