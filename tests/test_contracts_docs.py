"""What the docs name exists: links, files, modules and their attributes, imports in examples.

As in `test_contracts.py`, a rule is a function from a file's name and text to its offences.
"""

import ast
import importlib
import pathlib
import re
import textwrap
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
PACKAGES = ('lm', 'tokenization', 'decoding', 'experiments')
FOLDERS = (*PACKAGES, 'tests', 'docs', 'colab', '.ci')
FENCE = re.compile(r'^( *)```(\w*)\n(.*?)^ *```', re.M | re.S)
LINK = re.compile(r'\]\(([^)\s]+)\)')
QUOTED = re.compile(r'`([^`\n]+)`')
# A path from the root, perhaps with a line; capitals (`experiments/NAME`) stand for something.
PATH = re.compile(rf'(?:(?:{"|".join(map(re.escape, FOLDERS))})/[a-z0-9_./-]*|\w+\.toml)(?=$|:\d)')
NAME = re.compile(rf'(?:{"|".join(PACKAGES)})(?:\.\w+)+')


def links(name: str, text: str) -> Iterator[str]:
    """Links to files that are not there."""
    for target in LINK.findall(FENCE.sub('', text)):
        path = target.partition('#')[0]
        outside = re.match(r'\w+:', target)
        if path and not outside and not (ROOT / name).parent.joinpath(path).exists():
            yield f'{name}: no {target}'


def paths(name: str, text: str) -> Iterator[str]:
    """Paths in backticks that lead nowhere from the root."""
    for quoted in QUOTED.findall(FENCE.sub('', text)):
        found = PATH.match(quoted)
        if found and not (ROOT / found[0]).exists():
            yield f'{name}: no {quoted}'


def resolves(dotted: str) -> bool:
    """Returns whether a dotted name is a module or what one holds, fields of classes included."""
    parts = dotted.split('.')
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return part in getattr(found, '__annotations__', {})
            found = getattr(found, part)
        return True
    return False


def names(name: str, text: str) -> Iterator[str]:
    """Modules in backticks, and what they hold, that cannot be imported."""
    for quoted in QUOTED.findall(FENCE.sub('', text)):
        found = NAME.match(quoted)
        stands_for_another = found and any(part.isupper() for part in found[0].split('.')[:2])
        if found and not stands_for_another and not resolves(found[0]):
            yield f'{name}: no {quoted}'


def examples(name: str, text: str) -> Iterator[str]:
    """Imports in Python examples that fail."""
    for _, language, code in FENCE.findall(text):
        if language != 'python':
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.ImportFrom):
                dotted = [f'{node.module}.{alias.name}' for alias in node.names]
            elif isinstance(node, ast.Import):
                dotted = [alias.name for alias in node.names]
            else:
                continue
            for one in dotted:
                if one.split('.')[0] in PACKAGES and not resolves(one):
                    yield f'{name}: no {one}'


@pytest.mark.parametrize('rule', [links, paths, names, examples])
def test_docs(rule):
    offences = [
        offence
        for path in DOCS
        for offence in rule(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert not offences, '\n'.join(['', *offences])


@pytest.mark.parametrize(
    ('rule', 'bad'),
    [
        (links, '[a](docs/nothing.md#part)'),
        (paths, 'see `lm/nothing.py`'),
        (paths, 'see `tests/nothing/`'),
        (paths, '`lm/nothing.py:3`'),
        (names, '`lm.nothing`'),
        (names, '`lm.nothing.f(x)`'),
        (names, '`lm.files.provenance.nothing`'),
        (examples, '```python\nfrom lm.files import nothing\n```'),
        (examples, '```python\nimport lm.nothing\n```'),
    ],
)
def test_rules_find_what_they_look_for(rule, bad):
    assert list(rule('README.md', bad))


@pytest.mark.parametrize(
    ('rule', 'good'),
    [
        (links, '[a](docs/development.md#tests) [b](#part) [c](https://jax.dev)'),
        (paths, '`lm/files/provenance.py:3` `experiments/NAME` `out/demo` `lm/`'),
        (names, '`lm.files.provenance.commit()` `lm.model.config.Config.vocab_size`'),
        (names, '`python -m experiments.nothing` `experiments.NAME` `lm`'),
        (examples, '```python\nfrom lm.files.provenance import ROOT\nimport lm.files\n```'),
        (examples, '```\nfrom lm import nothing\n```'),
    ],
)
def test_rules_let_good_docs_pass(rule, good):
    assert not list(rule('README.md', good))
