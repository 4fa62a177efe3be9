"""No line of the product executes what a file says: the tree is read and searched for ways to."""

import ast
import json
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('lm', 'tokenization', 'decoding', 'experiments', 'colab')

# To import one of these is to mean it.
MODULES = {
    'pickle', '_pickle', 'cPickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'joblib', 'yaml',
    'runpy', 'code', 'codeop', 'builtins', 'imp', 'jsonpickle', 'hickle', 'tarfile',
}  # fmt: skip
# Called or not: a function may be handed on.
NAMES = {
    'eval', 'exec', 'compile', '__import__', 'breakpoint', 'os.system', 'os.popen', 'os.execv',
    'os.execvp', 'os.spawnv', 'os.posix_spawn', 'subprocess.getoutput',
    'subprocess.getstatusoutput', 'importlib.import_module', 'importlib.__import__',
    'importlib.util.module_from_spec', 'shutil.unpack_archive', 'torch.load', 'torch.hub',
    'torch.jit.load', 'pandas.read_pickle', 'pandas.read_hdf', 'jax.export.deserialize',
    'ctypes.CDLL',
}  # fmt: skip
METHODS = {'extractall', 'extract', 'unsafe_load', 'load_module', 'exec_module', 'read_pickle'}
LOADS = {'numpy.load', 'jax.numpy.load'}
# A keyword that may only be False.
ONLY_FALSE = {'shell', 'allow_pickle', 'trust_remote_code'}
# Modules of this project, named by its own folders.
ALLOWED = {('experiments/run.py', 'importlib.import_module')}


def sources() -> dict[str, str]:
    """The product's files by name, the code of notebooks among them."""
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '--', *FOLDERS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    files = [ROOT / name for name in listed if name.endswith(('.py', '.ipynb'))]
    return {
        file.relative_to(ROOT).as_posix(): code(file.name, file.read_text())
        for file in files
        if file.exists()
    }


def code(name: str, text: str) -> str:
    """What Python would run of a file: of a notebook, its cells without the shell's lines."""
    if not name.endswith('.ipynb'):
        return text
    cells = [cell for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']
    lines = [line.rstrip('\n') for cell in cells for line in [*cell['source'], '']]
    return '\n'.join('pass' if line.lstrip().startswith(('!', '%')) else line for line in lines)


def executes(name: str, text: str) -> Iterator[str]:
    """Ways to run code that is not the product's own, with their places."""
    tree = ast.parse(text)
    known = _imported(tree)
    for node in ast.walk(tree):
        for found in _offences(node, known):
            if (name, found) not in ALLOWED:
                yield f'{name}:{getattr(node, "lineno", 0)}: {found}'


def _imported(tree: ast.Module) -> dict[str, str]:
    """Returns what each imported name stands for, wherever in the file it is imported."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition('.')[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: f'{node.module}.{a.name}' for a in node.names}
    return known


def _dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, known)):
        return f'{owner}.{node.attr}'
    return None


def _offences(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name.partition('.')[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        if node.module and node.module.partition('.')[0] in MODULES:
            yield node.module
        names = (f'{node.module}.{alias.name}' for alias in node.names)
        yield from (name for name in names if name in NAMES)
    elif isinstance(node, ast.Name | ast.Attribute):
        if (dotted := _dotted(node, known)) in NAMES:
            yield str(dotted)
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield f'.{node.attr}'
    elif isinstance(node, ast.Call):
        given = {k.arg: k.value for k in node.keywords}
        for word in ONLY_FALSE & given.keys():
            value = given[word]
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f'{word}='
        if _dotted(node.func, known) in LOADS and 'allow_pickle' not in given:
            yield f'{_dotted(node.func, known)} without allow_pickle=False'


def test_the_product_executes_nothing_that_it_reads():
    found = sources()
    assert (
        len(found) > 150 and 'lm/checkpoints/bundle.py' in found and 'colab/transfer.ipynb' in found
    )
    offences = [line for name, text in found.items() for line in executes(name, text)]
    assert not offences, '\n'.join(['', *offences])


@pytest.mark.parametrize(
    'bad',
    [
        'import pickle',
        'def f():\n    from pickle import loads',
        'import cloudpickle as c',
        'import yaml',
        'import concurrent, marshal',
        'from shelve import open',
        'import joblib.memory',
        'eval(text)',
        'run = exec',
        "compile(text, '', 'exec')",
        "__import__('os')",
        'import os\nos.system(x)',
        'import os as o\no.popen(x)',
        'from os import system',
        'import subprocess\nsubprocess.run(x, shell=True)',
        'import subprocess\nsubprocess.run(x, shell=flag)',
        'import numpy as np\nnp.load(file)',
        'import numpy\nnumpy.load(file, mmap_mode="r")',
        'import numpy as np\nnp.load(file, allow_pickle=True)',
        'from numpy import load as l\nl(file)',
        'import jax.numpy as jnp\njnp.load(file)',
        'import torch\ntorch.load(file)',
        'from torch import load',
        'def f():\n    import torch as t\n    return t.load',
        'archive.extractall(folder)',
        'import shutil\nshutil.unpack_archive(file)',
        'import importlib\nimportlib.import_module(fields["kind"])',
        'from importlib import import_module',
        'AutoModel.from_pretrained(name, trust_remote_code=True)',
        'from jax import export\nexport.deserialize(data)',
    ],
)
def test_each_way_is_found(bad):
    assert list(executes('lm/a.py', bad))


@pytest.mark.parametrize(
    'good',
    [
        'import re\nre.compile(x)',
        'step.lower(x).compile()',
        'import json\njson.load(file)',
        'import numpy as np\nnp.load(file, allow_pickle=False)',
        'import subprocess\nsubprocess.run([x], check=True)',
        'import jax\njax.jit(f)',
        'def load(path): ...\nload(x)',
        'from lm import bundle\nbundle.load(path)',
    ],
)
def test_what_executes_nothing_passes(good):
    assert not list(executes('lm/a.py', good))


def test_cells_of_notebooks_are_searched():
    cell = {'cell_type': 'code', 'source': ['!pip install x\n', '%time\n', 'import pickle\n']}
    text = code('a.ipynb', json.dumps({'cells': [cell]}))
    assert list(executes('colab/a.ipynb', text)) == ['colab/a.ipynb:3: pickle']
