"""Random tokenizers, one per training step, so that a hypernetwork sees every kind.

Source: Minixhofer et al., Zero-Shot Tokenizer Transfer (NeurIPS 2024, arXiv:2405.07883), section
3.1 and algorithm 2. The substrings t of a queue of texts have probabilities p(t), their share of
the weights; with one sigma per tokenizer,

    sigma ~ LogNormal(ln 1e-5, 4),   score(t) = ln(p(t) + z),   z ~ N(0, sigma)

and the best of them, with all 256 bytes, are the pieces of a Unigram model. At sigma = 0 those are
the most common ones. Unlike the released code, this one gives runs of blanks no score of their
own: there it is 0, so that such tokens always won.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from tokenization.huggingface import engine as byte_engine
from tokenization.huggingface.conversion import Converted
from tokenization.tokenizer import check_ids
from tokenization.transfer.substrings import Counts
from tokenization.vocabularies import spelling

_LOG_SIGMA, _SPREAD = math.log(1e-5), 4.0
# Of substrings whose noisy probability is not positive: used where nothing else fits.
_NEVER = -1e5


@dataclasses.dataclass(frozen=True, eq=False)
class SampledTokenizer:
    """A Unigram model over bytes, lossless for any bytes.

    Attributes:
      tokens: the bytes of each id, all distinct; the best score first.
      scores_V: log-probabilities, float64.
    """

    tokens: tuple[bytes, ...]
    scores_V: np.ndarray

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`: the best segmentation of each word."""
        return self.encode_batch([data])[0]

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each document, encoded on all cores."""
        return byte_engine.encode(self._converted, documents)

    def encode_piece(self, data: bytes) -> list[int]:
        """Returns the ids of `data` taken as one word."""
        return byte_engine.encode_piece(self._converted, data)

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        return b''.join([self.tokens[i] for i in check_ids(ids, len(self.tokens)).tolist()])

    @functools.cached_property
    def _converted(self) -> Converted:
        letters = spelling.to_letters(b''.join(self.tokens))
        ends = np.cumsum([len(token) for token in self.tokens]).tolist()
        pieces = [letters[start:end] for start, end in zip([0, *ends], ends)]
        model = models.Unigram(list(zip(pieces, self.scores_V.tolist())))
        engine = tokenizers.Tokenizer(model)
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        id_of = {token: i for i, token in enumerate(self.tokens) if len(token) == 1}
        bytes_256 = np.array([id_of[bytes([byte])] for byte in range(256)], np.int32)
        return Converted(
            kind='letters',
            engine=engine,
            model=engine.model,
            whole={},
            ids=np.arange(len(self.tokens), dtype=np.int32),
            tokens=self.tokens,
            bytes=bytes_256,
        )

    def __getstate__(self) -> dict[str, object]:
        return {'tokens': self.tokens, 'scores_V': self.scores_V}


def sample(
    counts: Counts, size: int, key: int | Sequence[int], sigma: float | None = None
) -> SampledTokenizer:
    """Returns a random tokenizer of exactly `size` tokens, the 256 bytes among them.

    A byte that is no substring of the counts has the least score of the tokens that are. Where
    fewer than `size` substrings keep a positive probability, the next best follow at -1e5.

    Args:
      counts: of a queue of texts.
      size: V, at least 256.
      key: seed; the same key and counts give the same tokenizer.
      sigma: of the noise; drawn if None.

    Raises:
      ValueError: `size` is below 256, or the texts have too few substrings.
    """
    rng = np.random.default_rng(key)
    drawn = math.exp(_LOG_SIGMA + _SPREAD * rng.standard_normal())
    sigma = drawn if sigma is None else sigma
    length_N = (counts.keys_N2[:, 1] & np.uint64(0xFF)).astype(np.int64)
    longer = int(np.count_nonzero(length_N > 1))
    if size < 256 or longer < size - 256:
        raise ValueError(
            f'{size} tokens asked for: expected 256 bytes and at most the {longer} longer '
            'substrings of the texts; give more text'
        )
    p_N = counts.weights_N / counts.weights_N.sum(dtype=np.float64)
    p_N = p_N + sigma * rng.standard_normal(len(counts))
    best = np.argsort(np.where(length_N > 1, -p_N, np.inf), kind='stable')[: size - 256]
    single = np.flatnonzero(length_N == 1)
    kept = np.concatenate([best, single])
    score = np.full(len(kept), _NEVER)
    np.log(p_N[kept], out=score, where=p_N[kept] > 0)
    seen = counts.strings(single)
    unseen = sorted({bytes([byte]) for byte in range(256)} - set(seen))
    least = score[score > _NEVER].min(initial=0.0)
    # A byte without a positive probability takes the least score, too.
    score[len(best) :][score[len(best) :] == _NEVER] = least
    tokens = [*counts.strings(best), *seen, *unseen]
    scores = np.concatenate([score, np.full(len(unseen), least)])
    order = np.argsort(-scores, kind='stable')
    return SampledTokenizer(tuple(tokens[i] for i in order.tolist()), scores[order])
