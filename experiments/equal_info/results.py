"""The table and the plots of the comparison."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from experiments import plots, report
from experiments.report import Column
from lm.training import metrics as metrics_lib

# Row -> display name, and the paper's figures at 25m: bits per byte and bytes per token (Lester et
# al., tables 1 and 15). The paper has no Tunstall row; for arithmetic coding, its figure is the
# uniform rate, which its model did not improve on.
ROWS = {
    'bytes': ('bytes', 1.29, 1.00),
    'bpe': ('BPE', 1.12, 4.28),
    'arithmetic_256': ('AC[256]', 1.46, 5.49),
    'equal_info_16_256': ('EI[16, 256]', 1.47, 2.66),
    'equal_info_16_65k': ('EI[16, 65k]', 1.25, 5.31),
    'delay_16_65k': ('EI delay[16, 65k]', 1.23, 4.40),
    'tunstall_65k': ('Tunstall[65k]', None, None),
}

COLUMNS = (
    Column('name', 'over'),
    Column('vocab_size', 'V', '.0f'),
    Column('bytes_per_token', 'B/token', '.2f'),
    Column('uniform_bits_per_byte', 'uniform'),
    Column('unigram_bits_per_byte', 'unigram'),
    Column('bits_per_byte', 'M2'),
    Column('below_uniform', 'gain', '.1%'),
    Column('megaflops_per_byte', 'MFLOP/B', '.3g'),
    Column('train_megabytes', 'read MB', '.2f'),
    Column('encode_mb_per_s', 'enc MB/s', ',.2f'),
    Column('decode_mb_per_s', 'dec MB/s', ',.2f'),
    Column('round_trip_fraction', 'exact', '.2%'),
    Column('paper_bits_per_byte', 'paper M2', '.2f'),
    Column('paper_bytes_per_token', 'paper B/token', '.2f'),
)

FOOTNOTES = (
    'uniform, unigram, M2: bits per byte of held-out text under a uniform distribution of ids, '
    'under their frequencies in the training text, and under M2. gain: M2 below uniform.',
    'MFLOP/B: 2 FLOPs per body weight and token, without token tables, as in the paper. AC '
    '(arithmetic coding) runs M1 on both sides, but here M1 is an n-gram: look-ups, no FLOPs. EI '
    '(Equal-Info), delay and Tunstall are compiled and run no model.',
    'read MB: text that M2 saw in training. Every M2 had the same training compute, including the '
    'output table, so M2s with large vocabularies read less.',
    'exact: fraction of held-out documents that decode to the original.',
    'paper: 25m parameters, 26B tokens of C4; its BPE row is SentencePiece Unigram with 32k '
    'pieces; its AC row is the uniform rate, which no model improved on.',
)


def table_rows(rows: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Returns the rows for `report.table`, with the paper's figures."""
    result = []
    for key, metrics in rows.items():
        name, paper_bits, paper_bytes = ROWS[key]
        below = 1 - metrics['bits_per_byte'] / metrics['uniform_bits_per_byte']
        result.append(
            {
                'name': name,
                'below_uniform': below,
                'megaflops_per_byte': metrics['flops_per_byte'] / 1e6,
                'paper_bits_per_byte': paper_bits,
                'paper_bytes_per_token': paper_bytes,
                **metrics,
            }
        )
    return result


def claims(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns one line per finding of the paper: whether these rows reproduce it."""

    def below(row):
        return 1 - rows[row]['bits_per_byte'] / rows[row]['uniform_bits_per_byte']

    def bits(row):
        return rows[row]['bits_per_byte']

    def line(claim, shown, figures):
        return report.claim(shown, f'{claim} ({figures})')

    ac, windows = below('arithmetic_256'), below('equal_info_16_256')
    return [
        line('plain arithmetic coding is not learned: within 2% of uniform', abs(ac) < 0.02,
             f'{ac:.1%} below'),
        line('Equal-Info windows are learned: at least 3% below uniform', windows >= 0.03,
             f'{windows:.1%} below'),
        line('16-bit tokens beat 8-bit tokens over the same windows',
             bits('equal_info_16_65k') < bits('equal_info_16_256'),
             f'{bits("equal_info_16_65k"):.3f} and {bits("equal_info_16_256"):.3f}'),
        line('over 16-bit tokens, M2 beats their unigram frequencies',
             bits('equal_info_16_65k') < rows['equal_info_16_65k']['unigram_bits_per_byte'],
             f'{bits("equal_info_16_65k"):.3f}, unigram '
             f'{rows["equal_info_16_65k"]["unigram_bits_per_byte"]:.3f}'),
        line('Equal-Info [16, 65k] beats raw bytes', bits('equal_info_16_65k') < bits('bytes'),
             f'{bits("equal_info_16_65k"):.3f} and {bits("bytes"):.3f}'),
        line('subword tokens beat Equal-Info [16, 65k]', bits('bpe') < bits('equal_info_16_65k'),
             f'{bits("bpe"):.3f} and {bits("equal_info_16_65k"):.3f}'),
    ]  # fmt: skip


def plot(out: epath.Path, rows: Mapping[str, Mapping[str, float]], by_bit: Mapping[str, Any]):
    """Saves bits per byte against FLOPs per byte, loss curves, and accuracy by bit of a window."""
    points = [
        plots.Point(ROWS[key][0], metrics['flops_per_byte'] / 1e6,
                    metrics['bits_per_byte'])
        for key, metrics in rows.items()
    ]  # fmt: skip
    plots.scatter(
        out / 'bits_per_byte.png', points, title='Bits per byte against inference cost',
        x_label='M2 forward MFLOPs per byte of text (token tables not counted)',
        y_label='bits per byte, held-out text', log_x=True,
    )  # fmt: skip
    curves = {}
    for key, metrics in rows.items():
        records = metrics_lib.read_jsonl(out / 'm2' / key / 'metrics.jsonl')
        records = records[1:] or records  # the untrained first step would dominate the scale
        bits = (
            np.array([r['nats_per_token'] for r in records])
            / np.log(2)
            / metrics['bytes_per_token']
        )
        done = np.array([r['step'] for r in records]) / records[-1]['step']
        curves[ROWS[key][0]] = (100 * done, bits)
    plots.curves(
        out / 'loss_curves.png', curves, title='Training loss at equal compute',
        x_label='training compute, % of the run', y_label='bits per byte of training text',
    )  # fmt: skip
    plots.curves(
        out / 'accuracy_by_bit.png',
        {ROWS[key][0]: (list(range(1, 17)), list(by_bit[key])) for key in by_bit},
        title='Accuracy of M2 by bit of a window', x_label='bit of the 16-bit window',
        y_label='accuracy given the previous bits (chance: 0.5)', markers=True,
    )  # fmt: skip


def flat(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns `metric/row` -> number."""
    return {
        report.key(metric, row): value
        for row, metrics in rows.items()
        for metric, value in metrics.items()
    }
