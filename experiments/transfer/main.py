"""Trains a model and a hypernetwork, moves the model to every target, and measures."""

import functools
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from experiments import corpora, language_model, resume
from experiments.corpora import Corpus
from experiments.transfer import dynamic, hyper, measure, results, targets, variant
from experiments.transfer.config import Config, Target
from experiments.transfer.hyper import Trained
from experiments.transfer.measure import Moved
from experiments.transfer.results import HYPERNETWORK, ORACLE
from experiments.transfer.source import open_source
from lm import bundle
from lm import mesh as mesh_lib
from lm.config import Config as ModelConfig
from tokenization import transfer
from tokenization.tokenizer import Tokenizer
from tokenization.transfer import Method, Source

# trained on after the transfer, too: ours, and what the hypernetwork starts from
TRAINED_ON = (HYPERNETWORK, 'mean_of_pieces')


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Runs the whole comparison, or what is left of it in `out`; returns flat metrics."""
    mesh = mesh_lib.make(config.mesh)
    if config.bundle is None:
        _check(config, config.model, mesh)  # before anything is trained
    corpus = corpora.open_corpus(config.data)
    resume.claim_corpus(out, corpus)
    source = open_source(config, corpus, out, mesh)
    _check(config, source.config, mesh)
    found = targets.build(config, corpus, out)
    network = hyper.fit(config, source, corpus, out / 'hypernetwork', mesh)
    # of the process that trained it, not of one that found it trained
    seconds = resume.part_once(out / 'parts' / 'hypernetwork.json', lambda: network.seconds)
    texts = corpora.first_bytes(corpus.test, config.valid_bytes)
    rows = _rows(config, source, found, network, corpus, texts, out, mesh)
    ids, samples = (
        [np.asarray(ids) for ids in source.tokenizer.encode_batch(some)]
        for some in (texts, corpora.first_bytes(corpus.valid, config.valid_bytes))
    )
    shorter = resume.part_once(
        out / 'parts' / 'dynamic.json',
        lambda: dynamic.measure(config, source, network, ids, samples, mesh),
    )
    tuned = resume.part_once(
        out / 'parts' / 'variants.json', lambda: variant.rows(config, source, found, out, mesh)
    )
    metrics = (
        results.table(rows)
        | results.dynamic(shorter)
        | results.variants(tuned)
        | {'train_seconds/hypernetwork': seconds}
    )
    results.plot(out, rows, shorter)
    Console().print(f'plots, bundles and result.json: {out}')
    return metrics


def _check(config: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError unless every training fits the model and the devices."""
    for name in ('train', 'identity', 'transfer', 'continued'):
        if name != 'train' or config.bundle is None or config.oracle:
            language_model.check(model, getattr(config, name), mesh, name)


def _rows(
    config: Config, source: Source, found: dict[Target, Tokenizer], network: Trained,
    corpus: Corpus, texts: list[bytes], out: epath.Path, mesh: Mesh,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns the row of the source, and one per target, method and number of shots."""
    parts = {
        'source': lambda: _row('source', 'own', 0, measure.unmoved(source), config, texts, mesh)
    }
    for target, tokenizer in found.items():
        made = measure.methods(
            tokenizer, corpora.first_bytes(corpus.train, measure.CONTEXT_BYTES)
        ) | {HYPERNETWORK: transfer.predicted(network.weights, network.config)}
        for name, method in made.items():
            for shots in config.shots if name in TRAINED_ON else (0,):
                parts[f'{target}_{name}_{shots}'] = functools.partial(
                    _measured, config, source, tokenizer, method, shots, corpus, texts, mesh,
                    name, target, out,
                )  # fmt: skip
        if target in config.oracle:
            parts[f'{target}_{ORACLE}'] = functools.partial(
                _from_scratch, config, source, tokenizer, corpus, texts, mesh, target, out
            )
    return [resume.part_once(out / 'parts' / f'{file}.json', part) for file, part in parts.items()]


def _from_scratch(
    config: Config, source: Source, tokenizer: Tokenizer, corpus: Corpus, texts: list[bytes],
    mesh: Mesh, target: str, out: epath.Path,
) -> dict[str, Any]:  # fmt: skip
    """Returns the row of a model of the source's shape that was trained with the target."""
    folder = out / ORACLE / target
    documents = resume.encoded_once(tokenizer, corpus.train, folder / 'encoded', 'encoding')
    v = tokenizer.vocab_size
    fitted = language_model.fit(
        source.config, config.train, documents, v, folder, mesh, f'{target}, from scratch'
    )
    moved = Moved(fitted, tokenizer, v, fitted.seconds)
    return _row(ORACLE, target, 0, moved, config, texts, mesh)


def _measured(
    config: Config, source: Source, tokenizer: Tokenizer, method: Method, shots: int,
    corpus: Corpus, texts: list[bytes], mesh: Mesh, name: str, target: str, out: epath.Path,
) -> dict[str, Any]:  # fmt: skip
    """Returns the row of one target, method and number of shots; saves the hypernetwork's model."""
    moved = measure.move(source, tokenizer, method, mesh)
    if shots:
        documents = tokenizer.encode_batch(corpora.first_bytes(corpus.train, measure.SHOT_BYTES))
        folder = out / 'shots' / f'{target}_{name}_{shots}'
        moved = measure.train_on(
            moved, config, shots, documents, folder, mesh, f'{target}, {name.replace("_", " ")}'
        )
    row = _row(name, target, shots, moved, config, texts, mesh)
    if name == HYPERNETWORK:
        bundle.save(
            out / 'bundles' / f'{target}_{shots}', moved.fitted.config, moved.fitted.params,
            tokenizer, tokenizer.vocab_size, {'bits_per_byte': row['bits_per_byte']},
        )  # fmt: skip
    return row


def _row(
    name: str, target: str, shots: int, moved: Moved, config: Config, texts: list[bytes], mesh: Mesh
) -> dict[str, Any]:
    ids = sum(map(len, moved.tokenizer.encode_batch(texts)))
    return {
        'method': name, 'target': target, 'shots': shots, 'seconds': moved.seconds,
        'bits_per_byte': measure.bits_per_byte(moved, config, texts, mesh),
        'bytes_per_token': sum(map(len, texts)) / ids, 'vocab_size': moved.tokenizer.vocab_size,
    }  # fmt: skip
