"""The models of the comparison: n-gram, M1 and one M2 per representation."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments import language_model
from experiments.equal_info.config import Config
from experiments.language_model import Fitted
from lm import bundle, losses, params
from lm.data import Documents
from lm.train import TrainConfig
from tokenization import neural, ngram
from tokenization.byte import ByteTokenizer
from tokenization.next_byte import NextByteModel

BYTES = 256


class FirstModels(NamedTuple):
    """The candidates for the codec's model.

    Attributes:
      ngram: the byte n-gram.
      m1: the byte transformer.
      ngram_bits, m1_bits: bits per byte of each on held-out text, reset every `window_bytes`.
      ngram_bits_whole: of the n-gram over whole documents.
    """

    ngram: ngram.NGram
    m1: Fitted
    ngram_bits: float
    m1_bits: float
    ngram_bits_whole: float

    def next_byte(self, name: str, config: Config) -> NextByteModel:
        """Returns the model called `ngram` or `m1`."""
        if name == 'ngram':
            return self.ngram.model()
        return neural.model(self.m1.params, self.m1.config, config.window_bytes)


def first_models(
    config: Config,
    train: Sequence[bytes],
    valid: Sequence[bytes],
    out: epath.Path,
    mesh: Mesh,
) -> FirstModels:
    """Counts the n-gram, trains M1, measures both as a codec uses them, and saves both.

    M1 reads pieces of `window_bytes` bytes, each after BOS: the state in which a window's reset
    leaves it.
    """
    counted = ngram.count(train, config.ngram_order)
    counted.save(out / 'ngram')
    size = config.window_bytes
    m1 = language_model.fit(
        config.m1, config.m1_train, pieces(train, size), BYTES, out / 'm1', mesh, 'M1 over bytes'
    )
    held_out = language_model.evaluation(pieces(valid, size), BYTES, 32, config.m1_train.length)
    n_bytes = sum(map(len, valid))
    m1_bits = losses.bits_per_byte(language_model.nats(m1, held_out, mesh), n_bytes)
    bits = -sum(float(counted.log2_probabilities(text, size).sum()) for text in valid)
    metrics = {'bits_per_byte_reset': m1_bits}
    bundle.save(out / 'bundles' / 'm1', m1.config, m1.params, ByteTokenizer(), metrics)
    whole = counted.bits_per_byte(valid)
    return FirstModels(counted, m1, bits / n_bytes, m1_bits, whole)


def pieces(documents: Sequence[bytes], size: int) -> list[np.ndarray]:
    """Cuts documents into arrays of `size` bytes; the last one of each may be shorter."""
    return [
        np.frombuffer(document[i : i + size], np.uint8).astype(np.int32)
        for document in documents
        for i in range(0, len(document), size)
    ]


def second_model(
    config: Config, documents: Documents, vocab_size: int, out: epath.Path, mesh: Mesh, name: str
) -> Fitted:
    """Trains the M2 of one representation."""
    run = same_compute(config, vocab_size)
    return language_model.fit(config.m2, run, documents, vocab_size, out, mesh, f'M2 over {name}')


def same_compute(config: Config, vocab_size: int) -> TrainConfig:
    """Returns the run over `vocab_size` ids that costs what `m2_train` costs over bytes."""
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
