"""A head that searches a vocabulary too large for dense logits.

target = searched.transformer(config, params, bos=0)
generate(target, prompts, ...)        # the tokens that dense logits would give
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from decoding import large_vocabulary, tree
from decoding import model as model_lib
from decoding.large_vocabulary import Found, Table
from decoding.model import LM
from decoding.sample import Sampler
from lm.model import tables
from lm.model.config import Config
from lm.model.contract import Memory, Model
from lm.model.cpu_layout import WeightsFirst


def transformer(
    config: Config, params: Any, tokenizer: str = '', bos: int | None = None,
    never: tuple[int, ...] = (), *, mesh: Mesh | None = None, top_k: int | None = None,
    chunk: int = large_vocabulary.CHUNK,
) -> LM:  # fmt: skip
    """Returns a transformer whose head searches its output table, a chunk of rows at a time.

    Draws come from the model's whole distribution, or from the `top_k` greatest, renormalised. Only
    the logits of one chunk exist at a time. Dense verifiers and all sampler settings but the
    temperature are refused.

    Args:
      config, params, tokenizer, bos, never: see `decoding.model.transformer`. The input table may
        be sharded by rows, too.
      mesh: shards the output rows; by default they stay as they are.
      top_k: number of tokens to draw among; None for all.
      chunk: see `large_vocabulary.Table`.

    Raises:
      ValueError: the model draws rows of its table per text.
    """
    if not config.learned_tables:
        raise ValueError('model: it draws its tables per text, and has no table of rows to search')
    lm = model_lib.transformer(config, params, tokenizer, bos, never)
    rows_VD = tables.output_table(params['tables'])
    if isinstance(rows_VD, WeightsFirst):  # `decoding.model.for_decoding`
        rows_VD = rows_VD.w_ED
    masked = never if bos is None else (bos, *never)
    table = Table(rows_VD, config.vocab_size, config.logit_softcap, masked, chunk)
    if mesh is not None:
        table = large_vocabulary.place(table, mesh)
    return lm._replace(model=_model(lm.model, top_k), params={**lm.params, 'search': table})


@functools.cache
def _model(inner: Model, top_k: int | None) -> Model:
    def head(params: Any, memory: Memory, h_BTD: jax.Array, **extra: Any) -> Search:
        return Search(params['search'], h_BTD, top_k)

    def layout(params: Any, **extra: Any) -> Any:
        rest = {name: part for name, part in params.items() if name != 'search'}
        return {**inner.layout(rest), 'search': params['search']}

    return inner._replace(head=head, layout=layout, dense=False)


@flax.struct.dataclass
class Search:
    """Scores found by searching a table (`decoding.scores.Scores`).

    Attributes:
      table: see `Table`.
      h_BTD: hidden states of the nodes.
      top_k: as for `transformer`.
    """

    table: Table
    h_BTD: jax.Array
    top_k: int | None = flax.struct.field(pytree_node=False)

    def distribution(self, sampler: Sampler, seen_BTV: jax.Array | None) -> 'Searched':
        """See `Scores`; the sampler's temperature alone applies."""
        b, t, d = self.h_BTD.shape
        temperature_BT = jnp.broadcast_to(jnp.asarray(sampler.temperature, jnp.float32), (b, t))
        found = large_vocabulary.search(
            self.table, self.h_BTD.reshape(b * t, d), self.top_k or 1, temperature_BT.reshape(-1)
        )
        split = jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]), found)
        return Searched(self.table, self.h_BTD, split, self.top_k)

    def top(self, k: int) -> jax.Array:
        """See `Scores`."""
        b, t, d = self.h_BTD.shape
        found = large_vocabulary.search(self.table, self.h_BTD.reshape(b * t, d), k)
        return found.tokens_BA.reshape(b, t, k)


@flax.struct.dataclass
class Searched:
    """A distribution given by a search's results (`decoding.scores.Distribution`).

    Attributes:
      table, h_BTD, top_k: see `Search`.
      found: the search's results, with leading axes `[B, T]`.
    """

    table: Table
    h_BTD: jax.Array
    found: Found
    top_k: int | None = flax.struct.field(pytree_node=False)

    def draw(self, node_B: jax.Array, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
        """See `Distribution`."""
        found = jax.tree.map(lambda x: tree.at(x, node_B), self.found)
        if self.top_k is not None:
            return large_vocabulary.draw_among(found, key_B, position_B)
        h_BD = tree.at(self.h_BTD, node_B)
        return large_vocabulary.draw(self.table, h_BD, found, key_B, position_B)

    def greatest(self, node_B: jax.Array) -> jax.Array:
        """See `Distribution`."""
        return tree.at(self.found.tokens_BA[..., 0], node_B)
