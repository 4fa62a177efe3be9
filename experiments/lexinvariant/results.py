"""Keys, tables and plots, with the paper's figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from experiments import plots, report
from experiments.lexinvariant.config import Config
from experiments.lexinvariant.models import CHARACTERS, LEXINVARIANT, STANDARD, Name
from experiments.report import Column
from lm.model import lexinvariant

# Figures from the abstract and the text of Huang et al. 2023.
PAPER = {
    'ratio': 'a gap of 9x at first, below 1x after 512 characters',
    'key': 0.996,
    'tasks': 'about 4 times the standard model',
    'p': 'p = 0.2: +25% on BIG-bench',
}
KINDS = {STANDARD: 'standard', LEXINVARIANT: 'lexinvariant'}
PAPER_P, PAPER_LAST = 0.2, 1.0
Curves = Mapping[Name, Mapping[str, list[float]]]


def spans(length: int) -> list[tuple[int, int]]:
    """Returns the intervals (N / 2, N] of positions that are averaged, counting from 1."""
    ends = [1]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    return [(end // 2 if end > 1 else 0, end) for end in ends]


def positions(config: Config, curves: Curves, distinct: int) -> dict[str, float]:
    """Prints perplexity by position, standard and lexinvariant; returns the metrics.

    `distinct` is the mean number of distinct characters in a text of prose.
    """
    metrics: dict[str, float] = {}
    rows, findings = [], []
    for tokenizer, domain in dict.fromkeys((n.tokenizer, n.domain) for n in curves):
        pair = [curves[Name(tokenizer, domain, p)] for p in KINDS]
        where = {} if domain == 'prose' else {'domain': domain}
        ratios = []
        for start, end in spans(config.train.length):
            nats = [float(np.mean(curve['nats'][start:end])) for curve in pair]
            size = float(np.mean(pair[0]['bytes'][start:end]))
            bits = [n / np.log(2) / size for n in nats]
            ratio = float(np.exp(nats[1] - nats[0]))
            metrics[report.key('perplexity_ratio', tokenizer, position=end, **where)] = ratio
            ratios.append(ratio)
            for kind, value in zip(KINDS.values(), bits):
                row = f'{tokenizer}_{kind}'
                metrics[report.key('bits_per_byte', row, position=end, **where)] = value
            counts = float(np.exp(np.mean(pair[1]['counts'][start:end])))
            metrics[report.key('perplexity', f'{tokenizer}_counts', position=end, **where)] = counts
            rows.append({
                'text': f'{domain}, {tokenizer}', 'position': end, 'standard': np.exp(nats[0]),
                'lexinvariant': np.exp(nats[1]), 'ratio': ratio, 'bits': bits[0], 'more': bits[1],
                'counts': counts,
            })  # fmt: skip
        # The gap is measured from its maximum: at the first symbol, both models only guess.
        most, last = max(ratios), ratios[-1]
        findings.append(report.claim(
            last - 1 <= (most - 1) / 2, f'{domain}, {tokenizer}: the gap, ratio - 1, falls to half '
            f'of its maximum (from {most - 1:.1f} to {last - 1:.1f})',
        ))  # fmt: skip
        findings.append(report.claim(
            last <= PAPER_LAST, f'{domain}, {tokenizer}: the ratio ends at {PAPER_LAST:g} or below '
            f'({last:.1f})',
        ))  # fmt: skip
    columns = [
        Column('text', 'text'), Column('position', 'position up to', '.0f'),
        Column('standard', 'perplexity: standard', '.2f'),
        Column('lexinvariant', 'lexinvariant', '.2f'),
        Column('counts', 'counts', '.2f'), Column('ratio', 'ratio', '.2f'),
        Column('bits', 'bits/byte: standard', '.2f'), Column('more', ' lexinvariant', '.2f'),
    ]  # fmt: skip
    symbols, length = 128, config.train.length
    cost = lexinvariant.regret_bound(symbols, distinct) / np.log(2) / length
    report.table(rows, columns, 'perplexity by position, averaged from the previous power of 2', [
        f'paper (150M parameters): {PAPER["ratio"]}',
        'counts: n-gram counts of the same text, orders 0 to 2 with Witten-Bell smoothing, a '
        'baseline without knowledge of the language',
        f'not knowing the symbols costs an ideal model at most {cost:.2f} bits per character for '
        f'{length} characters of which {distinct} are distinct, as in these texts',
        *findings,
    ])  # fmt: skip
    return metrics


def ciphers(config: Config, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Prints cipher accuracies by model and context; returns the metrics."""
    columns = [
        Column('model', 'reader'), Column('context', 'characters', '.0f'),
        Column('accuracy', 'positions read', '.3f'), Column('text', 'text by the key', '.3f'),
        Column('key', 'key recovered', '.3f'), Column('whole', 'whole keys', '.3f'),
    ]  # fmt: skip
    last = {row['model']: row['key'] for row in rows}  # after the longest context
    report.table(rows, columns, f'{config.ciphers} substitution ciphers of 128 symbols', [
        report.claim(
            last['lexinvariant'] > max(0.5, last['standard']), 'the lexinvariant model\'s hidden '
            'states reveal most of the key, and more of it than the standard model\'s '
            f'({last["lexinvariant"]:.1%} and {last["standard"]:.1%})',
        ),
        f'paper: {PAPER["key"]:.1%} of the key (150M parameters, 512 characters)',
        'positions read: accuracy in the second half of the context. key recovered: fraction of '
        'the occurring symbols; whole keys: fraction of texts with all of them recovered. '
        'classical: hill climbing on bigrams of the training text, best of '
        f'{config.climbs} restarts.',
    ])  # fmt: skip
    metrics: dict[str, float] = {}
    for row in rows:
        for metric, name in (
            ('decipher_accuracy', 'accuracy'), ('key_recovery', 'key'), ('text_accuracy', 'text'),
            ('whole_keys', 'whole'),
        ):  # fmt: skip
            if row[name] is not None:
                metrics[report.key(metric, row['model'], context=row['context'])] = row[name]
    return metrics


