"""In-context reasoning tasks over randomly drawn symbols, so that memorised facts do not help.

    look-up        k:W,R:a,9:c,R:      ->  a
    permutation    aT4>4aT;Kp2>2Kp;x8L>  ->  Lx8

(Huang et al. 2023. As there, models see no such tasks in training.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.language_model import Fitted
from experiments.lexinvariant.config import Config
from lm.devices import processes
from lm.model import lexinvariant, tables, transformer

_POOL = np.array([*range(ord('0'), ord('9') + 1), *range(ord('A'), ord('Z') + 1),
                  *range(ord('a'), ord('z') + 1)])  # fmt: skip
LOOKUP, PERMUTATION = 'lookup', 'permutation'
_AT_ONCE = 64


class Task(NamedTuple):
    """Queries and answers.

    Attributes:
      tokens_BL: ids of the queries, including the answers.
      answers: columns of the answer's symbols; each is predicted from the previous column.
      chance: accuracy of a random guess among the possible answers in the task.
    """

    tokens_BL: np.ndarray
    answers: range
    chance: float


def make(config: Config) -> dict[str, Task]:
    """Returns both tasks."""
    random = np.random.default_rng(0)
    return {
        LOOKUP: Task(
            np.array([_lookup(config, random) for _ in range(config.queries)]),
            range(4 * config.pairs + 2, 4 * config.pairs + 3), 1 / config.pairs,
        ),
        PERMUTATION: Task(
            np.array([_permutation(config, random) for _ in range(config.queries)]),
            range((2 * config.symbols + 2) * config.examples + config.symbols + 1,
                  (2 * config.symbols + 2) * (config.examples + 1) - 1),
            1 / config.symbols,
        ),
    }  # fmt: skip


def _lookup(config: Config, random: np.random.Generator) -> list[int]:
    names, values = random.choice(_POOL, (2, config.pairs), replace=False)
    asked = random.integers(config.pairs)
    text: list[int] = []
    for name, value in [*zip(names, values), (names[asked], values[asked])]:
        text += [name, ord(':'), value, ord(',')]
    return text[:-1]


def _permutation(config: Config, random: np.random.Generator) -> list[int]:
    order = random.permutation(config.symbols)
    while (order == np.arange(config.symbols)).all():
        order = random.permutation(config.symbols)
    text: list[int] = []
    for _ in range(config.examples + 1):
        symbols = random.choice(_POOL, config.symbols, replace=False)
        text += [*symbols, ord('>'), *symbols[order], ord(';')]
    return text[:-1]


def accuracy(fitted: Fitted, task: Task) -> float:
    """Returns the fraction of answer symbols to which the model gives the highest probability."""
    config = fitted.config

    @jax.jit
    def best(params, tokens_BL, key):
        key_B = lexinvariant.sequence_keys(key, len(tokens_BL))
        own = tables.for_texts(params['tables'], config, key_B)
        here = params if own is None else {**params, 'tables': own}
        logits = transformer.forward(here, config, tokens_BL[:, :-1])
        return jnp.argmax(logits[:, task.answers.start - 1 :], axis=-1)

    right = 0.0
    for start in range(0, len(task.tokens_BL), _AT_ONCE):
        rows = jnp.asarray(task.tokens_BL[start : start + _AT_ONCE], jnp.int32)
        found = best(fitted.params, rows, jax.random.fold_in(jax.random.key(7), start))
        asked = np.asarray(rows)[:, task.answers.start : task.answers.stop]
        right += float((processes.whole(found) == asked).mean(1).sum())
    return right / len(task.tokens_BL)
