"""Trains one M2 per representation of the same text and compares bits per byte."""

import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from experiments import corpora, language_model, report, resume
from experiments.equal_info import measure, models, results, tokenizers
from experiments.equal_info.config import Config
from experiments.language_model import Fitted
from lm.checkpoints import bundle
from lm.devices import processes
from lm.files import json_fields
from lm.losses import next_token as losses
from lm.model import params
from lm.training import train
from tokenization.tokenizer import Tokenizer

_PAPER_RULE_BYTES = 50_000
_BIT_ROWS = ('equal_info_16_256', 'equal_info_16_65k')
_BIT_ROWS_PER_DEVICE = 2  # few, since all logits of a row are in memory at once
_BIT_BATCHES = 32


def main(config: Config, out: epath.Path, mesh: Mesh) -> dict[str, float]:
    """Runs the whole comparison, resuming from `out`; returns flat metrics."""
    begin = time.monotonic()
    console = Console()
    language_model.check(config.m1, config.m1_train, mesh, 'm1_train')
    language_model.check(config.m2, config.m2_train, mesh, 'm2_train')
    corpus = corpora.open_corpus(config.data, config.tfds)
    resume.claim_corpus(out, corpus)
    fit_text = corpora.first_bytes(corpus.train, config.fit_bytes)
    train_text = corpora.first_bytes(corpus.train, config.train_bytes)
    valid = corpora.first_bytes(corpus.valid, config.held_out_bytes)
    test = corpora.first_bytes(corpus.test, config.held_out_bytes)
    sizes = [sum(map(len, text)) / 1e6 for text in (fit_text, train_text, test)]
    console.print('{}: {:.1f} MB for tokenizers, {:.1f} MB for M2, {:.2f} MB for testing'.format(
        corpus.name, *sizes))  # fmt: skip
    first = models.first_models(config, fit_text, valid, out, mesh)
    codecs = tokenizers.compiled(config, first, valid)
    best = max(codecs, key=lambda name: codecs[name].bytes_per_code)
    for name, codec in codecs.items():
        console.print(
            f'{name}: {first.bits[name]:.3f} bits per byte when reset every {config.window_bytes} '
            f'bytes, {codec.bytes_per_code:.2f} bytes per 16-bit window'
        )
    console.print(f'the codecs are compiled from the {best}')
    rows, by_bit = {}, {}
    for name, tokenizer in tokenizers.build(config, first, codecs[best], fit_text, out).items():
        rows[name], by_bit[name] = compare(config, name, tokenizer, train_text, test, out, mesh)
    by_itself = first.ngram.bits_per_byte(test)
    paper_text = corpora.first_bytes(test, _PAPER_RULE_BYTES)
    paper_rule = measure.paper_rule_round_trip(codecs[best].model, paper_text, config.window_bytes)
    show(rows, paper_rule, by_itself, out)
    results.plot(out, rows, {name: by_bit[name] for name in _BIT_ROWS})
    console.print(f'plots, bundles and result.json: {out}')
    metrics = {
        **results.flat(rows),
        report.key('round_trip_fraction', 'paper_rule'): paper_rule,
        report.key('bits_per_byte', 'ngram'): by_itself,
        report.key('seconds', 'this_process'): time.monotonic() - begin,
    }
    for name, codec in codecs.items():
        metrics[report.key('bits_per_byte_reset', name)] = first.bits[name]
        metrics[report.key('bytes_per_window', name)] = codec.bytes_per_code
    return metrics