def tasks(rows: list[dict[str, Any]], chance: Mapping[str, float]) -> dict[str, float]:
    """Prints bits per byte and task accuracies by p; returns the metrics.

    `chance` is the accuracy of a random guess among the symbols in the task.
    """
    columns = [
        Column('p', 'p', 'g'), Column('prose', 'bits/byte: prose', '.3f'),
        Column('code', 'code', '.3f'), Column('lookup', 'look-up', '.3f'),
        Column('permutation', 'permutation', '.3f'),
    ]  # fmt: skip
    known = {row['p']: row for row in rows}
    findings = []
    for name in ('lookup', 'permutation'):
        ours, standard = known[LEXINVARIANT][name], known[STANDARD][name]
        findings.append(report.claim(
            ours > max(2 * standard, chance[name]), f'{name}: above chance, and above twice the '
            f'standard model ({ours:.1%} and {standard:.1%})',
        ))  # fmt: skip
    for domain in ('prose', 'code') if PAPER_P in known else ():
        mixed, plain = known[PAPER_P][domain], known[STANDARD][domain]
        findings.append(report.claim(
            mixed < plain, f'p = {PAPER_P:g} regularises, {domain}: below p = 0 ({mixed:.3f} and '
            f'{plain:.3f} bits per byte; one seed)',
        ))  # fmt: skip
    report.table(rows, columns, 'rows of the table random with probability p; trained on prose', [
        f'paper: tasks {PAPER["tasks"]}; {PAPER["p"]} (150M parameters)',
        'models with 0 < p < 1 are evaluated with their learned rows; chance: '
        + ', '.join(f'{name} {share:.3f}' for name, share in chance.items()),
        *findings,
    ])  # fmt: skip
    metrics: dict[str, float] = {}
    for row in rows:
        model = KINDS.get(row['p'], f'p_{row["p"]:g}')
        for task in ('lookup', 'permutation'):
            metrics[report.key('task_accuracy', model, task=task)] = row[task]
        for domain in ('prose', 'code'):
            name = f'p={row["p"]:g}'
            metrics[f'bits_per_byte/{name}/domain={domain}'] = row[domain]
    return metrics


def plot(out: epath.Path, config: Config, curves: Curves, ciphers: list[dict[str, Any]]) -> None:
    """Saves plots of perplexity and its ratio by position, and of key recovery by context."""
    ends = [end for _, end in spans(config.train.length)]

    def means(nats):
        return [float(np.exp(np.mean(nats[a:b]))) for a, b in spans(config.train.length)]

    every = {name: means(curve['nats']) for name, curve in curves.items()}
    characters = {
        f'{name.domain}, {KINDS[name.probability]}': (ends, y)
        for name, y in every.items() if name.tokenizer == CHARACTERS
    }  # fmt: skip
    ratios = {
        f'{n.domain}, {n.tokenizer}': (
            ends, [a / b for a, b in zip(every[n._replace(probability=LEXINVARIANT)], y)]
        )
        for n, y in every.items() if n.probability == STANDARD
    }  # fmt: skip
    plots.curves(
        out / 'perplexity.png', characters, title='Perplexity by position, characters',
        x_label='position', y_label='perplexity', log_x=True, log_y=True, markers=True,
    )  # fmt: skip
    plots.curves(
        out / 'perplexity_ratio.png', ratios, title='Lexinvariant over standard perplexity',
        x_label='position', y_label='ratio', log_x=True, markers=True,
    )  # fmt: skip
    recovery: dict[str, tuple[list[float], list[float]]] = {}
    for row in ciphers:
        x, y = recovery.setdefault(row['model'], ([], []))
        x.append(row['context'])
        y.append(row['key'])
    plots.curves(
        out / 'key_recovery.png', recovery, title='Recovery of cipher keys',
        x_label='characters of ciphertext', y_label='fraction of its symbols', log_x=True,
        markers=True,
    )  # fmt: skip
