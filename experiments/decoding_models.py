"""Bundles as what `decoding` wants: a model, what its ids write, and which tokenizer it has."""

import dataclasses
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from decoding.drafter import Drafter, Model
from decoding.sample import Sampler
from lm.checkpoints import bundle
from lm.model import params as params_lib
from tokenization import loading
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A bundle, ready to decode with.

    Attributes:
      model: its symbols are the tokenizer's, and perhaps BOS.
      tokenizer: its tokenizer.
    """

    model: Model
    tokenizer: Tokenizer

    def encode(self, text: bytes) -> list[int]:
        """Returns the ids of a document's beginning, BOS in front where the model has one.

        An imported tokenizer puts a space before it where its original does.
        """
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            text = self.tokenizer.prefixed(text)
        start = [] if self.model.bos is None else [self.model.bos]
        return start + self.tokenizer.encode(text).tolist()

    def token_bytes(self) -> list[bytes]:
        """Returns what each id of the model writes; BOS and special tokens write nothing.

        Raises:
          ValueError: an id of the tokenizer does not stand for fixed bytes by itself.
        """
        known = self.tokenizer.vocab_size
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            written = list(self.tokenizer.tokens)  # special ones write nothing
        else:
            written = [self.tokenizer.token_bytes(i) for i in range(known)]
        return written + [b''] * (self.model.config.vocab_size - known)

    def ends(self) -> tuple[int, ...]:
        """Returns the ids that end a text by themselves: EOS, where the tokenizer has one."""
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return ()
        return tuple(i for role, i in self.tokenizer.roles if role == 'eos')


def load(path: epath.PathLike, mesh: Mesh) -> Loaded:
    """Returns the bundle at `path`, its parameters sharded over the mesh.

    Tables of tokens are padded for training. The rows behind the last symbol stand for nothing,
    and are cut off here, so that they are not drawn.

    Raises:
      FileNotFoundError: no bundle at `path`.
      ValueError: it is damaged, or its model has fewer symbols than its tokenizer.
    """
    loaded = bundle.load(path, mesh)
    tokenizer = loading.load(loaded.tokenizer_path)
    symbols = max(tokenizer.vocab_size, -1 if loaded.bos is None else loaded.bos + 1)
    if symbols > loaded.config.vocab_size:
        raise ValueError(
            f'{path}: the model has {loaded.config.vocab_size} symbols, its tokenizer and BOS '
            f'need {symbols}'
        )
    config = dataclasses.replace(loaded.config, vocab_size=symbols)
    tables = {name: table_VD[:symbols] for name, table_VD in loaded.params['tables'].items()}
    params = {**loaded.params, 'tables': tables}
    params = jax.device_put(params, params_lib.decoding_shardings(config, mesh))
    digest = tokenizer_digest(loaded.tokenizer_path)
    return Loaded(Model(config, params, digest, loaded.bos), tokenizer)


def tokenizer_digest(folder: epath.Path) -> str:
    """Returns a hex SHA-256 of the files of a tokenizer's folder, their names included."""
    result = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        content = file.read_bytes()
        result.update(f'{file.name} {len(content)} '.encode() + content)
    return result.hexdigest()


def draft_sampler(sampler: Sampler, drafter: Drafter, greedy_temperature: float) -> Sampler:
    """Returns what a drafter's law is made with: the target's sampler, as far as it makes a tree.

    Any draft law is exact. A greedy one, though, has one child per node, and makes a chain of a
    tree; so where the target is greedy, trees are drawn at `greedy_temperature`.
    """
    if float(sampler.temperature) > 0 or drafter.branching == 1:
        return sampler
    return dataclasses.replace(sampler, temperature=jnp.float32(greedy_temperature))
