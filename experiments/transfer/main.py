"""Trains a model and a hypernetwork, transfers the model to all targets, and evaluates it."""

import functools
from typing import Any, NamedTuple

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
from lm.checkpoints import bundle
from lm.model.config import Config as ModelConfig
from tokenization.tokenizer import Tokenizer
from tokenization.transfer import transfer
from tokenization.transfer.transfer import Method, SourceModel

# methods also evaluated after continued training: the hypernetwork, and its initialisation
TRAINED_ON = (HYPERNETWORK, 'mean_of_pieces')


def main(config: Config, out: epath.Path, mesh: Mesh) -> dict[str, float]:
    """Runs the whole comparison, resuming from `out`; returns flat metrics."""
    if config.bundle is None:
        _check(config, config.model, mesh)  # before anything is trained
    corpus = corpora.open_corpus(config.data)
    resume.claim_corpus(out, corpus)
    source = open_source(config, corpus, out, mesh)
    _check(config, source.config, mesh)
    found = targets.build(config, corpus, out)
    network = hyper.open_network(config, source, corpus, out, mesh)
    texts = corpora.first_bytes(corpus.test, config.valid_bytes)
    rows = _rows(_Setting(config, source, corpus, texts, out, mesh), found, network)
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
        | {'train_seconds/hypernetwork': network.seconds}
    )
    results.plot(out, rows, shorter)
    Console().print(f'plots, bundles and result.json: {out}')
    return metrics


def _check(config: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError unless all training runs fit the model and the devices."""
    trained = ['continued']
    if config.hypernetwork_bundle is None:
        language_model.check_rows(config.identity, mesh, 'identity')  # single ids, without a length
        trained.append('transfer')
    if config.bundle is None or config.oracle:
        trained.append('train')
    for name in trained:
        language_model.check(model, getattr(config, name), mesh, name)


class _Setting(NamedTuple):
    """Arguments shared by all measurements."""

    config: Config
    source: SourceModel
    corpus: Corpus
    texts: list[bytes]
    out: epath.Path
    mesh: Mesh


def _rows(
    setting: _Setting, found: dict[Target, Tokenizer], network: Trained
) -> list[dict[str, Any]]:
    """Returns the row of the source, and one per target, method and number of steps."""
    config, source, train = setting.config, setting.source, setting.corpus.train
    parts = {'source': lambda: _row(setting, 'source', 'own', 0, measure.unmoved(source))}
    for target, tokenizer in found.items():
        made = measure.methods(tokenizer, corpora.first_bytes(train, measure.CONTEXT_BYTES))
        made[HYPERNETWORK] = transfer.predicted(network.weights, network.config)
        for name, method in made.items():
            for shots in config.shots if name in TRAINED_ON else (0,):
                parts[f'{target}_{name}_{shots}'] = functools.partial(
                    _measured, setting, name, method, target, tokenizer, shots
                )
        if target in config.oracle:
            parts[f'{target}_{ORACLE}'] = functools.partial(
                _from_scratch, setting, target, tokenizer
            )
    folder = setting.out / 'parts'
    return [resume.part_once(folder / f'{file}.json', part) for file, part in parts.items()]


def _from_scratch(setting: _Setting, target: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the row of a model of the source's shape, trained from scratch with the target."""
    folder = setting.out / ORACLE / target
    documents = resume.encoded_once(tokenizer, setting.corpus.train, folder / 'encoded', 'encoding')
    v = tokenizer.vocab_size
    fitted = language_model.fit(
        setting.source.config, setting.config.train, documents, v, folder, setting.mesh,
        f'{target}, from scratch',
    )  # fmt: skip
    return _row(setting, ORACLE, target, 0, Moved(fitted, tokenizer, v, fitted.seconds))


def _measured(
    setting: _Setting, name: str, method: Method, target: str, tokenizer: Tokenizer, shots: int
) -> dict[str, Any]:
    """Returns the row of one target, method and number of steps; saves hypernetwork models."""
    config, out, mesh = setting.config, setting.out, setting.mesh
    moved = measure.move(setting.source, tokenizer, method, mesh)
    if shots:
        train = corpora.first_bytes(setting.corpus.train, measure.SHOT_BYTES)
        moved = measure.train_on(
            moved, config, shots, tokenizer.encode_batch(train),
            out / 'shots' / f'{target}_{name}_{shots}', mesh,
            f'{target}, {name.replace("_", " ")}',
        )  # fmt: skip
    row = _row(setting, name, target, shots, moved)
    if name == HYPERNETWORK:
        bundle.save(
            out / 'bundles' / f'{target}_{shots}', moved.fitted.config, moved.fitted.params,
            tokenizer, tokenizer.vocab_size, {'bits_per_byte': row['bits_per_byte']},
        )  # fmt: skip
    return row


def _row(setting: _Setting, name: str, target: str, shots: int, moved: Moved) -> dict[str, Any]:
    texts = setting.texts
    ids = sum(map(len, moved.tokenizer.encode_batch(texts)))
    return {
        'method': name, 'target': target, 'shots': shots, 'seconds': moved.seconds,
        'bits_per_byte': measure.bits_per_byte(moved, setting.config, texts, setting.mesh),
        'bytes_per_token': sum(map(len, texts)) / ids, 'vocab_size': moved.tokenizer.vocab_size,
    }  # fmt: skip
