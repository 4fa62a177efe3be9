"""The seven representations of the comparison."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from experiments import resume
from experiments.equal_info.config import Config
from experiments.equal_info.models import FirstModels
from lm.training.metrics import ProgressLine
from tokenization.coding.arithmetic_tokenizer import ArithmeticTokenizer
from tokenization.coding.next_byte import NextByteModel
from tokenization.equal_info.compiler import compile_equal_info, tunstall
from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer
from tokenization.vocabularies.table import TableTokenizer


class Codec(NamedTuple):
    """A canonical codec of 16-bit tokens, the model it was compiled from, and its mean bytes per
    token on validation text."""

    model: NextByteModel
    tokenizer: TableTokenizer
    bytes_per_code: float


def compiled(config: Config, first: FirstModels, valid: Sequence[bytes]) -> dict[str, Codec]:
    """Returns the codec compiled from each candidate."""
    n_bytes = sum(map(len, valid))
    result = {}
    for name, model in first.candidates.items():
        tokenizer = compile_equal_info(model, 'canonical', config.window_bytes)
        codes = sum(map(len, tokenizer.encode_batch(valid)))
        result[name] = Codec(model, tokenizer, n_bytes / codes)
    return result


def build(
    config: Config, first: FirstModels, codec: Codec, train: Sequence[bytes], out: epath.Path
) -> dict[str, Tokenizer]:
    """Returns the tokenizer of each row, loading those that an earlier run saved in `out`."""
    in_bytes = codec.tokenizer.in_bytes()
    size = config.window_bytes
    makers: dict[str, Callable[[], Tokenizer]] = {
        'bytes': ByteTokenizer,
        'bpe': lambda: BPETokenizer.train(train, config.bpe_vocab_size),
        'arithmetic_256': lambda: ArithmeticTokenizer(first.ngram, 8),
        'equal_info_16_256': lambda: in_bytes,
        'equal_info_16_65k': lambda: codec.tokenizer,
        'delay_16_65k': lambda: compile_equal_info(codec.model, 'delay', size),
        'tunstall_65k': lambda: tunstall(codec.model, max_bytes=size),
    }
    tokenizers = {}
    with ProgressLine('building tokenizers', len(makers)) as progress:
        for i, (row, make) in enumerate(makers.items()):
            progress.update(i, row)
            tokenizers[row] = resume.tokenizer_once(out / 'tokenizers' / row, make)
        progress.update(len(makers))
    return tokenizers
