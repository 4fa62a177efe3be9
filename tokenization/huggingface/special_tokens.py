"""Special tokens by role, from the files of a Hugging Face model's folder."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from tokenization.huggingface.json_file import TokenizerJson

ROLES = ('bos', 'eos', 'unk', 'pad')
# BERT's names, used if a model has no others.
_OTHERWISE = {'bos': 'cls', 'eos': 'sep'}


def roles(source: TokenizerJson, names: Mapping[str, str]) -> dict[str, int]:
    """Returns the id of each role that the tokenizer has.

    Args:
      source: a checked `tokenizer.json`.
      names: role -> spelling, as from `read_names`. Missing roles are taken from the post-processor
        and the model. 'unk' and 'pad' are left out if the vocabulary lacks their spelling.

    Raises:
      ValueError: the vocabulary lacks the spelling of 'bos' or 'eos'.
    """
    ids = {**source.pieces, **{token.content: token.id for token in source.added}}
    before, after = source.template
    found: dict[str, int] = {}
    for role in ('bos', 'eos'):
        if role in names and names[role] not in ids:
            raise ValueError(f'{role}_token {names[role]!r} is not in the vocabulary')
    if before and before[0] in ids:
        found['bos'] = ids[before[0]]
    if after and after[-1] in ids:
        found['eos'] = ids[after[-1]]
    if source.unknown is not None:
        found['unk'] = source.unknown
    return found | {role: ids[name] for role, name in names.items() if name in ids}


def read_names(folder: epath.Path) -> dict[str, str]:
    """Returns role -> spelling, from `special_tokens_map.json` and `tokenizer_config.json`.

    The latter takes precedence.

    Raises:
      ValueError: a file is not an object of JSON, or a token is not a string; names it.
    """
    named: dict[str, str] = {}
    for file in (folder / 'special_tokens_map.json', folder / 'tokenizer_config.json'):
        fields = read_object(file) if file.exists() else {}
        for role in (*ROLES, *_OTHERWISE.values()):
            match fields.get(f'{role}_token'):
                case str(name) | {'content': str(name)}:
                    named[role] = name
                case None:
                    pass
                case other:
                    raise ValueError(f'{file}: {role}_token: {other!r}; expected a string')
    otherwise = {role: named[name] for role, name in _OTHERWISE.items() if name in named}
    return otherwise | {role: name for role, name in named.items() if role in ROLES}


def read_added(folder: epath.Path) -> dict[str, int]:
    """Returns spelling -> id of the tokens that a folder adds to its `tokenizer.model`.

    Raises:
      ValueError: `added_tokens.json` or `tokenizer_config.json` is damaged; names it.
    """
    added: dict[str, Any] = {}
    if (file := folder / 'added_tokens.json').exists():
        added = read_object(file)
    if (file := folder / 'tokenizer_config.json').exists():
        decoder = read_object(file).get('added_tokens_decoder') or {}
        for i, token in decoder.items() if isinstance(decoder, dict) else ():
            match token:
                case {'content': str(content)} if i.isascii() and i.isdigit() and len(i) < 10:
                    added[content] = int(i)
                case _:
                    raise ValueError(f'{file}: added_tokens_decoder: {i!r}: {str(token)[:80]}')
    for content, i in added.items():
        if type(i) is not int or not content or i < 0:
            raise ValueError(f'{folder}: added token {content!r} has the id {i!r}')
    return added


def read_object(file: epath.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; raises ValueError, naming it, for anything else."""
    try:
        fields = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file}: not JSON: {error}') from None
    if not isinstance(fields, dict):
        raise ValueError(f'{file}: expected an object')
    return fields


def read_text(file: epath.Path) -> str:
    """Returns a file's text; raises ValueError, naming it, if it is not UTF-8."""
    if not file.exists():
        raise FileNotFoundError(f'{file}: no such file')
    try:
        return file.read_bytes().decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{file}: not UTF-8: {error}') from None
