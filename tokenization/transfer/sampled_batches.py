"""Training batches with one random tokenizer each, as a random-access grain pipeline.

Batch s is a function of s and the seed: its tokenizer is drawn from the texts of batches s-15 to s
(modulo the number of batches), with noise from the seed and s. So an iterator resumes exactly, and
worker processes can prefetch batches. A row holds one text, truncated to the row's length.
"""

import functools
from typing import NamedTuple

import grain
import numpy as np

from lm.data.batches import allow_workers
from lm.data.documents import Documents
from lm.data.packing import Batch, Shared
from tokenization.transfer import substrings
from tokenization.transfer.decompose import PieceTokenizer, decompose
from tokenization.transfer.sampled import SampledTokenizer, sample

# Number of batches whose texts a tokenizer is drawn from.
QUEUE = 16
# Random streams.
_CUT, _NOISE = 1, 2
# Continuation bytes of UTF-8.
_WITHIN = {bytes([byte]) for byte in range(0x80, 0xC0)}


class Settings(NamedTuple):
    """The sizes and the seed of the batches.

    Attributes:
      batch_size: rows of this process, B.
      length: tokens of a row, L.
      text_bytes: bytes of a row's text, up to 3 more or fewer; with 6 per token few rows are short.
      vocab_size: V, the size of every tokenizer.
      pieces: P, the greatest number of source tokens that a token is decomposed into.
      steps: number of batches.
      seed: for the order of the documents, the cuts and the tokenizers; in [0, 2**32).
      shard_index, shard_count: this process's part of each batch's texts. The tokenizer is drawn
        from all texts, and is the same in all processes.
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

    A batch has the arrays of `lm.data.batches.training_batches` (tokens, targets, segments,
    positions and weights, all `[B, L]`), with ids of its own tokenizer and V as BOS. In addition,
    `pieces`, int32 `[V + 1, P]`, decomposes the tokens of that vocabulary into ids of the source
    (see `tokenization.transfer.decompose`); the row of BOS is all -1. It is `Shared` by all rows
    and processes.

    Args:
      documents: random-access documents of bytes; picklable if `workers` > 0. From a long one, a
        different substring is taken in each epoch.
      source: the tokenizer of the model that is transferred.
      settings: sizes and seed.
      workers: number of processes that prefetch batches; 0 uses a thread. The iterator's state
        depends on it, the batches do not. `close()` the iterator to end the processes.

    Raises:
      ValueError: a size is out of range; or, while iterating, the texts have too few substrings
        for a vocabulary.
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
        """Checks the sizes; raises ValueError, naming the one that is out of range."""
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
        """Returns the texts of batch `step`, for all shards."""
        size = self._settings.batch_size * self._settings.shard_count
        return [self._text(index) for index in range(step * size, (step + 1) * size)]

    def _text(self, index: int) -> bytes:
        """Returns a substring of a document, cut at boundaries of characters."""
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
    """Returns the position at or after `at` at which a UTF-8 character begins, at most 3 later."""
    return next((i for i in range(at, at + 3) if document[i : i + 1] not in _WITHIN), at + 3)


def _rows(documents: list[np.ndarray], length: int, bos: int) -> Batch:
    """Returns one row per document: BOS and all ids but the last predict the ids."""
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
