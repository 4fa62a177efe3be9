"""Random tokenizers, one per training step, so that a hypernetwork learns to serve any tokenizer.

Source: Minixhofer et al., Zero-Shot Tokenizer Transfer (NeurIPS 2024, arXiv:2405.07883), section
3.1 and algorithm 2. Let p(t) be the share of substring t in the weights of a queue of texts
(`tokenization.transfer.substrings`). With one sigma per tokenizer,

    sigma ~ LogNormal(ln 1e-5, 4),   score(t) = ln(p(t) + z_t),   z_t ~ N(0, sigma)

and the substrings with the best scores, together with all 256 bytes, are the pieces of a Unigram
model. At sigma = 0 they are the most common ones. The released code gives runs of blanks the score
0, so that they are always chosen; here they are scored like other substrings.
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
# The score of substrings whose noisy probability is not positive: used only if nothing else fits.
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
        """Returns the ids of `data` taken as one pretoken."""
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

    A byte that does not occur in the counts gets the lowest score of the tokens that do. If fewer
    than `size` substrings have a positive noisy probability, the next best get the score -1e5.

    Args:
      counts: those of a queue of texts.
      size: V, at least 256.
      key: seed; the same key and counts give the same tokenizer.
      sigma: standard deviation of the noise; drawn if None.

    Raises:
      ValueError: `size` is below 256, or the texts have too few substrings.
    """
    rng = np.random.default_rng(key)
    drawn = math.exp(_LOG_SIGMA + _SPREAD * rng.standard_normal())
    sigma = drawn if sigma is None else sigma
    length_Y = (counts.keys_Y2[:, 1] & np.uint64(0xFF)).astype(np.int64)
    longer = int(np.count_nonzero(length_Y > 1))
    if size < 256 or longer < size - 256:
        raise ValueError(
            f'{size} tokens asked for: expected 256 bytes and at most the {longer} longer '
            'substrings of the texts; give more text'
        )
    p_Y = counts.weights_Y / counts.weights_Y.sum(dtype=np.float64)
    p_Y = p_Y + sigma * rng.standard_normal(len(counts))
    best = np.argsort(np.where(length_Y > 1, -p_Y, np.inf), kind='stable')[: size - 256]
    single = np.flatnonzero(length_Y == 1)
    kept = np.concatenate([best, single])
    score = np.full(len(kept), _NEVER)
    np.log(p_Y[kept], out=score, where=p_Y[kept] > 0)
    seen = counts.strings(single)
    unseen = sorted({bytes([byte]) for byte in range(256)} - set(seen))
    least = score[score > _NEVER].min(initial=0.0)
    # A byte without a positive probability gets the lowest score, too.
    score[len(best) :][score[len(best) :] == _NEVER] = least
    tokens = [*counts.strings(best), *seen, *unseen]
    scores = np.concatenate([score, np.full(len(unseen), least)])
    order = np.argsort(-scores, kind='stable')
    return SampledTokenizer(tuple(tokens[i] for i in order.tolist()), scores[order])
