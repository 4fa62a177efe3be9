"""Draws a cipher and, below it, the model's reading of each character."""

import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
from etils import epath

from experiments import plots
from experiments.lexinvariant.decipher import Reading

_LINE = 64  # characters
_RIGHT, _WRONG, _CIPHER = plots.COLORS[0], plots.COLORS[1], '#999999'


def draw(path: epath.PathLike, readings: dict[str, Reading], row: int) -> None:
    """Saves a picture of one text: the ciphertext, and each model's reading at every position."""
    length = next(iter(readings.values())).plain_RL.shape[1]
    lines = -(-length // _LINE)
    rows = lines * (len(readings) + 2)
    figure = matplotlib.figure.Figure(figsize=(10, 0.24 * rows + 0.9), dpi=120)
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_axes((0.14, 0.02, 0.85, 0.86))
    axes.set_xlim(-0.5, _LINE - 0.5)
    axes.set_ylim(rows - 0.5, -1)
    axes.axis('off')
    for line in range(lines):
        top = line * (len(readings) + 2)
        part = slice(line * _LINE, (line + 1) * _LINE)
        first = next(iter(readings.values()))
        _write(axes, top, 'cipher', first.cipher_RL[row, part], None)
        for i, (name, reading) in enumerate(readings.items()):
            read = reading.logprob_RLV[row, part].argmax(-1)
            _write(axes, top + 1 + i, name, read, reading.plain_RL[row, part])
    figure.suptitle(
        'Reading a substitution cipher, character by character\n'
        'blue: read correctly from the preceding text; orange: incorrectly',
        x=0.01, ha='left', fontsize=11, fontweight='bold',
    )  # fmt: skip
    plots.save(path, figure)


def _write(axes, y: float, name: str, ids: np.ndarray, truth: np.ndarray | None) -> None:
    style = {'va': 'center', 'family': 'monospace', 'fontsize': 9, 'parse_math': False}
    axes.text(-1.2, y, name, ha='right', va='center', fontsize=8, color='#444444')
    for x, symbol in enumerate(ids.tolist()):
        color = _CIPHER if truth is None else _RIGHT if symbol == truth[x] else _WRONG
        axes.text(x, y, shown(symbol), ha='center', color=color, **style)


def shown(symbol: int) -> str:
    """Returns a printable character for an id below 128, also for blanks and controls."""
    if symbol == ord(' '):
        return '␣'
    if symbol < 32 or symbol == 127:
        return {9: '→', 10: '↵'}.get(symbol, '·')
    return chr(symbol)
