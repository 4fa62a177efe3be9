"""The compared models: the same body and training loop, with different token tables."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments import language_model, resume
from experiments.corpora import Corpus
from experiments.language_model import Fitted
from experiments.lexinvariant import domains as domains_lib
from experiments.lexinvariant.config import Config
from lm.attention import zigzag
from lm.checkpoints import bundle
from lm.data.documents import Documents
from lm.devices import processes
from lm.losses import next_token as losses
from lm.model.config import Config as ModelConfig
from lm.model.config import Lexinvariant
from lm.model.leaves import Params
from lm.training import train
from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies.alphabet import AlphabetTokenizer
from tokenization.vocabularies.bpe import BPETokenizer

CHARACTERS, BPE = 'characters', 'bpe'
STANDARD, LEXINVARIANT = 0.0, 1.0  # probability p that a row is random


class Name(NamedTuple):
    """Identifies a model: its tokenizer, training domain, and the probability of random rows."""

    tokenizer: str
    domain: str
    probability: float

    @property
    def folder(self) -> str:
        """Name of the model's folder."""
        return f'{self.tokenizer}_{self.domain}_{self.probability:g}'


class Text(NamedTuple):
    """The text of one domain, encoded with one tokenizer.

    Attributes:
      tokenizer: see `Tokenizer`.
      train: documents.
      test_RL: pieces of held-out documents, one id longer than the model's input. They begin
        anywhere in a document, as most training rows do, and therefore have no BOS.
    """

    tokenizer: Tokenizer
    train: Documents
    test_RL: np.ndarray


def wanted(config: Config) -> list[Name]:
    """Returns the models to train: a pair for each text, and the mixed models on prose."""
    pairs = [(CHARACTERS, 'prose'), (CHARACTERS, 'code'), *((BPE, d) for d in config.bpe_domains)]
    both = [Name(*pair, p) for pair in pairs for p in (STANDARD, LEXINVARIANT)]
    return both + [Name(CHARACTERS, 'prose', p) for p in config.probabilities]


def texts(
    config: Config, domains: dict[str, Corpus], names: Sequence[Name], out: epath.Path
) -> dict[tuple[str, str], Text]:
    """Returns each (domain, tokenizer) that a model needs, encoded."""
    found = {}
    for tokenizer_name, domain in dict.fromkeys((n.tokenizer, n.domain) for n in names):
        corpus = domains[domain]
        tokenizer: Tokenizer = AlphabetTokenizer()
        if tokenizer_name == BPE:
            train_bpe = lambda train=corpus.train: BPETokenizer.train(train, config.bpe_size)  # noqa: E731
            tokenizer = resume.tokenizer_once(out / 'tokenizers' / domain, train_bpe)
        encoded = resume.encoded_once(
            tokenizer, corpus.train, out / 'encoded' / f'{tokenizer_name}_{domain}', 'encoding'
        )
        length = config.train.length + 1
        domains_lib.chunks(encoded, length, 1)  # fails early if no text is long enough for a probe
        ids = tokenizer.encode_batch(corpus.test)
        pieces_RL = domains_lib.chunks(ids, length, max(config.valid_bytes // length, 1))
        found[tokenizer_name, domain] = Text(tokenizer, encoded, pieces_RL)
    return found


def model_config(config: Config, probability: float) -> ModelConfig:
    """Returns the config of a model whose rows are random with this probability."""
    drawn = Lexinvariant(config.kind, probability) if probability else None
    return dataclasses.replace(config.model, lexinvariant=drawn)


def fit(config: Config, name: Name, text: Text, out: epath.Path, mesh: Mesh) -> Fitted:
    """Trains a model (resuming if possible) and saves a bundle, or loads the saved one."""
    path, size = out / 'bundles' / name.folder, text.tokenizer.vocab_size
    if (path / 'config.json').exists():
        loaded = bundle.load(path, mesh)
        return Fitted(loaded.config, loaded.params, 0.0)
    model = model_config(config, name.probability)
    folder = out / 'training' / name.folder
    fitted = language_model.fit(model, config.train, text.train, size, folder, mesh, name.folder)
    bundle.save(path, fitted.config, fitted.params, text.tokenizer, size)
    return fitted


def at_rest(fitted: Fitted) -> Fitted:
    """Returns a mixed model with its learned rows only, as dropout is disabled at evaluation."""
    drawn = fitted.config.lexinvariant
    if drawn is None or not drawn.partial:
        return fitted
    return fitted._replace(config=dataclasses.replace(fitted.config, lexinvariant=None))


def hidden(params: Params, config: ModelConfig, tokens_BL: jax.Array, key: jax.Array) -> jax.Array:
    """Returns hidden states `[B, L, D]`, one text per row; lexinvariant tables are drawn here."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    batch = {
        'tokens': tokens_BL, 'positions': positions_BL, 'segments': jnp.ones_like(positions_BL)
    }  # fmt: skip
    return losses.hidden(params, config, batch, key)


def nats_by_position(fitted: Fitted, text: Text, batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns the mean loss at each position of held-out texts, in nats, f64 `[L]`.

    At position 0 the context is one id. New tables are drawn for each batch.
    """
    n, length = text.test_RL.shape[0], text.test_RL.shape[1] - 1

    @jax.jit
    def total(params, batch, key):
        nats_BL = losses.token_losses(params, fitted.config, batch, key).nats
        return (nats_BL * batch['weights']).sum(0)

    sum_L = np.zeros(length)
    with jax.set_mesh(mesh):
        for start in range(0, n, batch_size):
            rows = np.arange(start, start + batch_size)
            piece_BL = text.test_RL[np.minimum(rows, n - 1)]
            target_BL = piece_BL[:, 1:]
            weight_BL = np.broadcast_to((rows < n)[:, None], target_BL.shape)
            batch = {
                'tokens': piece_BL[:, :-1],
                'targets': target_BL,
                'segments': np.ones_like(target_BL),
                'positions': np.broadcast_to(np.arange(length, dtype=np.int32), target_BL.shape),
                'weights': weight_BL.astype(np.float32),
            }
            key = jax.random.fold_in(jax.random.key(1), start)
            nats_L = total(fitted.params, train.put(language_model.own_rows(batch), mesh), key)
            # `train.put` put positions in zigzag order
            nats_L = zigzag.undo(processes.whole(nats_L), mesh.shape['sequence'], axis=0)
            sum_L += nats_L.astype(np.float64)
    return sum_L / n


def bytes_by_position(text: Text) -> np.ndarray:
    """Returns the mean number of bytes per token at each position of held-out texts, f64 `[L]`."""
    tokenizer = text.tokenizer
    size_V = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    return size_V[text.test_RL[:, 1:]].mean(0)
