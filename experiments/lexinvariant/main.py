"""Trains the models and evaluates them on text, ciphers and reasoning tasks."""

import functools
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from experiments import language_model, report, resume
from experiments.language_model import Fitted
from experiments.lexinvariant import (
    classical,
    counting,
    decipher,
    domains,
    drawing,
    models,
    results,
    tasks,
)
from experiments.lexinvariant.config import Config
from experiments.lexinvariant.models import CHARACTERS, Name, Text
from lm.training.metrics import ProgressLine


def main(config: Config, out: epath.Path, mesh: Mesh) -> dict[str, float]:
    """Runs the whole comparison, resuming from `out`; returns flat metrics."""
    begin = time.monotonic()
    language_model.check(config.model, config.train, mesh, 'train')
    found = domains.open_domains(config)
    for domain, corpus in found.items():
        (out / domain).mkdir(parents=True, exist_ok=True)
        resume.claim_corpus(out / domain, corpus)
    names, parts = models.wanted(config), out / 'parts'
    texts = models.texts(config, found, names, out)
    fitted = {
        name: models.fit(config, name, texts[name.tokenizer, name.domain], out, mesh)
        for name in names
    }
    curves: dict[Name, dict[str, list[float]]] = {}
    for name in names:
        if name.probability in results.KINDS:
            text = texts[name.tokenizer, name.domain]
            curve = functools.partial(_curve, fitted[name], text, config, mesh)
            curves[name] = resume.part_once(parts / f'positions_{name.folder}.json', curve)
    pieces_RL = texts[CHARACTERS, 'prose'].test_RL
    distinct = round(np.mean([len(np.unique(piece_L)) for piece_L in pieces_RL]))
    metrics = results.positions(config, curves, distinct)
    rows = _ciphers(config, fitted, texts[CHARACTERS, 'prose'], out, mesh)
    metrics |= results.ciphers(config, rows)
    mixed = []
    for name in sorted(names, key=lambda name: name.probability):
        if (name.tokenizer, name.domain) == (CHARACTERS, 'prose'):
            row = functools.partial(_regularised, config, fitted[name], texts, mesh)
            found_here = resume.part_once(parts / f'tasks_{name.folder}.json', row)
            mixed.append({'p': name.probability, **found_here})
    metrics |= results.tasks(mixed, {n: task.chance for n, task in tasks.make(config).items()})
    results.plot(out, config, curves, rows)
    Console().print(f'plots, bundles and result.json: {out}')
    return {**metrics, report.key('seconds', 'this_process'): time.monotonic() - begin}


def _curve(fitted: Fitted, text: Text, config: Config, mesh: Mesh) -> dict[str, list[float]]:
    nats_L = models.nats_by_position(fitted, text, config.train.batch_size, mesh)
    counts_L = counting.nats(text.test_RL, fitted.config.vocab_size)
    return {
        'nats': nats_L.tolist(), 'counts': counts_L.tolist(),
        'bytes': models.bytes_by_position(text).tolist(),
    }  # fmt: skip


def _ciphers(
    config: Config, fitted: dict[Name, Fitted], text: Text, out: epath.Path, mesh: Mesh
) -> list[dict[str, Any]]:
    """Returns one row per model and context, the classical attack last; draws one text."""

    def read() -> list[dict[str, Any]]:
        with jax.set_mesh(mesh):
            readings = {
                kind: decipher.read(config, fitted[Name(CHARACTERS, 'prose', p)], text, kind)
                for p, kind in results.KINDS.items()
            }
        drawing.draw(out / 'deciphering.png', readings, row=0)
        rows = []
        for kind, reading in readings.items():
            for n in config.contexts:
                keys = decipher.recovered_keys(reading, n)
                accuracy = decipher.accuracy(reading, n)
                rows.append(_row(kind, n, accuracy, keys, reading))
        return rows + _classical(config, readings['lexinvariant'], text)

    return resume.part_once(out / 'parts' / 'ciphers.json', read)


def _row(model: str, context: int, accuracy: float | None, keys, reading) -> dict[str, Any]:
    recovered, whole = decipher.key_recovery(keys, reading, context)
    return {
        'model': model, 'context': context, 'accuracy': accuracy,
        'text': decipher.text_accuracy(keys, reading, context), 'key': recovered, 'whole': whole,
    }  # fmt: skip


def _classical(config: Config, reading: decipher.Reading, text: Text) -> list[dict[str, Any]]:
    single_V, bigram_VV = classical.statistics(text.train, text.tokenizer.vocab_size)
    rows = []
    with ProgressLine('classical attack', len(config.contexts)) as progress:
        for i, n in enumerate(config.contexts):
            keys = [
                classical.attack(cipher_L[:n], single_V, bigram_VV, config.climbs, seed)
                for seed, cipher_L in enumerate(reading.cipher_RL)
            ]
            rows.append(_row('classical', n, None, keys, reading))
            progress.update(i + 1)
    return rows


def _regularised(
    config: Config, fitted: Fitted, texts: dict[tuple[str, str], Text], mesh: Mesh
) -> dict[str, float]:
    """Returns each mixed model's bits per byte on both domains, and its task accuracies."""
    rested = models.at_rest(fitted)
    found = {}
    for domain in domains.DOMAINS:
        text = texts[CHARACTERS, domain]
        nats_L = models.nats_by_position(rested, text, config.train.batch_size, mesh)
        found[domain] = float(nats_L.mean() / np.log(2))
    with jax.set_mesh(mesh):
        for name, task in tasks.make(config).items():
            found[name] = tasks.accuracy(rested, task)
    return found
