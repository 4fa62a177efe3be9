"""Loads bundles for `decoding`: a model, the bytes of its ids, and its tokenizer."""

import dataclasses
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from decoding import model as model_lib
from decoding.drafter import Drafter
from decoding.model import LM
from decoding.sample import Sampler
from lm.checkpoints import bundle
from lm.model import params as params_lib
from lm.model.config import Config
from tokenization import loading
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A bundle, ready for decoding.

    Attributes:
      model: over the tokenizer's ids and, where it has one, a beginning-of-sequence id (BOS).
      config: of the model.
      tokenizer: encodes prompts and decodes ids.
    """

    model: LM
    config: Config
    tokenizer: Tokenizer

    def encode(self, text: bytes) -> list[int]:
        """Returns the ids of a prompt, after BOS where the model has one.

        An imported tokenizer adds a leading space where the original does.
        """
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            text = self.tokenizer.prefixed(text)
        start = [] if self.model.bos is None else [self.model.bos]
        return start + self.tokenizer.encode(text).tolist()

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes of each id of the model; BOS and special tokens have none.

        Raises:
          ValueError: the bytes of an id depend on its context.
        """
        known = self.tokenizer.vocab_size
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            written = list(self.tokenizer.tokens)  # special tokens have no bytes
        else:
            written = [self.tokenizer.token_bytes(i) for i in range(known)]
        return written + [b''] * (self.config.vocab_size - known)

    def ends(self) -> tuple[int, ...]:
        """Returns the ids that end a text: EOS (end of sequence), where the tokenizer has one."""
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return ()
        return tuple(i for role, i in self.tokenizer.roles if role == 'eos')


def load(path: epath.PathLike, mesh: Mesh) -> Loaded:
    """Returns the bundle at `path`, its parameters sharded over the mesh.

    Token tables are padded for training. The padding rows stand for no token and are removed here,
    so that they are never sampled.

    Raises:
      FileNotFoundError: there is no bundle at `path`.
      ValueError: the bundle is damaged, or its model has fewer ids than its tokenizer.
    """
    loaded = bundle.load(path, mesh)
    tokenizer = loading.load(loaded.tokenizer_path)
    symbols = max(tokenizer.vocab_size, -1 if loaded.bos is None else loaded.bos + 1)
    if symbols > loaded.config.vocab_size:
        raise ValueError(
            f'{path}: the model has {loaded.config.vocab_size} ids; its tokenizer and BOS need '
            f'{symbols}'
        )
    config = dataclasses.replace(loaded.config, vocab_size=symbols)
    tables = {name: table_VD[:symbols] for name, table_VD in loaded.params['tables'].items()}
    params = {**loaded.params, 'tables': tables}
    params = jax.device_put(params, params_lib.decoding_shardings(config, mesh))
    digest = tokenizer_digest(loaded.tokenizer_path)
    return Loaded(model_lib.transformer(config, params, digest, loaded.bos), config, tokenizer)


def tokenizer_digest(folder: epath.Path) -> str:
    """Returns a hex SHA-256 of a tokenizer's folder: names and contents of its files."""
    result = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        content = file.read_bytes()
        result.update(f'{file.name} {len(content)} '.encode() + content)
    return result.hexdigest()


def draft_sampler(sampler: Sampler, drafter: Drafter, greedy_temperature: float) -> Sampler:
    """Returns a drafter's sampler: the target's, except for a tree under a greedy target.

    Any draft distribution is exact. A greedy one, though, has one child per node, and makes a chain
    of a tree; so for a greedy target trees are drawn at `greedy_temperature`.
    """
    if float(sampler.temperature) > 0 or drafter.method.branching == 1:
        return sampler
    return dataclasses.replace(sampler, temperature=jnp.float32(greedy_temperature))
