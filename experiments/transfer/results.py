"""Keys, tables and plots of the comparison."""

from typing import Any

from etils import epath

from experiments import plots, report
from experiments.report import Column

HYPERNETWORK, ORACLE = 'hypernetwork', 'oracle'
# Figures of Minixhofer et al. 2024, tables 3 and 4 and section 5, for comparison.
PAPER = (
    'paper (Mistral 7B to GPT-2): average of tasks 76.9 before, 73.0 zero-shot, 74.9 after '
    '800M tokens; to StarCoder, HumanEvalPack: 28.1 before, 23.2 zero-shot (FOCUS 13.3), 27.6 after'
)
# Feher et al. 2024; the versions of the abstract differ.
DYNAMIC_PAPER = (
    'paper (Mistral 7B, decoder): up to 40% shorter in version 1 of the abstract, 17% in a later '
    'one, 6% (English) in another; XLM-R: above 20% shorter for less than 2% of accuracy'
)
Row = dict[str, Any]


def table(rows: list[Row]) -> dict[str, float]:
    """Prints a table per number of steps, and the findings; returns the metrics."""
    own = next(row for row in rows if row['target'] == 'own')
    moved = [row for row in rows if row is not own]
    metrics: dict[str, float] = {}
    for row in rows:
        where = {'target': row['target'], 'shots': row['shots']}
        metrics[report.key('bits_per_byte', row['method'], **where)] = row['bits_per_byte']
        metrics[report.key('bytes_per_token', row['target'])] = row['bytes_per_token']
        if row['method'] == HYPERNETWORK and not row['shots']:
            metrics[report.key('transfer_seconds', row['target'])] = row['seconds']
    for shots in sorted({row['shots'] for row in moved}):
        some = [row for row in moved if row['shots'] == shots]
        metrics |= _print(own, some, shots)
    return metrics


def _print(own: Row, rows: list[Row], shots: int) -> dict[str, float]:
    """Prints one table, with a row per target and a column per method."""
    methods = list(dict.fromkeys(row['method'] for row in rows))
    lines, claims, metrics = [], [], {}
    for target in dict.fromkeys(row['target'] for row in rows):
        found = {row['method']: row for row in rows if row['target'] == target}
        ours = found[HYPERNETWORK]
        scratch = found.pop(ORACLE, None)
        others = {name: row['bits_per_byte'] for name, row in found.items() if row is not ours}
        best = min(others, key=lambda name: others[name])
        gap = others[best] - own['bits_per_byte']
        closed = (others[best] - ours['bits_per_byte']) / gap if gap > 0 else None
        lines.append({
            'target': target, 'bytes': ours['bytes_per_token'], 'closed': closed,
            'size': float(ours['vocab_size']), 'seconds': ours['seconds'], **others,
            HYPERNETWORK: ours['bits_per_byte'], ORACLE: scratch and scratch['bits_per_byte'],
        })  # fmt: skip
        if closed is not None:
            where = {'target': target, 'shots': shots}
            metrics[report.key('gap_closed', HYPERNETWORK, **where)] = closed
        claims.append(report.claim(
            ours['bits_per_byte'] < others[best], f'{target}: the hypernetwork beats every '
            f'heuristic ({ours["bits_per_byte"]:.3f}, and {others[best]:.3f} by {best})',
        ))  # fmt: skip
    columns = [
        Column('target', 'target'), Column('size', 'tokens', '.0f'),
        Column('bytes', 'bytes/token', '.2f'),
        *(Column(name, name.replace('_', ' ')) for name in methods),
        Column('closed', 'gap closed', '.0%'), Column('seconds', 'seconds', '.1f'),
    ]  # fmt: skip
    title = 'zero-shot' if not shots else f'after {shots} more steps'
    report.table(lines, columns, f'bits per byte, {title}', [
        f'with the original tokenizer: {own["bits_per_byte"]:.3f} at '
        f'{own["bytes_per_token"]:.2f} bytes per token',
        'gap closed: (best heuristic - hypernetwork) / (best heuristic - original tokenizer); '
        'seconds: to predict the whole vocabulary, including compilation',
        *(['oracle: trained from scratch with the target'] if ORACLE in methods else []),
        *claims, *([] if shots else [PAPER]),
    ])  # fmt: skip
    return metrics


def variants(rows: list[Row]) -> dict[str, float]:
    """Prints bits per byte of a variant transferred by task arithmetic; returns the metrics."""
    columns = [
        Column('target', 'target'), Column('model', 'model'), Column('weight', 'weight', 'g'),
        Column('bits_per_byte', 'bits/byte'),
    ]  # fmt: skip
    report.table(rows, columns, 'bits per byte of prose', [
        'base: the source; variant: the source, fine-tuned on prose',
        'weight: of the base\'s change in continued training, which is added to the variant',
        'paper: weights up to 0.7',
    ])  # fmt: skip
    metrics = {}
    for row in rows:
        where = {'target': row['target']}
        where |= {} if row['weight'] is None else {'weight': row['weight']}
        metrics[report.key('prose_bits_per_byte', row['model'], **where)] = row['bits_per_byte']
    return metrics


def dynamic(rows: list[Row]) -> dict[str, float]:
    """Prints bits per byte against the reduction of sequence length; returns the metrics."""
    columns = [
        Column('share', 'of maximal reduction', '.0%'), Column('merges', 'merges', '.0f'),
        Column('reduction', 'shorter by', '.1%'), Column('bits_per_byte', 'bits/byte'),
        Column('names', 'bits/byte to name units', '.3f'), Column('found', 'cache hits', '.0%'),
    ]  # fmt: skip
    report.table(rows, columns, 'dynamic tokenization, boundary: word', [
        'units are made from the batch itself; the cost of naming them, two units per merge, is '
        'not included in bits/byte',
        DYNAMIC_PAPER,
    ])  # fmt: skip
    metrics = {}
    for row in rows:
        share = f'{row["share"]:g}'
        for metric in ('bits_per_byte', 'reduction'):
            metrics[report.key(metric, 'dynamic', share=share)] = row[metric]
    return metrics


def plot(out: epath.Path, rows: list[Row], shorter: list[Row]) -> None:
    """Plots zero-shot bits per byte as bars per target, and those of dynamic tokenization."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row['shots'] and row['target'] != 'own':
            name = row['method'].replace('_', ' ')
            groups.setdefault(row['target'], {})[name] = row['bits_per_byte']
    plots.bars(out / 'zero_shot.png', groups, title='zero-shot transfer', y_label='bits per byte')
    line = [row['reduction'] for row in shorter], [row['bits_per_byte'] for row in shorter]
    plots.curves(
        out / 'dynamic.png', {'units of the batch': line}, title='dynamic tokenization',
        x_label='reduction of sequence length', y_label='bits per byte', markers=True,
    )  # fmt: skip
