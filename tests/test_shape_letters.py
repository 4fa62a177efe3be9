"""Names of arrays use the letters that `lm/__init__.py` declares, each in its own rooms.

As in `test_contracts.py`, a rule is a function from a file's name and text to its offences.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ('lm', 'tokenization', 'decoding', 'experiments')
DECLARED = re.compile(r'^    ([A-Z])  \S.*?(?: \(([a-z/, ]+)\))?$', re.M)
# `x_B1D`, `wq_NDHC`; not `MAX_D`, `x_`, or `sha_256`.
ARRAY = re.compile(r'_?[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)')


def letters(text: str) -> dict[str, tuple[str, ...]]:
    """Returns letter -> rooms that may use it, from the docstring that declares them."""
    found = DECLARED.findall(ast.get_docstring(ast.parse(text), clean=False) or '')
    assert len(found) == len(dict(found)), 'a letter is declared twice'
    return {letter: tuple(rooms.split(', ')) if rooms else ROOMS for letter, rooms in found}


LETTERS = letters((ROOT / 'lm/__init__.py').read_text())


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and name of all variables, arguments, attributes and names of leaves."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.Constant(value=str(name)):  # a parameter leaf
                yield node.lineno, name


def shapes(name: str, text: str, known: dict[str, tuple[str, ...]] = LETTERS) -> Iterator[str]:
    """Arrays with an undeclared letter, or with one that belongs to other rooms."""
    for line, array in sorted(set(_names(ast.parse(text)))):
        if found := ARRAY.fullmatch(array):
            for letter in re.findall('[A-Z]', found[1]):
                if not name.startswith(tuple(f'{room}/' for room in known.get(letter, ()))):
                    yield f'{name}:{line}: {array}: {letter} is not declared in lm/__init__.py'


def test_tree():
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob('*.py'))]
    offences = [
        offence
        for path in files
        for offence in shapes(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert not offences, '\n'.join(['', *offences])


def test_every_letter_is_declared_for_rooms_that_exist():
    assert {'B', 'L', 'D', 'V'} <= LETTERS.keys()
    for rooms in LETTERS.values():
        assert all((ROOT / room).is_dir() for room in rooms), rooms


KNOWN = {'B': ROOMS, 'D': ROOMS, 'Y': ('tokenization',)}


@pytest.mark.parametrize(
    'bad',
    [
        'x_BQ = 1',
        'x_Q1 = 1',
        'def f(x_QD): return x_QD',
        'def f(x): return x.table_BQ',
        "params['w_DQ']",
        'f(x_Q=1)',
        'x_Y = 1',
    ],
)
def test_finds_letters_that_are_not_declared(bad):
    assert list(shapes('lm/a.py', bad, KNOWN))


@pytest.mark.parametrize(
    'good',
    [
        'x_B1D, _rows_D, sha_256, SIZE_Q, AQ, x_ = range(6)',
        "params['w_DB'], 'x_Q of a sentence', 'MAX_Q'",
        'x = lambda w_16D: w_16D',
    ],
)
def test_lets_declared_letters_pass(good):
    assert not list(shapes('lm/a.py', good, KNOWN))
    assert not list(shapes('tokenization/a.py', 'keys_Y2 = 1', KNOWN))


def test_a_letter_may_not_be_declared_twice():
    with pytest.raises(AssertionError, match='twice'):
        letters('"""Letters.\n\n    B  batch\n    B  bytes\n"""')
