"""The models of the comparison: n-gram, M1 and one M2 per representation."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments import language_model
from experiments.equal_info.config import Config
from experiments.language_model import Fitted
from lm.checkpoints import bundle
from lm.data.documents import Documents
from lm.devices import processes
from lm.losses import next_token as losses
from lm.model import params
from lm.training.train import TrainConfig
from tokenization.coding import neural, ngram
from tokenization.coding.next_byte import NextByteModel
from tokenization.coding.ngram import NGram
from tokenization.vocabularies.byte import ByteTokenizer

BYTES = 256


class FirstModels(NamedTuple):
    """The candidate models for the codec.

    Attributes:
      ngram: the byte n-gram.
      candidates: the n-gram and M1 as next-byte models, `ngram` and `m1`.
      bits: each candidate's bits per byte of validation text, with a reset every `window_bytes`.
    """

    ngram: NGram
    candidates: dict[str, NextByteModel]
    bits: dict[str, float]


def first_models(
    config: Config,
    train: Sequence[bytes],
    valid: Sequence[bytes],
    out: epath.Path,
    mesh: Mesh,
) -> FirstModels:
    """Counts the n-gram and trains M1; evaluates both with window resets, and saves both."""
    counted = ngram.count(train, config.ngram_order)
    if processes.is_first():
        counted.save(out / 'ngram')
    size = config.window_bytes
    # One piece per row, each after BOS: the state of M1 after a window's reset.
    full = [piece for piece in pieces(train, size) if len(piece) == size]
    m1 = language_model.fit(
        config.m1, config.m1_train, full, BYTES, out / 'm1', mesh, 'M1 over bytes'
    )
    batches = padded_batches(pieces(valid, size), size, config.m1_train.batch_size)
    n_bytes = sum(map(len, valid))
    log2 = sum(float(counted.log2_probabilities(text, size).sum()) for text in valid)
    bits = {
        'ngram': -log2 / n_bytes,
        'm1': losses.bits_per_byte(language_model.nats(m1, batches, mesh), n_bytes),
    }
    metrics = {'bits_per_byte_reset': bits['m1']}
    bundle.save(out / 'bundles' / 'm1', m1.config, m1.params, ByteTokenizer(), BYTES, metrics)
    # Each process codes with a full copy on one device: on a mesh, the order of float sums, and so
    # the codes, would depend on its shape.
    whole = jax.tree.map(processes.whole, m1.params)
    candidates = {
        'ngram': counted.model(),
        'm1': neural.model(jax.device_put(whole, jax.local_devices()[0]), m1.config, size),
    }
    return FirstModels(counted, candidates, bits)


def pieces(documents: Sequence[bytes], size: int) -> list[np.ndarray]:
    """Cuts documents into arrays of `size` bytes; the last piece of a document may be shorter."""
    return [
        np.frombuffer(document[i : i + size], np.uint8).astype(np.int32)
        for document in documents
        for i in range(0, len(document), size)
    ]


def padded_batches(
    rows: Sequence[np.ndarray], length: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches with one byte string per row, each after BOS; padding has weight 0.

    In a multi-process run, each process gets its own rows of a batch.
    """
    for i in range(0, len(rows), batch_size):
        targets = np.zeros((batch_size, length), np.int32)
        weights = np.zeros((batch_size, length), np.float32)
        for row, piece in enumerate(rows[i : i + batch_size]):
            targets[row, : len(piece)], weights[row, : len(piece)] = piece, 1
        tokens = np.concatenate([np.full((batch_size, 1), BYTES), targets[:, :-1]], axis=1)
        yield language_model.own_rows({
            'tokens': tokens.astype(np.int32),
            'targets': targets,
            'weights': weights,
            'segments': np.ones_like(targets),
            'positions': np.broadcast_to(np.arange(length, dtype=np.int32), targets.shape),
        })  # fmt: skip


def second_model(
    config: Config, documents: Documents, vocab_size: int, out: epath.Path, mesh: Mesh, name: str
) -> Fitted:
    """Trains the M2 of one representation."""
    run = same_compute(config, vocab_size)
    return language_model.fit(config.m2, run, documents, vocab_size, out, mesh, f'M2 over {name}')


def same_compute(config: Config, vocab_size: int) -> TrainConfig:
    """Returns a training config over `vocab_size` ids with the compute of `m2_train` over bytes."""
    run = config.m2_train
    flops = [
        params.flops_per_token(language_model.with_vocabulary(config.m2, size), run.length)
        for size in (BYTES, vocab_size)
    ]
    steps = max(round(run.steps * flops[0] / flops[1]), 1)
    warmup = min(run.optimizer.warmup_steps, steps // 5)
    return dataclasses.replace(
        run,
        steps=steps,
        log_every=max(min(run.log_every, steps // 10), 1),
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=warmup),
    )
