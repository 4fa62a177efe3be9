"""Tokenizers of Hugging Face models, over bytes: same ids, same segmentation, and lossless.

    tokenizer = load_folder('Llama-2-7b')   # its tokenizer.json, or its tokenizer.model
    tokenizer.repairs                       # differences from the original, if any
    tokenizer.special                       # {'bos': 1, 'eos': 2, 'unk': 0}

`tokenization.huggingface.conversion` makes each kind of vocabulary lossless. Text that looks like a
special token is encoded as text; those ids are found only in `special`.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from lm.files import atomic
from tokenization.huggingface import conversion, sentencepiece, special_tokens
from tokenization.huggingface import engine as byte_engine
from tokenization.huggingface import json_file as tokenizer_json
from tokenization.tokenizer import check_ids, read_kind, write_kind

_SOURCE = 'tokenizer.json'
_GPT2_CLASSES = ('GPT2Tokenizer', 'RobertaTokenizer')
_PROBE = ' a  b\r\n\t1 23 ▁é 漢'.encode() + bytes(range(256))


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face `tokenizers` or SentencePiece, over bytes.

    `decode(encode(data)) == data` for any bytes. Two ids may have the same bytes (`A` and
    `<0x41>`). Special tokens and ids without a token have no bytes and decode to nothing.

    Attributes:
      source: text of a `tokenizer.json`.
      roles: pairs of a role ('bos', 'eos', 'unk' or 'pad') and its id.
    """

    source: str
    roles: tuple[tuple[str, int], ...]
    parsed: dataclasses.InitVar[tokenizer_json.TokenizerJson | None] = (
        None  # of `source`, if at hand
    )

    def __post_init__(self, parsed: tokenizer_json.TokenizerJson | None) -> None:
        if parsed is not None:
            vars(self)['_converted'] = conversion.convert(parsed)
        size = self.vocab_size  # converts `source`
        for role, i in self.roles:
            if role not in special_tokens.ROLES or not 0 <= i < size:
                raise ValueError(f'special token {role!r} has the id {i}: expected one of {size}')
        self.encode(_PROBE)  # raises now if a step changes the text

    @classmethod
    def from_json(
        cls, source: str, names: Mapping[str, str] | None = None
    ) -> 'HuggingFaceTokenizer':
        """Returns the tokenizer of a `tokenizer.json`.

        Args:
          source: the file's text.
          names: role -> spelling of the special token. Missing roles are taken from the model and
            from the post-processor (a token before a text is bos, one after it eos).

        Raises:
          ValueError: the file is damaged or of an unsupported type; names the field.
        """
        parsed = tokenizer_json.parse(source)
        roles = special_tokens.roles(parsed, names or {})
        return cls(source, tuple(sorted(roles.items())), parsed)

    @property
    def special(self) -> dict[str, int]:
        """Role -> id."""
        return dict(self.roles)

    @property
    def repairs(self) -> tuple[str, ...]:
        """Differences from the original tokenizer, a sentence each.

        For example, 'normalizer Lowercase left out: text is encoded as it stands'.
        """
        return self._converted.repairs

    @property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes of each id; empty for special tokens and ids without a token."""
        return self._converted.tokens

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the `added_bytes` at the end."""
        return len(self._converted.tokens)

    @property
    def added_bytes(self) -> int:
        """Number of ids at the end that were added for single bytes without a token."""
        return self._converted.added

    def within(self, rows: int) -> tuple['HuggingFaceTokenizer', tuple[str, ...]]:
        """Returns the tokenizer without special tokens from id `rows` on, and their spellings.

        For example, text models of Gemma 3 have no row for their tokenizer's last token, an image
        token. Tokens with a role stay, and so do tokens with bytes.
        """
        roles = {i for _, i in self.roles}
        document = json.loads(self.source)
        pieces = tokenizer_json.parse(self.source).pieces
        beyond = [
            token
            for token in document.get('added_tokens') or []
            if token.get('special') is True and token['id'] >= rows
            if token['id'] not in roles and token['content'] not in pieces
        ]
        if not beyond:
            return self, ()
        document['added_tokens'] = [t for t in document['added_tokens'] if t not in beyond]
        source = json.dumps(document, ensure_ascii=False)
        return HuggingFaceTokenizer(source, self.roles), tuple(t['content'] for t in beyond)

    def prefixed(self, data: bytes) -> bytes:
        """Returns a document with the space that the original puts before it, if any."""
        prefix = self._converted.prefix
        add = prefix == 'always' or (prefix == 'unless' and not data.startswith(b' '))
        return b' ' + data if add and data else data

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`."""
        return self.encode_batch([data])[0]

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each document, encoded on all cores."""
        results = byte_engine.encode(self._converted, documents)
        for document, ids in zip(documents, results):
            if self.decode(ids) != document:
                raise ValueError('a step before the model changes the text, which cannot be undone')
        return results

    def encode_piece(self, data: bytes) -> list[int]:
        """Returns the ids of `data` taken as one pretoken: the model sees it unsplit.

        A byte without a token in the original is `vocab_size` + byte, see
        `tokenization.transfer.decompose`.
        """
        ids = byte_engine.encode_piece(self._converted, data)
        first = self.vocab_size - self.added_bytes
        return [i if i < first else self.vocab_size + self.tokens[i][0] for i in ids]

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        tokens = self._converted.tokens
        return b''.join([tokens[i] for i in check_ids(ids, len(tokens)).tolist()])

    def decode_batch(self, documents: Sequence[np.ndarray]) -> list[bytes]:
        """Returns `decode` of each document's ids."""
        return [self.decode(ids) for ids in documents]

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; raises ValueError if it is out of range or has none."""
        data = self.decode(np.array([token]))
        if not data:
            raise ValueError(f'id {token} is a special token or has no token: it has no bytes')
        return data

    def save(self, path: epath.PathLike) -> None:
        """Writes the folder `path`, with the original `tokenizer.json` and the roles."""
        with atomic.new_folder(path) as folder:
            (folder / _SOURCE).write_bytes(self.source.encode())
            write_kind(folder, 'huggingface', vocab_size=self.vocab_size, special=self.special)

    @classmethod
    def load(cls, path: epath.PathLike) -> 'HuggingFaceTokenizer':
        """Returns the tokenizer saved in `path`.

        Raises:
          FileNotFoundError, ValueError: a file is missing or damaged; names it.
        """
        fields = read_kind(path, 'huggingface')
        special = fields.get('special')
        if not isinstance(special, dict) or not all(type(i) is int for i in special.values()):
            raise ValueError(f'{path}: tessera.json: "special" is not an object of roles and ids')
        text = special_tokens.read_text(epath.Path(path) / _SOURCE)
        try:
            loaded = cls(text, tuple(sorted(special.items())))
        except ValueError as error:
            raise ValueError(f'{path}/{_SOURCE}: {error}') from None
        if loaded.vocab_size != fields.get('vocab_size'):
            raise ValueError(
                f'{path}: {_SOURCE} gives {loaded.vocab_size} tokens, but tessera.json expects '
                f'{fields.get("vocab_size")}; the file is of another tokenizer'
            )
        return loaded

    @functools.cached_property
    def _converted(self) -> conversion.Converted:
        return conversion.convert(tokenizer_json.parse(self.source))

    def __getstate__(self) -> dict[str, object]:
        return {'source': self.source, 'roles': self.roles}

    def __repr__(self) -> str:
        return f'HuggingFaceTokenizer({self.vocab_size} tokens)'


def load_folder(path: epath.PathLike) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a Hugging Face model's folder.

    Reads the first that exists of `tokenizer.json`, SentencePiece's `tokenizer.model`, and GPT-2's
    `vocab.json` with `merges.txt`. The roles of special tokens are also read from
    `special_tokens_map.json` and `tokenizer_config.json`.

    Raises:
      FileNotFoundError: none of the three exists.
      ValueError: a file is damaged or unsupported; names it.
    """
    folder = epath.Path(path)
    names = special_tokens.read_names(folder)
    found = [n for n in (_SOURCE, 'tokenizer.model', 'vocab.json') if (folder / n).exists()]
    if not found:
        raise FileNotFoundError(f'{path}: no {_SOURCE}, tokenizer.model or vocab.json here')
    file = folder / found[0]
    if file.name == 'vocab.json':
        _check_gpt2(folder)
        return from_gpt2_files(file, folder / 'merges.txt', names)
    if file.name == _SOURCE:
        text = special_tokens.read_text(file)
    else:
        text, own = sentencepiece.read(file, special_tokens.read_added(folder))
        names = own | names
    try:
        return HuggingFaceTokenizer.from_json(text, names)
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None


def _check_gpt2(folder: epath.Path) -> None:
    """Raises ValueError for other tokenizers with GPT-2's files: Qwen's splits differently."""
    file = folder / 'tokenizer_config.json'
    kind = special_tokens.read_object(file).get('tokenizer_class') if file.exists() else None
    if kind is not None and str(kind).removesuffix('Fast') not in _GPT2_CLASSES:
        raise ValueError(
            f'{file}: tokenizer_class {kind!r}: vocab.json and merges.txt do not say how it splits '
            f'words; only {" and ".join(_GPT2_CLASSES)} are supported: save its tokenizer.json'
        )


def from_gpt2_files(
    vocabulary: epath.PathLike, merges: epath.PathLike, names: Mapping[str, str] | None = None
) -> HuggingFaceTokenizer:
    """Returns the tokenizer of GPT-2's two files: `encoder.json` and `vocab.bpe`.

    Args:
      vocabulary: JSON object, token in GPT-2's letters -> id; also known as `vocab.json`.
      merges: a line `left right` for each merge; also known as `merges.txt`.
      names: role -> spelling; by default `<|endoftext|>` is bos and eos.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged; names it.
    """
    pieces = special_tokens.read_object(epath.Path(vocabulary))
    lines = special_tokens.read_text(epath.Path(merges)).splitlines()
    end = '<|endoftext|>'
    names = names or ({'bos': end, 'eos': end} if end in pieces else {})
    special = sorted({name for name in names.values() if name in pieces})
    document = {
        'added_tokens': [{'id': pieces[s], 'content': s, 'special': True} for s in special],
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False},
        'model': {
            'type': 'BPE',
            'vocab': pieces,
            'merges': [line for line in lines if line and not line.startswith('#version')],
        },
    }
    try:
        return HuggingFaceTokenizer.from_json(json.dumps(document, ensure_ascii=False), names)
    except ValueError as error:
        raise ValueError(f'{vocabulary}, {merges}: {error}') from None
