"""Plain generation from a model whose vocabulary is too large to hold its logits."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decoding import arguments, large_vocabulary, verify
from decoding import generate as generate_lib
from decoding.drafter import Model
from decoding.large_vocabulary import Table
from decoding.sample import Sampler
from lm.model import cache as cache_lib
from lm.model import tables, transformer
from lm.model.config import Config
from lm.model.cpu_layout import WeightsFirst
from lm.model.params import Params


def output_table(model: Model, chunk: int = large_vocabulary.CHUNK) -> Table:
    """Returns the model's output rows; ids from BOS on are never drawn.

    Raises:
      ValueError: the model has no learned table.
    """
    config, learned = model.config, model.params['tables']
    if not learned:
        raise ValueError('model: it draws its tables per text, and has no table of rows to search')
    size = config.vocab_size if model.bos is None else model.bos
    rows_VD = tables.output_table(learned)
    if isinstance(rows_VD, WeightsFirst):  # `decoding.generate.ready`
        rows_VD = rows_VD.w_OI
    return Table(rows_VD, size, config.logit_softcap, chunk)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    key: jax.Array,
    max_new_tokens: int,
    table: Table | None = None,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
) -> np.ndarray:
    """Continues a batch of prompts by a fixed number of tokens, int32 `[B, max_new_tokens]`.

    Draws from the model's whole law, the tokens that `decoding.generate.generate` draws; or from
    the `top_k` greatest, renormalised. Memory for logits is that of a chunk of the table.

    Args:
      model: with learned tables; its input table may be sharded by rows, too.
      prompts, key: see `decoding.generate.generate`.
      max_new_tokens: for all rows; a value of its own is compiled.
      table: the output rows as `large_vocabulary.place` returns them; on one device, the model's.
      temperature: a number, or one for each row; 0 is greedy.
      top_k: draw among so many; None for all.

    Raises:
      ValueError: before anything is compiled; says which argument is wrong.
    """
    sampler = Sampler(temperature=temperature, top_k=top_k)
    limits = arguments.check(
        model, prompts, max_new_tokens, sampler, generate_lib.plain(), verify.target_only_walk, None
    )
    model = generate_lib.ready(model)
    table = output_table(model) if table is None else table
    keys = arguments.row_keys(key, len(prompts))
    longest = max(map(len, prompts))
    prompt_BL = np.zeros((len(prompts), generate_lib.bucket(longest)), np.int32)
    for row, prompt in zip(prompt_BL, prompts, strict=True):
        row[: len(prompt)] = prompt
    length_B = jnp.asarray(limits - max_new_tokens)
    temperature_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), len(prompts))
    tokens_LB = _loop(
        model.config, max_new_tokens, top_k, model.params, table, jnp.asarray(prompt_BL), length_B,
        keys, temperature_B,
    )  # fmt: skip
    return np.asarray(tokens_LB).T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loop(
    config: Config, steps: int, top_k: int | None, params: Params, table: Table,
    prompt_BL: jax.Array, length_B: jax.Array, key_B: jax.Array, temperature_B: jax.Array,
) -> jax.Array:  # fmt: skip
    """Reads the prompts, then draws `steps` tokens: int32 `[steps, B]`."""
    b, l = prompt_BL.shape

    def read(tokens_BL, positions_BL, cache):
        x_BLD = tables.embed(params['tables'], config, tokens_BL)
        h_BLD, cache = transformer.body(params['body'], config, x_BLD, positions_BL, cache=cache)
        assert cache is not None
        return h_BLD, cache

    cache = cache_lib.init(config, b, l + steps)
    _, cache = read(prompt_BL, jnp.broadcast_to(jnp.arange(l), (b, l)), cache)
    cache = cache_lib.truncate(cache, length_B - 1)

    def step(carry, _):
        cache, last_B, length_B = carry
        h_B1D, cache = read(last_B[:, None], length_B[:, None] - 1, cache)
        h_BD = h_B1D[:, 0]
        found = large_vocabulary.search(table, h_BD, top_k or 1, temperature_B)
        if top_k is None:
            token_B = large_vocabulary.draw(table, h_BD, found, key_B, length_B)
        else:
            token_B = large_vocabulary.draw_among(found, key_B, length_B)
        return (cache, token_B, length_B + 1), token_B

    last_B = jnp.take_along_axis(prompt_BL, length_B[:, None] - 1, axis=1)[:, 0]
    return jax.lax.scan(step, (cache, last_B, length_B), None, steps)[1]
