"""Metrics, tables and plots as they are saved and printed."""

import dataclasses
import io
import json
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from etils import epath
from matplotlib import image
from matplotlib.text import Text

from experiments import plots, report
from lm.files import provenance

COLUMNS = [
    report.Column('row', 'tokenizer'),
    report.Column('bpb', 'bits per byte'),
    report.Column('vocab', 'vocabulary', ',d'),
]
ROWS = [
    {'row': 'bytes', 'bpb': 1.29, 'vocab': 256},
    {'row': 'a|b [x]', 'bpb': np.float32(1.5), 'vocab': 65536},
    {'row': 'later', 'vocab': 3},
]


def test_json_takes_what_configs_and_metrics_hold(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        path: epath.Path
        sizes: tuple[int, ...] = (1, 2)

    file = tmp_path / 'a.json'
    values = {'c': Config(epath.Path('x/y')), 'n': np.float32(0.5), 'j': jnp.int32(3), 'none': None}
    report.write_json_atomic(file, values)
    want = {'c': {'path': 'x/y', 'sizes': [1, 2]}, 'n': 0.5, 'j': 3, 'none': None}
    assert json.loads(file.read_text()) == want
    assert list(json.loads(file.read_text())) == sorted(want)


@pytest.mark.parametrize('bad', [float('nan'), object()])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, bad):
    file = tmp_path / 'a.json'
    report.write_json_atomic(file, {'a': 1})
    with pytest.raises((TypeError, ValueError)):
        report.write_json_atomic(file, {'a': bad})
    assert json.loads(file.read_text()) == {'a': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / 'a.json'
    report.write_json_atomic(file, {'a': 1})

    def full(path, text):
        path.write_bytes(text[:3].encode())
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(pathlib.Path, 'write_text', full)
    with pytest.raises(OSError, match='No space'):
        report.write_json_atomic(file, {'a': 2})
    assert json.loads(file.read_text()) == {'a': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_keys():
    assert report.key('bits_per_byte', 'bpe') == 'bits_per_byte/bpe'
    with_conditions = report.key('block_efficiency', 'recursive', budget=14, temperature=1.0)
    assert with_conditions == 'block_efficiency/recursive/budget=14/temperature=1'


@pytest.mark.parametrize('parts', [('a/b', 'c'), ('a', ''), ('a', 'b c'), ('a=1', 'b')])
def test_keys_refuse_what_would_not_split_again(parts):
    with pytest.raises(ValueError, match=r'key|="'):
        report.key(*parts)


def test_environment_names_the_commit():
    found = report.environment()
    top = subprocess.run(
        ['git', '-C', provenance.ROOT, 'rev-parse', 'HEAD'], capture_output=True, text=True
    )
    assert found['commit'] == (top.stdout.strip() or None)
    assert found['cpu_cores'] >= 1 and found['cpu']
    assert report.devices()['device_count'] >= 1


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, 'ROOT', tmp_path)
    found = report.environment()
    assert found['commit'] is None and found['dirty'] is None


def test_both_tables_show_every_cell():
    text = io.StringIO()
    report.table(ROWS, COLUMNS, 'A title', ['measured'], rich.console.Console(file=text))
    markdown = report.markdown_table(ROWS, COLUMNS, ['measured'])
    for shown in (text.getvalue(), markdown):
        for cell in ('tokenizer', 'bits per byte', '1.290', '1.500', '65,536', '–', 'measured'):
            assert cell in shown
    assert 'A title' in text.getvalue() and 'a|b [x]' in text.getvalue()
    assert '| --- | ---: | ---: |' in markdown and r'a\|b' in markdown


def test_scatter_is_a_png_whose_labels_do_not_overlap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, 'save', lambda path, figure: figures.append(figure))
    # Six points close together: if all labels were to their right, they would overlap.
    points = [plots.Point(f'tokenizer {i}', 100 + i, 1 + 0.01 * i, 'g') for i in range(6)]
    points.append(plots.Point('far', 1000, 2, 'h'))
    plots.scatter(tmp_path / 'p.png', points, title='t', x_label='x', y_label='y', log_x=True)
    boxes = _label_boxes(figures[0])
    frame = figures[0].axes[0].get_window_extent()
    assert len(boxes) == 7
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not overlaps
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)


def _label_boxes(figure):
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    return [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]


def test_plots_are_written_whole(tmp_path):
    lines = {f'line {i}': (range(1, 5), [i + 1.0] * 4) for i in range(9)}
    labels = {'title': 't', 'x_label': 'x', 'y_label': 'y'}
    plots.curves(tmp_path / 'c.png', lines, **labels, log_y=True, markers=True)
    plots.scatter(tmp_path / 's.png', [plots.Point('a', 0, 0)], **labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['c.png', 's.png']
    assert image.imread(tmp_path / 'c.png').shape[:2] == (750, 1200)


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ({}, 'no lines'),
        ({'a': ([1, 2], [1])}, '2 x and 1 y'),
        ({'a': ([1], [float('nan')])}, "'a' has y = nan"),
        ({'a': ([1], [0.0])}, "'a' has y = 0"),
    ],
)
def test_plots_refuse_what_they_cannot_show(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        plots.curves(tmp_path / 'c.png', lines, title='', x_label='', y_label='', log_y=True)
    assert not list(tmp_path.iterdir())
