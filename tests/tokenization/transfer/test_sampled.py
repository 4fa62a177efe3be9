"""Random tokenizers: counts equal slow counts, sums equal recounts, samples are lossless."""

import collections

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from experiments import corpora
from tokenization.transfer import sampled, substrings
from tokenization.vocabularies.patterns import GPT2_PATTERN

WORDS = ['the', ' the', ' café', ' 漢字かな', '    ', '\n', ' 123456789', 'x' * 40, '!?']
texts = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=6).map(''.join).map(str.encode)
    | st.binary(max_size=9),
    max_size=5,
)


def slowly(documents: list[bytes]) -> dict[bytes, int]:
    weights: collections.Counter[bytes] = collections.Counter()
    for document in documents:
        for stretch in regex.split('[\udc80-\udcff]+', document.decode('utf-8', 'surrogateescape')):
            for word in map(str.encode, regex.findall(GPT2_PATTERN, stretch)):
                for start in range(0, len(word), 4):
                    for end in range(start + 1, min(start + 15, len(word)) + 1):
                        weights[word[start:end]] += end - start
    return weights


def as_dict(counts: substrings.Counts) -> dict[bytes, int]:
    strings = counts.strings(np.arange(len(counts)))
    assert len(set(strings)) == len(strings) and strings == sorted(strings)
    return dict(zip(strings, counts.weights_Y.tolist()))


@given(documents=texts)
def test_counts_are_those_of_a_slow_count(documents):
    assert as_dict(substrings.count(documents)) == slowly(documents)


@given(first=texts, second=texts, third=texts)
def test_adding_and_removing_equal_a_recount(first, second, third):
    parts = [substrings.count(documents) for documents in (first, second, third)]
    whole = substrings.add(parts)
    assert as_dict(whole) == as_dict(substrings.count([*first, *second, *third]))
    assert as_dict(substrings.remove(whole, parts[0])) == as_dict(
        substrings.count([*second, *third])
    )


def test_removing_what_is_not_there():
    with pytest.raises(ValueError, match="b'b' occurs more often in the part"):
        substrings.remove(substrings.count([b'a']), substrings.count([b'b']))


@pytest.fixture(scope='module')
def documents() -> list[bytes]:
    library = corpora.standard_library()
    return [library.train[i][:3000] for i in range(60)]


@pytest.fixture(scope='module')
def counts(documents) -> substrings.Counts:
    return substrings.count(documents)


def test_without_noise_the_most_common_come_first(documents, counts):
    weights = slowly(documents)
    tokenizer = sampled.sample(counts, 2000, key=0, sigma=0.0)
    assert tokenizer.vocab_size == len(set(tokenizer.tokens)) == 2000
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.tokens)
    found = [weights[token] for token in tokenizer.tokens if token in weights]
    assert found == sorted(found, reverse=True)
    longer = sorted((w for token, w in weights.items() if len(token) > 1), reverse=True)
    assert [weights[token] for token in tokenizer.tokens if len(token) > 1] == longer[: 2000 - 256]
    total = sum(weights.values())
    for token, score in zip(tokenizer.tokens[:50], tokenizer.scores_V):
        assert score == pytest.approx(np.log(weights[token] / total))
    unseen = [i for i, token in enumerate(tokenizer.tokens) if token not in weights]
    assert unseen and np.all(tokenizer.scores_V[unseen] == tokenizer.scores_V.min())


def test_a_key_decides_the_sample(counts):
    first, same, other = (sampled.sample(counts, 1000, key) for key in ((3, 1), (3, 1), (3, 2)))
    assert first.tokens == same.tokens and np.array_equal(first.scores_V, same.scores_V)
    assert first.tokens != other.tokens
    # Strong noise drowns the counts.
    common = set(sampled.sample(counts, 1000, 0, sigma=0.0).tokens)
    noisy = set(sampled.sample(counts, 1000, 0, sigma=10.0).tokens)
    assert len(common & noisy) < 500


def test_all_substrings_and_no_more(counts):
    longer = sum(len(s) > 1 for s in counts.strings(np.arange(len(counts))))
    tokenizer = sampled.sample(counts, 256 + longer, 0, sigma=1.0)
    # About half have no positive probability, and come last.
    never = np.mean(tokenizer.scores_V == -1e5)
    assert 0.4 < never < 0.6 and np.all(np.diff(tokenizer.scores_V) <= 0)
    assert all(len(t) > 1 for t, s in zip(tokenizer.tokens, tokenizer.scores_V) if s == -1e5)
    with pytest.raises(ValueError, match=f'at most the {longer} longer substrings'):
        sampled.sample(counts, 257 + longer, 0)
    with pytest.raises(ValueError, match='255 tokens asked for'):
        sampled.sample(counts, 255, 0)


@pytest.fixture(scope='module')
def tokenizers(counts) -> list[sampled.SampledTokenizer]:
    return [sampled.sample(counts, 1500, key) for key in range(3)]


@given(data=st.binary(max_size=40) | texts.map(b''.join))
def test_decode_inverts_encode(tokenizers, data):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(data)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == data
        assert tokenizer.decode(np.array(tokenizer.encode_piece(data), np.int64)) == data


def test_the_best_segmentation_is_taken(tokenizers, documents):
    """Against every segmentation of short words, by dynamic programming over bytes."""
    tokenizer = tokenizers[0]
    score = dict(zip(tokenizer.tokens, tokenizer.scores_V))
    words = {w for w in regex.findall(GPT2_PATTERN, documents[0].decode()) if len(w) < 12}
    for word in map(str.encode, words):
        best = [0.0]
        for end in range(1, len(word) + 1):
            cuts = ((best[k], word[k:end]) for k in range(end))
            best.append(max(before + score.get(token, -np.inf) for before, token in cuts))
        ids = tokenizer.encode_piece(word)
        assert sum(tokenizer.scores_V[ids]) == pytest.approx(best[-1])
