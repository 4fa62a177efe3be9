"""The examples of docs/extending.md run, each under its heading, in a folder of its own.

A block whose first line is `# PATH.py` is written to that file; all others are executed, in order
and in one fresh namespace. Each heading's last block ends in asserts.
"""

import importlib
import pathlib
import re
import sys

import pytest

DOC = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'extending.md'
HEADING = re.compile(r'^## (.+)$', re.M)
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.M | re.S)
FILE = re.compile(r'# ([\w/]+\.py)\n')
POINTS = (
    'A model', 'A drafter', 'A verifier', 'A logits transform', 'A tokenizer', 'An architecture',
    'A loss', 'An optimizer', 'A preset', 'An experiment',
)  # fmt: skip


def sections() -> dict[str, list[str]]:
    """Returns the Python blocks under each heading."""
    _, *parts = HEADING.split(DOC.read_text())
    return {name: BLOCK.findall(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


SECTIONS = sections()


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """A working directory that Python imports from, and no trace of what was imported there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, '__file__', None)):
            del sys.modules[name]


@pytest.mark.parametrize('name', POINTS)
def test_example(name, apart):
    namespace = {'__name__': 'example'}
    for block in SECTIONS[name]:
        if file := FILE.match(block):
            target = apart / file[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block)
        else:
            exec(compile(block, f'{DOC.name}: {name}', 'exec'), namespace)
    assert re.search(r'^assert |assert_allclose', SECTIONS[name][-1], re.M), 'a test asserts'


def test_every_section_is_an_example():
    assert tuple(SECTIONS) == POINTS
    assert all(SECTIONS.values())


def test_a_model_of_ones_own_is_short():
    (block,) = SECTIONS['A model']
    assert block.count('\n') <= 60
    assert max(map(len, block.splitlines())) <= 100
