"""A tokenizer's vocabulary, extended by strings that are frequent in a corpus.

A hypernetwork gives a row to any string, so that a model can write with a vocabulary of a million
words (Feher et al., 2024, arXiv:2411.18553, section on decoders). The ids of the original
tokenizer keep their meaning; encoding is longest match, since no merge rules lead to the new ones.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, pre_tokenizers

from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies.pair_merging import PairMerger
from tokenization.vocabularies.patterns import GPT2_PATTERN
from tokenization.vocabularies.table import TableTokenizer


def extended_vocabulary(
    tokenizer: Tokenizer, documents: Iterable[bytes], size: int, pattern: str = GPT2_PATTERN
) -> TableTokenizer:
    """Returns a table that holds a tokenizer's tokens, and after them frequent longer strings.

    Byte-pair encoding continues from the tokenizer's segmentation of each word: the most frequent
    pair of neighbours becomes a token, until the table is full or every word is one token.

    Args:
      tokenizer: the original; its ids keep their meaning, and those without bytes stay special.
      documents: the corpus; bytes that are not UTF-8 are skipped.
      size: the greatest number of ids.
      pattern: the regular expression that splits text into words; no token crosses two of them.

    Raises:
      ValueError: `size` is below the tokenizer's own, or a single byte has no id.
    """
    if size < tokenizer.vocab_size:
        raise ValueError(
            f'size {size}: the vocabulary to extend has {tokenizer.vocab_size} tokens already'
        )
    tokens = [_bytes_of(tokenizer, i) for i in range(tokenizer.vocab_size)]
    split = pre_tokenizers.Split(Regex(pattern), 'isolated').pre_tokenize_str
    words: Counter[str] = Counter()
    for document in documents:
        words.update(word for word, _ in split(document.decode('utf-8', 'ignore')))
    encoded = tokenizer.encode_batch([word.encode() for word in words])
    merger = PairMerger(encoded, tokens, lambda left, right: True, weights=list(words.values()))
    known = set(tokens)
    while len(tokens) < size and (pair := merger.best()) is not None:
        string = b''.join([tokens[piece] for piece in merger.merge(pair)])
        if string not in known:  # other pieces may have made it before
            known.add(string)
            tokens.append(string)
    return TableTokenizer.of(tokens)


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except ValueError:
        return b''
