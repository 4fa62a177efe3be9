"""Small tokenizers of each Hugging Face kind, and a writer of SentencePiece files."""

import json
import struct

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from experiments import corpora

OTHER = ['Ελληνικά και άλλα', 'русский язык', 'naïve façade', '漢字かな交じり文', 'עברית']
SPECIAL = ['<unk>', '<s>', '</s>']


def lines() -> list[str]:
    library = corpora.standard_library()
    code = b''.join(library.train[i] for i in range(6)).decode()
    return [*code.split('\n'), *OTHER * 9]


def byte_level() -> tokenizers.Tokenizer:
    original = tokenizers.Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.decoder = decoders.ByteLevel()
    original.train_from_iterator(
        lines(),
        trainers.BpeTrainer(
            vocab_size=600, show_progress=False, special_tokens=['<|end|>'],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    original.add_tokens(['    ', '<tool>'])
    return original


def metaspace_bpe() -> tokenizers.Tokenizer:
    """Like Llama 2: no pretokens, a space before the text, tokens for single bytes."""
    original = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
    blank = normalizers.Replace(' ', '▁')
    original.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), blank])
    original.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
    fallback = [f'<0x{byte:02X}>' for byte in range(256)]
    original.train_from_iterator(
        [line for line in lines() if '漢' not in line],
        trainers.BpeTrainer(
            vocab_size=800, show_progress=False, special_tokens=[*SPECIAL, *fallback]
        ),
    )
    document = json.loads(original.to_str())
    document['added_tokens'] = document['added_tokens'][:3]
    document['pre_tokenizer'] = None
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def unigram() -> tokenizers.Tokenizer:
    """Like T5: words, and an unknown token for other characters."""
    original = tokenizers.Tokenizer(models.Unigram())
    original.pre_tokenizer = pre_tokenizers.Metaspace()
    original.decoder = decoders.Metaspace()
    original.train_from_iterator(
        [line for line in lines() if '漢' not in line],
        trainers.UnigramTrainer(
            vocab_size=600, show_progress=False, special_tokens=SPECIAL, unk_token='<unk>'
        ),
    )
    original.post_processor = processors.TemplateProcessing('$A </s>', special_tokens=[('</s>', 2)])
    return original


def word_piece() -> tokenizers.Tokenizer:
    """Like cased BERT."""
    original = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    original.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    original.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    original.train_from_iterator(
        lines(),
        trainers.WordPieceTrainer(
            vocab_size=700, show_progress=False, special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]']
        ),
    )
    original.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    return original


MAKERS = {
    'byte_level': byte_level,
    'metaspace_bpe': metaspace_bpe,
    'unigram': unigram,
    'word_piece': word_piece,
}

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def field(number: int, value: bytes | int | float) -> bytes:
    match value:
        case bytes():
            return varint(number << 3 | 2) + varint(len(value)) + value
        case float():
            return varint(number << 3 | 5) + struct.pack('<f', value)
    return varint(number << 3) + varint(value % (1 << 64))


def write(pieces, kind: int = 2, trainer: bytes = b'', rules: bytes = b'') -> bytes:
    """A ModelProto of (text, score, type) pieces."""
    messages = [
        field(
            1, field(1, text.encode()) + field(2, score) + (field(3, type_) if type_ > 1 else b'')
        )
        for text, score, type_ in pieces
    ]
    return b''.join([*messages, field(2, field(3, kind) + trainer), field(3, rules)])
