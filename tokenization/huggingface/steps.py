"""The normalizers and pre-tokenizers around a tokenizer's model, without those that lose text.

Text reaches the model as it stands: it is not normalised, no blank is removed and no space is put
before it. Each omitted step is reported as a repair.
"""

import functools
import re
from typing import Any, Literal

import tokenizers
from tokenizers import pre_tokenizers

from tokenization.huggingface.json_file import TokenizerJson

SPACE = '▁'
BYTE = re.compile('<0x([0-9A-F]{2})>')
Kind = Literal['letters', 'metaspace', 'words']
# BERT splits at blanks and at these: punctuation with ASCII's signs, ideographs.
_MARKS = r'\p{P}$+<=>^`|~'
_IDEOGRAPHS = (
    r'\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2CEAF}'
    r'\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}'
)


def kind_of(source: TokenizerJson) -> Kind:
    """Returns how a vocabulary spells bytes; raises ValueError if that is unknown."""
    names = {step['type'] for step in source.pre_tokenizers}
    spaces = 'Metaspace' in names or any(is_space_rule(step) for step in source.normalizers)
    if source.model == 'WordPiece':
        return 'words'
    if spaces:
        return 'metaspace'
    if 'ByteLevel' in names and source.model == 'BPE':
        return 'letters'
    raise ValueError(
        f'cannot tell how this {source.model} vocabulary spells spaces: expected BPE with a '
        'ByteLevel pre-tokenizer, or "▁" from Metaspace or a normalizer that replaces " "'
    )


def lossless(
    source: TokenizerJson, kind: Kind, repairs: list[str]
) -> tuple[list[dict], list[dict], str]:
    """Returns the lossless normalizers and pre-tokenizers, and `Converted.prefix`."""
    prefix = ''
    # Splits a text before a step that puts a space before each part.
    cuts = ['an added token'] if any(not a.special for a in source.added) else []
    kept: list[dict] = []
    for step in source.normalizers:
        match step:
            case _ if is_space_rule(step):
                kept.append(step)
            case {'type': 'Prepend', 'prepend': '▁'}:
                prefix = 'always'
                repairs += [f'Prepend: no space is put before what follows {x}' for x in cuts]
            case {'type': 'NFC' | 'NFD' | 'NFKC' | 'NFKD' | 'Lowercase' | 'StripAccents' | 'Strip'
                  | 'BertNormalizer' | 'Precompiled' | 'Nmt' | 'Replace' as name}:  # fmt: skip
                repairs.append(f'normalizer {name} left out: text is encoded as it stands')
            case _:
                raise ValueError(f'unknown normalizer {step["type"]!r}: it cannot be undone')
    split: list[dict] = []
    for step in source.pre_tokenizers:
        added, before = _pre_tokenizer(step, kind, repairs)
        if before and step.get('prepend_scheme') != 'first':
            repairs += [f'{step["type"]}: no space is put before what follows {x}' for x in cuts]
        if step['type'] != 'WhitespaceSplit':  # its parts follow spaces in the text
            cuts.append(f'a part of {step["type"]}')
        split += added
        prefix = before or prefix
    if kind == 'words':
        if [step['type'] for step in source.pre_tokenizers] != ['BertPreTokenizer']:
            repairs.append('text is split into words as BERT does, not as the original does')
        blank = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
        kept, split, prefix = [blank], _bert_split(), 'unless'
        repairs.append(
            'a token that begins a word is the space and the word: words that follow no space are '
            'spelled in continuing tokens'
        )
    if prefix:
        repairs.append('no space is put before a text: encode b" " + text for the original\'s ids')
    return kept, split, prefix


def _pre_tokenizer(step: dict, kind: Kind, repairs: list[str]) -> tuple[list[dict], str]:
    """Returns the steps in place of one, and the prefix that it puts before a text."""
    name = step['type']
    match step:
        case {'type': 'ByteLevel'} if kind == 'letters':
            prefix = 'unless' if step.get('add_prefix_space', True) is True else ''
            use_regex = step.get('use_regex', True) is True
            return [{'type': name, 'add_prefix_space': False, 'trim_offsets': False,
                     'use_regex': use_regex}], prefix  # fmt: skip
        case {'type': 'Metaspace'}:
            if step.get('replacement', SPACE) != SPACE:
                raise ValueError(f'Metaspace replacement {step["replacement"]!r}: expected "▁"')
            scheme = step.get('prepend_scheme', 'always')
            prefix = 'unless' if scheme != 'never' and step.get('add_prefix_space', True) else ''
            cut = step.get('split', True) is True
            return [{'type': name, 'replacement': SPACE, 'prepend_scheme': 'never',
                     'split': cut}], prefix  # fmt: skip
        case {'type': 'Split', 'pattern': {'Regex': str()} | {'String': str()} as pattern}:
            return [{'type': name, 'pattern': pattern, 'behavior': _behavior(step, repairs),
                     'invert': step.get('invert') is True}], ''  # fmt: skip
        case {'type': 'Digits'}:
            alone = step.get('individual_digits') is True
            return [{'type': name, 'individual_digits': alone}], ''
        case {'type': 'Punctuation'}:
            return [{'type': name, 'behavior': _behavior(step, repairs)}], ''
        case {'type': 'UnicodeScripts'}:
            return [{'type': name}], ''
        case {'type': 'Whitespace' | 'WhitespaceSplit' | 'BertPreTokenizer'}:
            repairs.append(f'pre-tokenizer {name}: removed blanks are kept')
            words = r'\w+|[^\w\s]+|\s+' if name == 'Whitespace' else ''
            return ([_split(words)] if words else []), ''
    raise ValueError(f'unknown pre-tokenizer {name!r}: it cannot be undone')


def _behavior(step: dict, repairs: list[str]) -> Any:
    """Returns the behavior of a Split or Punctuation: which part its matches join."""
    behavior = step.get('behavior', 'Isolated')
    if behavior != 'Removed':
        return behavior
    repairs.append(f'{step["type"]}: removed text is kept')
    return 'Isolated'


def _split(regex: str) -> dict:
    pattern = {'Regex': regex}
    return {'type': 'Split', 'pattern': pattern, 'behavior': 'Isolated', 'invert': False}


def _bert_split() -> list[dict]:
    alone = _MARKS + _IDEOGRAPHS
    return [_split(rf'[{alone}]|{SPACE}?[^{SPACE}\s{alone}]+|{SPACE}|\s')]


def is_space_rule(step: dict) -> bool:
    """Returns whether a normalizer replaces each space by `▁`."""
    return (
        step['type'] == 'Replace'
        and step.get('pattern') == {'String': ' '}
        and step.get('content') == SPACE
    )


def stands_alone(piece: str) -> bool:
    """Returns whether BERT makes a word of its own of this character."""
    return len(piece) == 1 and not _remove_marks().pre_tokenize_str(piece)


@functools.cache
def _remove_marks() -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(f'[{_MARKS}{_IDEOGRAPHS}]'), 'removed')
