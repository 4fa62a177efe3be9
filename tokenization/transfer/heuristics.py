"""Heuristics for new token tables, the baselines of a hypernetwork.

Each function is a `transfer.Method`. Rows are f32 `[V, D]`; `transfer.with_tables` replaces those
of special tokens.
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
    """Draws rows from a normal with the source rows' mean and deviation in each dimension."""
    result = {}
    for i, (name, rows_VD) in enumerate(_rows(source).items()):
        noise_UD = jax.random.normal(
            jax.random.fold_in(key, i), (len(vocabulary.tokens), rows_VD.shape[1])
        )
        result[name] = rows_VD.mean(0) + rows_VD.std(0) * noise_UD
    return result


def mean(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
    """Gives every token the mean of the source rows."""
    del key
    shape = len(vocabulary.tokens), 1
    return {name: jnp.tile(rows_VD.mean(0), shape) for name, rows_VD in _rows(source).items()}


def mean_of_pieces(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
    """Gives a token the mean row of its pieces (Fast Vocabulary Transfer, Gee et al. 2022).

    Pieces are ids of the source's tokenizer; a byte without one counts as the mean row.
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
    """Copies the rows of tokens that the source has, and draws the others as `random` does."""
    at_V = same_token(source.tokenizer, vocabulary.tokens)
    drawn, rows = random(source, vocabulary, key), _rows(source)
    return {
        name: jnp.where((at_V >= 0)[:, None], rows[name][np.maximum(at_V, 0)], drawn[name])
        for name in drawn
    }


def neighbours(vectors: Callable[[Sequence[bytes]], np.ndarray], most: int = 16) -> Method:
    """Returns a method after FOCUS (Dobler & de Melo 2023, arXiv 2305.14481).

    The rows of shared tokens, those that the source has, are copied. Another token t gets the
    mixture of shared tokens s

        row(t) = sum_s w_s row(s),    w = sparsemax_s(cos(v_t, v_s))

    with auxiliary vectors v, over the `most` nearest s.

    Args:
      vectors: tokens `[V]` -> unit vectors `[V, A]`, such as `context_vectors`. A token without
        evidence has a zero vector, and gets the mean row.
      most: the greatest number of tokens in a mixture.
    """

    def tables(source: SourceModel, vocabulary: Vocabulary, key: jax.Array) -> Params:
        del key
        at_V = same_token(source.tokenizer, vocabulary.tokens)
        vector_VE = vectors(vocabulary.tokens)
        shared = np.flatnonzero(at_V >= 0)
        near_VP = np.full((len(at_V), most), -1)
        weight_VP = np.zeros((len(at_V), most), np.float32)
        near_VP[shared, 0], weight_VP[shared, 0] = at_V[shared], 1
        anchors = shared[np.any(vector_VE[shared], axis=1)]
        others = np.flatnonzero((at_V < 0) & np.any(vector_VE, axis=1))
        for some in np.array_split(others, max(len(others) // 1024, 1)):
            cosine_UV = vector_VE[some] @ vector_VE[anchors].T
            best_UP = np.argsort(-cosine_UV, axis=1)[:, :most]
            near_VP[some, : best_UP.shape[1]] = at_V[anchors][best_UP]
            cosine_UP = np.take_along_axis(cosine_UV, best_UP, 1)
            weight_VP[some, : best_UP.shape[1]] = sparsemax(cosine_UP)
        return {name: _mixture(x, near_VP, weight_VP) for name, x in _rows(source).items()}

    return tables


def sparsemax(logits_UP: np.ndarray) -> np.ndarray:
    """Returns the projection of each row onto the simplex (Martins & Astudillo 2016).

        sparsemax(z) = argmin_p |p - z|^2 = max(z - tau, 0),    with tau such that it sums to 1

    >>> sparsemax(np.array([[1.0, 0.5, -1.0]]))  # tau = 0.25
    array([[0.75, 0.25, 0.  ]])

    Args:
      logits_UP: rows in decreasing order.
    """
    count_P = np.arange(1, logits_UP.shape[1] + 1)
    total_UP = np.cumsum(logits_UP, axis=1)
    inside_UP = 1 + count_P * logits_UP > total_UP
    size_U1 = inside_UP.sum(1, keepdims=True)
    threshold_U1 = (np.take_along_axis(total_UP, size_U1 - 1, 1) - 1) / size_U1
    return np.maximum(logits_UP - threshold_U1, 0)


def context_vectors(
    target: Tokenizer, documents: Sequence[bytes], contexts: int = 512
) -> Callable[[Sequence[bytes]], np.ndarray]:
    """Returns auxiliary vectors of tokens from their neighbours in a text.

    The vector of token t has the positive pointwise mutual information

        max(0, log(p(t, c) / (p(t) p(c))))

    with each of the `contexts` most frequent tokens c, as its left and as its right neighbour,
    normalised to unit length. (FOCUS trains fastText vectors on the target's text instead.)
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
    vector_VE = np.where(counts > 0, np.maximum(positive, 0), 0)
    vector_VE /= np.maximum(np.linalg.norm(vector_VE, axis=1, keepdims=True), 1e-9)

    def vectors(tokens: Sequence[bytes]) -> np.ndarray:
        # Rows after the target's own ids belong to special tokens.
        return np.pad(vector_VE, ((0, len(tokens) - v), (0, 0)))

    return vectors


def same_token(source: Tokenizer, tokens: Sequence[bytes]) -> np.ndarray:
    """Returns the source's id of each token, `[V]`; -1 for a token that it lacks."""
    ids = {data: i for i, data in reversed([*enumerate(transfer.token_table(source))])}
    return np.array([ids.get(token, -1) if token else -1 for token in tokens])


def _rows(source: SourceModel) -> dict[str, jax.Array]:
    """Returns the rows of the source tokenizer's ids, without padding and BOS."""
    v = source.tokenizer.vocab_size
    return {name: x[:v].astype(jnp.float32) for name, x in source.params['tables'].items()}


def _mixture(rows_VD: jax.Array, at_UP: np.ndarray, weight_UP: np.ndarray) -> jax.Array:
    """Returns weighted sums of rows; an absent row (-1) or missing weight is the mean row."""
    mean_D = rows_VD.mean(0)

    def mix(inputs):
        at_P, weight_P = inputs
        picked_PD = jnp.where((at_P >= 0)[:, None], rows_VD[at_P], mean_D)
        return (weight_P[:, None] * picked_PD).sum(0) + (1 - weight_P.sum()) * mean_D

    return jax.lax.map(mix, (jnp.asarray(at_UP), jnp.asarray(weight_UP)), batch_size=1024)
