"""Training batches of which each has a tokenizer of its own, as a random-access grain pipeline.

Batch s is a function of s alone: its tokenizer is drawn from the texts of batches s-15 to s (the
first ones take from the last), its noise from the seed and s. So an iterator resumes exactly, and
worker processes make batches ahead. Rows hold one text each, cut where the row ends.
"""

import functools
from typing import NamedTuple

import grain
import numpy as np

from lm.data.documents import Documents, allow_workers
from lm.data.packing import Batch, Shared
from tokenization.transfer import substrings
from tokenization.transfer.decompose import PieceTokenizer, decompose
from tokenization.transfer.sampled import SampledTokenizer, sample

# Batches whose texts a tokenizer is drawn from.
QUEUE = 16
# What random numbers are for.
_CUT, _NOISE = 1, 2
# Bytes that go on within a character of UTF-8.
_WITHIN = {bytes([byte]) for byte in range(0x80, 0xC0)}


class Settings(NamedTuple):
    """What the batches are.

    Attributes:
      batch_size: rows of this process, B.
      length: tokens of a row, L.
      text_bytes: bytes of a row's text, give or take 3; about 6 per token leave few rows short.
      vocab_size: V, of every tokenizer.
      pieces: P, most source tokens that a token is taken apart into.
      steps: number of batches.
      seed: of the order of the documents, the cuts and the tokenizers; in [0, 2**32).
      shard_index, shard_count: which part of each batch's texts this process has; the tokenizer
        is drawn from all, and the same for all.
    """

    batch_size: int
    length: int
    text_bytes: int
    vocab_size: int
    pieces: int
    steps: int
    seed: int
    shard_index: int = 0
    shard_count: int = 1


def sampled_batches(
    documents: Documents, source: PieceTokenizer, settings: Settings, workers: int = 0
) -> grain.IterDataset:
    """Returns the batches of training with random tokenizers.

    A batch holds what those of `lm.data.documents.training_batches` hold (tokens, targets,
    segments, positions and weights, all `[B, L]`), with ids of its own tokenizer and V as BOS; and
    `pieces`, int32 `[V + 1, P]`: the tokens of that vocabulary in ids of the source, see
    `tokenization.transfer.decompose`, the row of BOS all -1. Those are `Shared`: of all rows and
    processes.

    Args:
      documents: random-access documents of bytes; picklable if `workers` > 0. A long one gives a
        stretch of it, another one in each epoch.
      source: the tokenizer of the model that is transferred.
      settings: sizes and seed.
      workers: processes that make batches ahead; 0 does it on a thread. The batches do not
        depend on it, but the iterator's state does. `close()` the iterator to end them.

    Raises:
      ValueError: here, for sizes that cannot work; while iterating, where texts have too few
        substrings for a vocabulary.
    """
    batches = grain.MapDataset.source(SampledBatches(documents, source, settings))
    if not workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return batches.to_iter_dataset(options)
    allow_workers()
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return batches.to_iter_dataset(options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    )


class SampledBatches:
    """The random-access source of `sampled_batches`."""

    def __init__(self, documents: Documents, source: PieceTokenizer, settings: Settings):
        """Checks the sizes; raises ValueError, naming the one that cannot work."""
        for name in ('batch_size', 'text_bytes', 'pieces', 'steps'):
            if getattr(settings, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(settings, name)}')
        if settings.length < 2 or settings.vocab_size < 256:
            raise ValueError(
                f'expected rows of at least 2 tokens and a vocabulary of at least 256, got '
                f'{settings.length} and {settings.vocab_size}'
            )
        if not 0 <= settings.shard_index < settings.shard_count:
            raise ValueError(f'shard {settings.shard_index} of {settings.shard_count}')
        if not len(documents):
            raise ValueError('no documents to train on')
        self._documents, self._source, self._settings = documents, source, settings
        self._order = grain.MapDataset.range(len(documents)).shuffle(settings.seed).repeat()
        self._remember()

    def _remember(self) -> None:
        # Neighbouring steps share most of their queue.
        self._counts = functools.lru_cache(maxsize=2 * QUEUE)(self._count)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != '_counts'}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._remember()

    def __len__(self) -> int:
        return self._settings.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray | Shared]:
        """Returns batch `step`."""
        settings = self._settings
        tokenizer = self.tokenizer(step)
        first = settings.shard_index * settings.batch_size
        texts = self.texts(step)[first : first + settings.batch_size]
        pieces_VP = decompose(self._source, [*tokenizer.tokens, b''], settings.pieces)
        ids = tokenizer.encode_batch(texts)
        return {**_rows(ids, settings.length, settings.vocab_size), 'pieces': Shared(pieces_VP)}

    def tokenizer(self, step: int) -> SampledTokenizer:
        """Returns the tokenizer of batch `step`."""
        queue = [self._counts((step - k) % len(self)) for k in range(min(QUEUE, len(self)))]
        key = (self._settings.seed, _NOISE, step)
        try:
            return sample(substrings.add(queue), self._settings.vocab_size, key)
        except ValueError as error:
            raise ValueError(f'batch {step}: {error}') from None

    def texts(self, step: int) -> list[bytes]:
        """Returns the texts of batch `step`, those of all shards."""
        size = self._settings.batch_size * self._settings.shard_count
        return [self._text(index) for index in range(step * size, (step + 1) * size)]

    def _text(self, index: int) -> bytes:
        """Returns one stretch of a document, which begins and ends with a character."""
        document = bytes(self._documents[int(self._order[index])])
        room = len(document) - self._settings.text_bytes
        if room <= 0:
            return document
        rng = np.random.default_rng((self._settings.seed, _CUT, index))
        start = int(rng.integers(room + 1))
        first, last = (_character(document, at) for at in (start, start + len(document) - room))
        return document[first:last]

    def _count(self, step: int) -> substrings.Counts:
        return substrings.count(self.texts(step))


def _character(document: bytes, at: int) -> int:
    """Returns where the next character of UTF-8 begins, at most 3 bytes on."""
    return next((i for i in range(at, at + 3) if document[i : i + 1] not in _WITHIN), at + 3)


def _rows(documents: list[np.ndarray], length: int, bos: int) -> Batch:
    """Returns one row per document: BOS and its ids, without the last, to predict its ids."""
    size_B1 = np.array([[min(len(ids), length)] for ids in documents])
    columns_L = np.arange(length, dtype=np.int32)
    real_BL = columns_L < size_B1
    targets_BL = np.zeros(real_BL.shape, np.int32)
    targets_BL[real_BL] = np.concatenate([ids[:length] for ids in documents])
    before_BL = np.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=bos)
    return {
        'tokens': before_BL * real_BL,
        'targets': targets_BL,
        'segments': real_BL.astype(np.int32),
        'positions': columns_L * real_BL,
        'weights': real_BL.astype(np.float32),
    }
