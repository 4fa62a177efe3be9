"""The seven representations: building them, and encoding text with them once."""

from collections.abc import Callable, Sequence

from etils import epath

import tokenization
from experiments.equal_info.config import Config
from experiments.equal_info.models import FirstModels
from lm.data import EncodedDocuments
from lm.metrics import ProgressLine
from tokenization.arithmetic_tokenizer import ArithmeticTokenizer
from tokenization.bpe import BPETokenizer
from tokenization.byte import ByteTokenizer
from tokenization.codebook import compile_equal_info, tunstall
from tokenization.equal_info import EqualInfoTokenizer
from tokenization.tokenizer import Tokenizer

_ENCODE_AT_ONCE = 128


def build(
    config: Config, first: FirstModels, codec_model: str, train: Sequence[bytes], out: epath.Path
) -> dict[str, Tokenizer]:
    """Returns the tokenizer of each row; what an earlier run saved under `out` is loaded."""
    model = first.next_byte(codec_model, config)

    def canonical(bits: int) -> EqualInfoTokenizer:
        return compile_equal_info(model, 'canonical', config.window_bytes, bits)

    makers: dict[str, Callable[[], Tokenizer]] = {
        'bytes': ByteTokenizer,
        'bpe': lambda: BPETokenizer.train(train, config.bpe_vocab_size),
        'arithmetic_256': lambda: ArithmeticTokenizer(first.ngram, 8),
        'equal_info_16_256': lambda: canonical(8),
        'equal_info_16_65k': lambda: canonical(16),
        'delay_16_65k': lambda: compile_equal_info(model, 'delay', config.window_bytes, 16),
        'tunstall_65k': lambda: tunstall(model, 65_536, config.window_bytes),
    }
    tokenizers = {}
    with ProgressLine('building tokenizers', len(makers)) as progress:
        for i, (row, make) in enumerate(makers.items()):
            progress.update(i, row)
            tokenizers[row] = _once(out / 'tokenizers' / row, make)
        progress.update(len(makers))
    return tokenizers


def _once(folder: epath.Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    if (folder / 'done').exists():
        return tokenization.load(folder)
    tokenizer = make()
    tokenizer.save(folder)
    (folder / 'done').write_text('')
    return tokenizer


def best_codec(config: Config, first: FirstModels, valid: Sequence[bytes]) -> dict[str, float]:
    """Returns bytes per 16-bit code on held-out text of the codec compiled from each model."""
    n_bytes = sum(map(len, valid))
    result = {}
    for name in ('ngram', 'm1'):
        model = first.next_byte(name, config)
        tokenizer = compile_equal_info(model, 'canonical', config.window_bytes, 16)
        result[name] = n_bytes / sum(map(len, tokenizer.encode_batch(valid)))
    return result


def encoded_once(
    tokenizer: Tokenizer, documents: Sequence[bytes], folder: epath.Path, label: str
) -> EncodedDocuments:
    """Returns the ids of documents, memory-mapped; encodes them unless `folder` holds them."""
    if not folder.exists():
        with ProgressLine(label, len(documents)) as progress:

            def ids():
                for i in range(0, len(documents), _ENCODE_AT_ONCE):
                    progress.update(i)
                    yield from tokenizer.encode_batch(documents[i : i + _ENCODE_AT_ONCE])

            EncodedDocuments.write(folder, ids(), tokenizer.vocab_size)
    return EncodedDocuments(folder)
