"""Deciphers substitution ciphers from the hidden states of a frozen model.

Each text is enciphered with a random permutation of the alphabet. The frozen model reads the
ciphertext; a probe, a two-layer network trained on other texts and keys, predicts the plain symbol
at each position from the hidden state (Huang et al. 2023, section on deciphering).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.language_model import Fitted
from experiments.lexinvariant import domains, models
from experiments.lexinvariant.config import Config
from lm.devices import processes
from lm.model.params import Params
from lm.training.metrics import ProgressLine

_RATE = 1e-3
_TRAINING_PIECES = 20_000
_AT_ONCE = 32


class Reading(NamedTuple):
    """Enciphered texts and the probe's predictions.

    Attributes:
      plain_RL, cipher_RL: ids of the plaintexts and ciphertexts.
      logprob_RLV: the probe's log-probabilities of the plain symbol at each position.
    """

    plain_RL: np.ndarray
    cipher_RL: np.ndarray
    logprob_RLV: np.ndarray


def encipher(plain_RL: np.ndarray, symbols: int, seed: int) -> np.ndarray:
    """Returns the texts, each enciphered with its own random permutation of the alphabet."""
    random = np.random.default_rng(seed)
    alphabets_RV = np.tile(np.arange(symbols, dtype=np.int32), (len(plain_RL), 1))
    keys_RV = random.permuted(alphabets_RV, axis=1)
    return np.take_along_axis(keys_RV, plain_RL, axis=1)


def read(config: Config, fitted: Fitted, text: models.Text, label: str) -> Reading:
    """Trains the probe on the frozen model and applies it to held-out ciphers."""
    length, symbols = config.train.length, text.tokenizer.vocab_size
    known = domains.chunks(text.train, length, _TRAINING_PIECES)
    every = np.linspace(0, len(text.test_RL) - 1, min(config.ciphers, len(text.test_RL)))
    unknown = text.test_RL[every.astype(int), :length]
    cipher = encipher(unknown, symbols, seed=1)
    states = _states(fitted)
    probe = _train(config, states, fitted.params, known, symbols, label)
    answer = jax.jit(lambda p, h: jax.nn.log_softmax(apply(p, h)))
    parts = []
    for start in range(0, len(cipher), _AT_ONCE):
        rows = cipher[start : start + _AT_ONCE]
        h = states(fitted.params, rows, jax.random.fold_in(jax.random.key(2), start))
        parts.append(processes.whole(answer(probe, h)))
    return Reading(unknown, cipher, np.concatenate(parts))


def _states(fitted: Fitted):
    return jax.jit(lambda params, rows_BL, key: models.hidden(params, fitted.config, rows_BL, key))


def apply(probe: Params, h_BLD: jax.Array) -> jax.Array:
    """Returns logits `[B, L, V]` of plain symbols."""
    x = jax.nn.relu(h_BLD.astype(jnp.float32) @ probe['w_DF'] + probe['b_F'])
    return x @ probe['w_FV'] + probe['b_V']


def _train(config: Config, states, params: Params, known_RL: np.ndarray, symbols: int, label: str):
    d, f = config.model.d_model, config.probe_hidden
    keys = jax.random.split(jax.random.key(3))
    probe = {
        'w_DF': jax.random.normal(keys[0], (d, f)) * d**-0.5, 'b_F': jnp.zeros(f),
        'w_FV': jax.random.normal(keys[1], (f, symbols)) * f**-0.5, 'b_V': jnp.zeros(symbols),
    }  # fmt: skip
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, config.probe_steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(probe, state, h_BLD, plain_BL):
        def loss(probe):
            logits = apply(probe, h_BLD)
            return optax.softmax_cross_entropy_with_integer_labels(logits, plain_BL).mean()

        value, gradient = jax.value_and_grad(loss)(probe)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(probe, updates), state, value

    state = optimizer.init(probe)
    random = np.random.default_rng(4)
    with ProgressLine(f'probe of {label}', config.probe_steps) as progress:
        for i in range(config.probe_steps):
            plain = known_RL[random.integers(0, len(known_RL), config.probe_batch)]
            cipher = encipher(plain, symbols, seed=5 + i)
            h = states(params, cipher, jax.random.fold_in(jax.random.key(6), i))
            probe, state, value = step(probe, state, h, plain)
            progress.update(i + 1, f'loss {float(value):.3f}')
    return probe


def accuracy(reading: Reading, context: int) -> float:
    """Returns the probe's accuracy in the second half of a context."""
    half = slice(context // 2, context)
    guess = reading.logprob_RLV[:, half].argmax(-1)
    return float((guess == reading.plain_RL[:, half]).mean())


def recovered_keys(reading: Reading, context: int) -> list[dict[int, int]]:
    """Returns each text's key: the plain symbol inferred for each of its first cipher symbols.

    The first `context` positions are used; those of a symbol vote with their log-probabilities.
    """
    keys = []
    for cipher_L, logprob_LV in zip(reading.cipher_RL[:, :context], reading.logprob_RLV):
        votes: dict[int, np.ndarray] = {}
        for symbol, logprob_V in zip(cipher_L.tolist(), logprob_LV):
            votes[symbol] = votes.get(symbol, 0) + logprob_V
        keys.append({symbol: int(vote.argmax()) for symbol, vote in votes.items()})
    return keys


def key_recovery(
    keys: Sequence[dict[int, int]], reading: Reading, context: int
) -> tuple[float, float]:
    """Returns the fraction of recovered symbols in a context, averaged over texts, and the fraction
    of texts whose key is recovered completely."""
    shares = []
    for key, plain_L, cipher_L in zip(keys, reading.plain_RL, reading.cipher_RL):
        truth = dict(zip(cipher_L[:context].tolist(), plain_L[:context].tolist()))
        shares.append(np.mean([key[symbol] == truth[symbol] for symbol in truth]))
    return float(np.mean(shares)), float(np.mean(np.equal(shares, 1)))


def text_accuracy(keys: Sequence[dict[int, int]], reading: Reading, context: int) -> float:
    """Returns the fraction of the contexts' characters that the keys decipher correctly."""
    right = [
        np.mean([key[c] == p for c, p in zip(cipher_L[:context].tolist(), plain_L.tolist())])
        for key, plain_L, cipher_L in zip(keys, reading.plain_RL, reading.cipher_RL)
    ]
    return float(np.mean(right))
