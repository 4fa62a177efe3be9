"""Dynamic tokenization: bits per byte against the reduction of sequence length.

The tokens of each batch are merged into its own units (`tokenization.transfer.dynamic`). The
hypernetwork predicts their rows, which are appended to both token tables of the source. The cost of
naming a batch's units is reported separately: each merge names two earlier units.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import language_model
from experiments.transfer.config import Config
from experiments.transfer.hyper import Trained
from lm.losses import cross_entropy
from lm.losses import next_token as losses
from lm.model import tables as tables_lib
from lm.model.config import Config as ModelConfig
from lm.model.leaves import Params
from lm.training import train
from tokenization.transfer import dynamic, hypernetwork, row_cache, transfer
from tokenization.transfer.dynamic import Merged
from tokenization.transfer.transfer import SourceModel
from tokenization.vocabularies import boundaries

# Batches that determine the number of merges for a fraction of the maximal reduction.
_SAMPLES = 4


def measure(
    config: Config, source: SourceModel, network: Trained, documents: Sequence[np.ndarray],
    samples: Sequence[np.ndarray], mesh: Mesh,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns a row for each of `config.reductions`, preceded by 0.

    Args:
      documents: held-out documents, in ids of the source.
      samples: other documents, which determine the numbers of merges.
    """
    size, length = config.continued.batch_size, config.continued.length
    tokens = transfer.token_table(source.tokenizer)
    rule = boundaries.BoundaryRule('word', tokens)
    pieces = network.config.pieces
    curves = [
        dynamic.merge(batch, tokens, None, rule, pieces).lengths
        for batch in _batches(samples, size, length)[:_SAMPLES]
    ]
    batches = _batches(documents, size, length)
    n_bytes = sum(len(tokens[i]) for batch in batches for ids_T in batch for i in ids_T)
    reader = _Reader(source, network, size * length, mesh)
    found = []
    for share in (0.0, *config.reductions):
        merges = dynamic.merges_for(curves, share)
        merged = [dynamic.merge(batch, tokens, merges, rule, pieces) for batch in batches]
        known, asked = reader.slots.found, reader.slots.found + reader.slots.missed
        nats = sum(reader.nats(some, size, length) for some in merged)
        known, asked = reader.slots.found - known, reader.slots.found + reader.slots.missed - asked
        before, after = (sum(int(some.lengths[at]) for some in merged) for at in (0, -1))
        names = sum(_name_bits(some, source.tokenizer.vocab_size) for some in merged)
        found.append({
            'share': share, 'merges': merges, 'reduction': 1 - after / before,
            'bits_per_byte': losses.bits_per_byte(nats, n_bytes), 'names': names / n_bytes,
            'found': known / asked if asked else None,
        })  # fmt: skip
    return found


def _batches(documents: Sequence[np.ndarray], size: int, length: int) -> list[list[np.ndarray]]:
    rows = [ids[i : i + length] for ids in documents for i in range(0, len(ids), length)]
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _name_bits(merged: Merged, vocab_size: int) -> float:
    """Returns the bits to encode a list of merges, each of two units that exist by then."""
    return sum(2 * math.log2(vocab_size + i) for i in range(len(merged.lengths) - 1))


class _Reader:
    """The model over its own rows, followed by those of a batch's units, which are cached.

    Params are arguments of the compiled functions, since they are too large for constants.
    """

    def __init__(self, source: SourceModel, network: Trained, capacity: int, mesh: Mesh):
        self._source, self._network, self._mesh, self._capacity = source, network, mesh, capacity
        predict = jax.jit(hypernetwork.predict, static_argnums=1)
        read = jax.jit(hypernetwork.read, static_argnums=1)
        known = network.weights, network.config, source.params['tables']
        read_VD = read(*known)
        self._rows = lambda pieces_UP: predict(*known, pieces_UP, read_VD)
        self.slots = row_cache.Slots(capacity)
        self._cache = row_cache.init(self._rows, capacity, network.config.pieces)
        self._loss = jax.jit(functools.partial(_sum, source.config))

    def nats(self, merged: Merged, size: int, length: int) -> float:
        """Returns the summed loss of a batch; units of a single source id keep that id."""
        v = self._source.config.vocab_size
        units = [unit for unit in merged.units if len(unit) > 1]
        self._cache, slots = row_cache.fetch(
            self._rows, self._cache, self.slots, units, self._network.config.chunk,
            self._network.config.pieces,
        )  # fmt: skip
        place = {unit: v + i for i, unit in enumerate(units)}
        id_U = np.array([place.get(unit, unit[0]) for unit in merged.units])
        slot_U = np.pad(slots, (0, self._capacity - len(slots)))
        rows = [id_U[document] for document in merged.documents]
        packed = _packed(rows, size, length, self._source.bos)
        batch = train.put(language_model.own_rows(packed), self._mesh)
        return float(self._loss(self._source.params, self._cache.tables, slot_U, len(units), batch))


def _sum(config: ModelConfig, weights: Params, tables: Params, slot_U, count, batch) -> jax.Array:
    """Returns a batch's loss over the model's own rows and `count` units, cached at `slot_U`."""
    joined = {
        name: jnp.concatenate([own_VD.astype(jnp.float32), tables[name][slot_U]])
        for name, own_VD in weights['tables'].items()
    }
    h_BLD = losses.hidden({**weights, 'tables': joined}, config, batch)
    logprob_BL = cross_entropy.logprobs(
        h_BLD, tables_lib.output_table(joined), batch['targets'], config.logit_softcap,
        rows=config.vocab_size + count,
    )  # fmt: skip
    return -(logprob_BL * batch['weights']).sum()


def _packed(rows: Sequence[np.ndarray], size: int, length: int, bos: int) -> dict[str, np.ndarray]:
    """Returns a batch of one text per row, each after BOS; padding has weight 0."""
    targets_BL = np.zeros((size, length), np.int32)
    length_B = np.pad([len(row) for row in rows], (0, size - len(rows)))
    real_BL = np.arange(length) < length_B[:, None]
    targets_BL[real_BL] = np.concatenate(rows)
    tokens_BL = np.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=bos)
    return {
        'tokens': tokens_BL, 'targets': targets_BL, 'weights': real_BL.astype(np.float32),
        'segments': real_BL.astype(np.int32),
        'positions': np.broadcast_to(np.arange(length, dtype=np.int32), targets_BL.shape),
    }  # fmt: skip
