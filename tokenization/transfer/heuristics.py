"""New token tables without a network: what a hypernetwork is compared with.

Each function is a `transfer.Method`. Rows are f32 `[V, D]`; those of special tokens are filled in
by `transfer.with_tables`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.params import Params
from tokenization.tokenizer import Tokenizer
from tokenization.transfer import transfer
from tokenization.transfer.transfer import Method, SourceModel, Vocabulary

_PIECES = 32


def random(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
    """Draws rows with the source's mean and deviation in each dimension."""
    result = {}
    for i, (name, rows_VD) in enumerate(_rows(source).items()):
        noise_UD = jax.random.normal(
            jax.random.fold_in(key, i), (len(vocabulary.tokens), rows_VD.shape[1])
        )
        result[name] = rows_VD.mean(0) + rows_VD.std(0) * noise_UD
    return result


def mean(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
    """Gives every token the mean row of the source."""
    del key
    shape = len(vocabulary.tokens), 1
    return {name: jnp.tile(rows_VD.mean(0), shape) for name, rows_VD in _rows(source).items()}


def mean_of_pieces(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
    """Gives a token the mean row of its pieces (Fast Vocabulary Transfer, Gee et al. 2022).

    Pieces are those of the source's tokenizer; a byte that it lacks counts as the mean row.
    """
    del key
    pieces_VP = transfer.pieces(source, vocabulary, _PIECES)
    real_VP = pieces_VP >= 0
    weight_VP = real_VP / np.maximum(real_VP.sum(1, keepdims=True), 1)
    known_VP = np.where(real_VP & (pieces_VP < source.tokenizer.vocab_size), pieces_VP, -1)
    return {
        name: _mixture(rows_VD, known_VP, weight_VP.astype(np.float32))
        for name, rows_VD in _rows(source).items()
    }


def lexical_copy(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
    """Copies the rows of tokens that the source has; draws the others as `random` does."""
    at_V = same_token(source.tokenizer, vocabulary.tokens)
    drawn, rows = random(source, vocabulary, key), _rows(source)
    return {
        name: jnp.where((at_V >= 0)[:, None], rows[name][np.maximum(at_V, 0)], drawn[name])
        for name in drawn
    }


def neighbours(vectors: Callable[[Sequence[bytes]], np.ndarray], most: int = 16) -> Method:
    """Returns a method after FOCUS (Dobler & de Melo 2023, arXiv 2305.14481).

    Tokens that the source has are copied. Another's row is a mixture of theirs, by the sparsemax
    of the cosines between auxiliary vectors.

    Args:
      vectors: unit vectors of tokens, `[V] -> [V, A]`; `context_vectors` makes some. A token of
        which they say nothing is a zero vector, and gets the mean row.
      most: tokens in a mixture at most.
    """

    def tables(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
        del key
        at_V = same_token(source.tokenizer, vocabulary.tokens)
        vector_VA = vectors(vocabulary.tokens)
        shared = np.flatnonzero(at_V >= 0)
        near_VM = np.full((len(at_V), most), -1)
        weight_VM = np.zeros((len(at_V), most), np.float32)
        near_VM[shared, 0], weight_VM[shared, 0] = at_V[shared], 1
        anchors = shared[np.any(vector_VA[shared], axis=1)]
        others = np.flatnonzero((at_V < 0) & np.any(vector_VA, axis=1))
        for some in np.array_split(others, max(len(others) // 1024, 1)):
            cosine_UA = vector_VA[some] @ vector_VA[anchors].T
            best_UM = np.argsort(-cosine_UA, axis=1)[:, :most]
            near_VM[some, : best_UM.shape[1]] = at_V[anchors][best_UM]
            cosine_UM = np.take_along_axis(cosine_UA, best_UM, 1)
            weight_VM[some, : best_UM.shape[1]] = sparsemax(cosine_UM)
        return {name: _mixture(x, near_VM, weight_VM) for name, x in _rows(source).items()}

    return tables


def sparsemax(logits_UM: np.ndarray) -> np.ndarray:
    """Returns the point of the simplex nearest to `logits`, row by row (Martins & Astudillo 2016).

    Args:
      logits_UM: in falling order along the rows.
    """
    count_M = np.arange(1, logits_UM.shape[1] + 1)
    total_UM = np.cumsum(logits_UM, axis=1)
    inside_UM = 1 + count_M * logits_UM > total_UM
    size_U1 = inside_UM.sum(1, keepdims=True)
    threshold_U1 = (np.take_along_axis(total_UM, size_U1 - 1, 1) - 1) / size_U1
    return np.maximum(logits_UM - threshold_U1, 0)


def context_vectors(
    target: Tokenizer, documents: Sequence[bytes], contexts: int = 512
) -> Callable[[Sequence[bytes]], np.ndarray]:
    """Returns auxiliary vectors of tokens from what stands beside them in a text.

    Positive pointwise mutual information of each id with the `contexts` most frequent ids, to its
    left and to its right, of unit length: FOCUS has fastText vectors of the target's text.
    """
    v = target.vocab_size
    ids = target.encode_batch(documents)
    frequent = np.argsort(-np.bincount(np.concatenate(ids), minlength=v), kind='stable')[:contexts]
    column_V = np.full(v, -1)
    column_V[frequent] = np.arange(len(frequent))
    counts = np.zeros((v, 2 * len(frequent)), np.float32)
    for ids_T in ids:
        for side, own_T, other_T in ((0, ids_T[1:], ids_T[:-1]), (1, ids_T[:-1], ids_T[1:])):
            column_T = column_V[other_T]
            known_T = column_T >= 0
            np.add.at(counts, (own_T[known_T], column_T[known_T] + side * len(frequent)), 1)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / max(counts.sum(), 1)
    positive = np.log(np.maximum(counts, 1e-30) / np.maximum(expected, 1e-30))
    vector_VA = np.where(counts > 0, np.maximum(positive, 0), 0)
    vector_VA /= np.maximum(np.linalg.norm(vector_VA, axis=1, keepdims=True), 1e-9)

    def vectors(tokens: Sequence[bytes]) -> np.ndarray:
        # rows behind the target's own ids are those of special tokens
        return np.pad(vector_VA, ((0, len(tokens) - v), (0, 0)))

    return vectors


def same_token(source: Tokenizer, tokens: Sequence[bytes]) -> np.ndarray:
    """Returns the source's id of each token, `[V]`; -1 where it has none."""
    ids = {data: i for i, data in reversed([*enumerate(transfer.token_table(source))])}
    return np.array([ids.get(token, -1) if token else -1 for token in tokens])


def _rows(source: SourceModel) -> dict[str, jax.Array]:
    """Returns the rows of the source's own ids, without padding and special ones."""
    v = source.tokenizer.vocab_size
    return {name: x[:v].astype(jnp.float32) for name, x in source.params['tables'].items()}


def _mixture(rows_VD: jax.Array, at_UM: np.ndarray, weight_UM: np.ndarray) -> jax.Array:
    """Returns weighted sums of rows; one that is not there (-1), or no weight, is the mean row."""
    mean_D = rows_VD.mean(0)

    def mix(inputs):
        at_M, weight_M = inputs
        picked_MD = jnp.where((at_M >= 0)[:, None], rows_VD[at_M], mean_D)
        return (weight_M[:, None] * picked_MD).sum(0) + (1 - weight_M.sum()) * mean_D

    return jax.lax.map(mix, (jnp.asarray(at_UM), jnp.asarray(weight_UM)), batch_size=1024)