def compare(
    config: Config,
    name: str,
    tokenizer: Tokenizer,
    train_text: Sequence[bytes],
    test: Sequence[bytes],
    out: epath.Path,
    mesh: Mesh,
) -> tuple[dict[str, float], list[float]]:
    """Returns the metrics of one row, and M2's accuracy for each bit of its 16-bit windows."""
    file = out / 'rows' / f'{name}.json'
    if file.exists():
        saved = json_fields.read(file)
        return saved['metrics'], saved['accuracy_by_bit']
    documents = resume.encoded_once(
        tokenizer, train_text, out / 'encoded' / name, f'encoding {name}'
    )
    held_out = measure.encoded(tokenizer, test)
    fitted = models.second_model(
        config, documents, tokenizer.vocab_size, out / 'm2' / name, mesh, name
    )
    n_bytes = sum(map(len, test))
    run = models.same_compute(config, tokenizer.vocab_size)
    batches = language_model.evaluation(
        held_out.ids, tokenizer.vocab_size, run.batch_size, run.length
    )
    bits = losses.bits_per_byte(language_model.nats(fitted, batches, mesh), n_bytes)
    metrics = {
        **held_out.metrics,
        'vocab_size': float(tokenizer.vocab_size),
        'unigram_bits_per_byte': measure.unigram_bits_per_byte(
            [documents[i] for i in range(len(documents))], held_out.ids, tokenizer.vocab_size,
            n_bytes,
        ),
        'bits_per_byte': bits,
        'flops_per_byte': 2 * params.count_body(config.m2) / held_out.metrics['bytes_per_token'],
        'train_tokens': float(run.steps * run.batch_size * run.length),
        'train_megabytes': run.steps * run.batch_size * run.length
        * held_out.metrics['bytes_per_token'] / 1e6,
        'train_seconds': fitted.seconds,
    }  # fmt: skip
    by_bit = []
    if name in _BIT_ROWS:
        few = language_model.evaluation(
            held_out.ids, tokenizer.vocab_size, mesh.shape['data'] * _BIT_ROWS_PER_DEVICE,
            run.length,
        )  # fmt: skip
        by_bit = accuracy_by_bit(fitted, few, mesh)
    bundle.save(
        out / 'bundles' / name,
        fitted.config,
        fitted.params,
        tokenizer,
        tokenizer.vocab_size,
        metrics,
    )
    file.parent.mkdir(exist_ok=True)
    report.write_json_atomic(file, {'metrics': metrics, 'accuracy_by_bit': by_bit})
    return metrics, by_bit


def accuracy_by_bit(fitted: Fitted, batches, mesh: Mesh) -> list[float]:
    """Returns the accuracy of M2's prediction of each of a window's 16 bits.

    With 8-bit tokens, a window is two tokens; the first is at an even position of its document.
    """
    bits = 16 if fitted.config.vocab_size > 1 << 16 else 8

    @jax.jit
    def step(params, batch):
        losses = language_model.bit_losses(params, fitted.config, batch, bits)
        return losses[1], batch['weights'].sum()

    per_window = 16 // bits
    right, tokens = np.zeros((per_window, bits)), np.zeros(per_window)
    for _, batch in zip(range(_BIT_BATCHES), batches, strict=False):
        for part in range(per_window):
            weights = batch['weights'] * (batch['positions'] % per_window == part)
            here = train.put({**batch, 'weights': weights.astype(np.float32)}, mesh)
            right_here, tokens_here = step(fitted.params, here)
            right[part] += processes.whole(right_here)
            tokens[part] += float(tokens_here)
    return (right / tokens[:, None]).reshape(-1).tolist()


def show(
    rows: dict[str, dict[str, float]], paper_rule: float, ngram_bits: float, out: epath.Path
) -> None:
    """Prints the table and the findings, and saves both as Markdown."""
    title = 'Bits per byte over neurally compressed text'
    table_rows = results.table_rows(rows)
    notes = [
        *results.FOOTNOTES,
        f"windows decoded correctly under the paper's literal closing rule: {paper_rule:.1%}",
        f'for comparison: the n-gram alone, over whole documents: {ngram_bits:.3f} bits per byte',
        *results.claims(rows),
    ]
    report.table(table_rows, results.COLUMNS, title, notes)
    lines = [report.markdown_table(table_rows, results.COLUMNS), *(f'- {note}' for note in notes)]
    report.write_text_atomic(out / 'table.md', '\n'.join(lines) + '\n')
