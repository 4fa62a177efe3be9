"""Every row of docs/systems.md names what exists: a file, a test, an experiment, a key, figures.

As in `test_contracts.py`, a rule is a function to its offences; here it takes a row of the table.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCALES = ('tiny', 'demo', 'cpu', 'gpu', 'paper')
STATE = re.compile(rf'(shown|shown in part|not shown|refuted), `({"|".join(SCALES)})`')
ARXIV = re.compile(r'arXiv \d{4}\.\d{5}')
EXPERIMENT = re.compile(r'\[(\w+)\]\(\.\./experiments/\1/README\.md\) `([^`]+)`')


class Row(NamedTuple):
    """The cells of a row."""

    system: str
    here: str
    file: str
    test: str
    experiment: str
    state: str
    figures: str


def rows(text: str) -> list[Row]:
    """Returns the rows of the only table in a text."""
    lines = [line.strip().strip('|') for line in text.splitlines() if line.startswith('|')]
    return [Row(*(cell.strip() for cell in line.split('|'))) for line in lines[2:]]


def described(row: Row) -> Iterator[str]:
    """Systems without a paper or with a long description."""
    if not re.search(r'\b20\d\d\b', row.system) or not ARXIV.search(row.system):
        yield f'{row.system}: no year and arXiv number'
    if not 2 <= len(row.here.split()) <= 6:
        yield f'{row.system}: describe it in about five words'


def files(row: Row) -> Iterator[str]:
    """Files and tests that are not there."""
    file = row.file.strip('`')
    if not file.endswith('.py') or not (ROOT / file).is_file():
        yield f'{row.system}: no {file}'
    path, _, test = row.test.strip('`').partition('::')
    if not path.startswith('tests/') or not (ROOT / path).is_file():
        yield f'{row.system}: no {path}'
    elif not re.search(rf'^ *def {test}\(', (ROOT / path).read_text(), re.M):
        yield f'{row.system}: no {test} in {path}'


def keys(row: Row) -> Iterator[str]:
    """Keys whose metric, row or conditions the experiment's sources do not name."""
    found = EXPERIMENT.fullmatch(row.experiment)
    if not found or not (ROOT / 'experiments' / found[1] / 'main.py').is_file():
        yield f'{row.system}: no experiment and key in {row.experiment!r}'
        return
    sources = '\n'.join(
        path.read_text() for path in sorted((ROOT / 'experiments' / found[1]).glob('*.py'))
    )
    metric, *conditions = found[2].split('/')
    name = conditions.pop(0) if conditions else ''
    for part in (metric, name):
        if f"'{part}'" not in sources:
            yield f'{row.system}: experiments/{found[1]} has no {part!r}'
    for condition in conditions:
        part = re.escape(condition.partition('=')[0])
        if '=' not in condition or not re.search(rf"'{part}'|\b{part}=", sources):
            yield f'{row.system}: experiments/{found[1]} has no condition {condition!r}'


def figures(row: Row) -> Iterator[str]:
    """Unknown states, and figures that the experiment's README does not have."""
    if not STATE.fullmatch(row.state):
        yield f'{row.system}: unknown state {row.state!r}'
    if not row.figures:
        yield f'{row.system}: no figures'
    found = EXPERIMENT.fullmatch(row.experiment)
    readme = ROOT / 'experiments' / (found[1] if found else '') / 'README.md'
    known = re.findall(r'\d+\.\d+', readme.read_text()) if readme.is_file() else []
    for figure in re.findall(r'\d+\.\d+', row.figures):
        if figure not in known:
            yield f'{row.system}: {readme.parent.name}/README.md has no {figure}'


RULES = (described, files, keys, figures)
TABLE = rows((ROOT / 'docs/systems.md').read_text())
GOOD = TABLE[0]


@pytest.mark.parametrize('rule', RULES)
def test_table(rule):
    assert len(TABLE) == len({row.system for row in TABLE}) > 1
    offences = [offence for row in TABLE for offence in rule(row)]
    assert not offences, '\n'.join(['', *offences])


@pytest.mark.parametrize(
    ('rule', 'field', 'bad'),
    [
        (described, 'system', 'Ours'),
        (described, 'system', 'Theirs 2024'),
        (described, 'here', ''),
        (described, 'here', 'all that one could ever say about it'),
        (files, 'file', '`lm/missing.py`'),
        (files, 'file', ''),
        (files, 'test', '`tests/test_missing.py::test_x`'),
        (files, 'test', '`tests/test_systems.py::test_missing`'),
        (files, 'test', '`tests/test_systems.py`'),
        (keys, 'experiment', '[missing](../experiments/missing/README.md) `bits_per_byte/a`'),
        (keys, 'experiment', GOOD.experiment.replace('`bits_per_byte', '`bits_per_bit')),
        (keys, 'experiment', GOOD.experiment.replace('16_256', '17_256')),
        (keys, 'experiment', GOOD.experiment[:-1] + '/moon=full`'),
        (keys, 'experiment', GOOD.experiment.replace('/equal_info_16_256', '')),
        (figures, 'state', 'surely shown, `cpu`'),
        (figures, 'state', 'shown, `galaxy`'),
        (figures, 'state', 'shown'),
        (figures, 'figures', '0.0123 bits per byte'),
        (figures, 'figures', ''),
    ],
)
def test_rules_find_what_they_look_for(rule, field, bad):
    assert not list(rule(GOOD))
    assert list(rule(GOOD._replace(**{field: bad})))
