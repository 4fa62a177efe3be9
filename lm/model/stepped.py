"""The transformer as a model that can be stepped (`lm.model.contract`)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.attention.attention import platform
from lm.kernels.mask import Mask
from lm.model import cache as cache_lib
from lm.model import cpu_layout, tables, transformer
from lm.model import params as params_lib
from lm.model.attend import OverCache, Rows, cached
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.contract import NOTHING, Ask, Model, Nodes, Stepped
from lm.model.leaves import Params
from lm.model.transformer import MLP, gated_mlp


@flax.struct.dataclass
class Memory:
    """A transformer's memory of a batch of texts.

    Attributes:
      cache: rows of the kept nodes, then of the nodes stepped since.
      tables: drawn for these texts; None if they are learned.
      kept_B: int32, number of committed rows, kept whatever path is accepted.
    """

    cache: Cache
    tables: Params | None
    kept_B: jax.Array


def model(
    config: Config, never: tuple[int, ...] = (), mlp: MLP | None = gated_mlp,
    attend: OverCache = cached,
) -> Model:  # fmt: skip
    """Returns the transformer as a model that can be stepped.

    Equal arguments return the same functions, so nothing recompiles.

    Args:
      config: of the model.
      never: ids that are never drawn: BOS and padding rows.
      mlp: in place of the model's own (`transformer.blocks`).
      attend: in place of attention to every row that the mask allows (`lm.model.attend`).
    """
    return _model(config, never, mlp, attend)


def _build(config: Config, never: tuple[int, ...], mlp: MLP | None, attend: OverCache) -> Model:
    return Model(
        start=functools.partial(_start, config, mlp, attend),
        step=functools.partial(_step, config, mlp, attend),
        keep=_keep,
        head=functools.partial(_head, config, never),
        layout=functools.partial(_layout, config),
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        n_layers=config.n_layers,
        size=params_lib.count(config),
        head_size=config.vocab_size * config.d_model,
        layer_size=(params_lib.count_body(config) - config.d_model) // config.n_layers,
    )


# of positional arguments: a keyword one would not equal its position
_model: Callable[..., Model] = functools.cache(_build)


def _start(
    config: Config, mlp: MLP | None, attend: OverCache, params: Params, prompt: Nodes,
    kept_B: jax.Array, rows: int, key_B: jax.Array, *, ask: Ask = NOTHING, **extra: Any,
) -> Stepped:  # fmt: skip
    """See `contract.Start`."""
    b = prompt.position_BT.shape[0]
    drawn = tables.for_texts(params['tables'], config, key_B)
    empty = Memory(cache_lib.init(config, b, rows), drawn, jnp.zeros(b, jnp.int32))
    counted_BL = prompt.position_BT < kept_B[:, None]
    memory, seen = _step(config, mlp, attend, params, empty, prompt, ask=ask, counted_BL=counted_BL)
    return Stepped(_keep(memory, None, kept_B), seen)


def _step(
    config: Config, mlp: MLP | None, attend: OverCache, params: Params, memory: Memory,
    nodes: Nodes, *,
    layers: Sequence[int] | None = None, ask: Ask = NOTHING,
    counted_BL: jax.Array | None = None, **extra: Any,
) -> Stepped:  # fmt: skip
    """See `contract.Step`."""
    layers = range(nodes.start_layer, config.n_layers) if layers is None else layers
    position_BT = nodes.position_BT
    if memory.tables is not None:
        params = {**params, 'tables': memory.tables}
    if nodes.start_layer:
        cache = cache_lib.reveal(memory.cache, position_BT, layers)
    else:
        some = None if len(layers) == config.n_layers else layers
        cache = cache_lib.write_positions(memory.cache, position_BT, some)
    mask = Mask(position_BT, position_BT[:, None], ancestors=nodes.ancestors_BTW, nodes=nodes.span)
    look = attend(config, mask, cache, counted_BL)
    mass_NBKS = jnp.zeros(cache.position_NBKS.shape, jnp.float32) if ask.mass else None
    carry = Rows(cache.k_NBKSC, cache.v_NBKSC, mass_NBKS)
    seen, carry = transformer.run(
        params, config, nodes, look, carry, layers=layers, ask=ask, mlp=mlp
    )
    cache = dataclasses.replace(cache, k_NBKSC=carry.k_NBKSC, v_NBKSC=carry.v_NBKSC)
    return Stepped(
        dataclasses.replace(memory, cache=cache), seen._replace(mass_NBKS=carry.mass_NBKS)
    )


def _keep(
    memory: Memory, path_BP: jax.Array | None, count_B: jax.Array, *,
    since_B: jax.Array | int | None = None, **extra: Any,
) -> Memory:  # fmt: skip
    """See `contract.Keep`."""
    since_B = memory.kept_B if since_B is None else jnp.broadcast_to(since_B, count_B.shape)
    if path_BP is None:
        cache = cache_lib.truncate(memory.cache, since_B + count_B)
    else:
        cache = cache_lib.keep(memory.cache, since_B, path_BP, count_B)
    return dataclasses.replace(memory, cache=cache, kept_B=cache.length_B)


def _head(
    config: Config, never: tuple[int, ...], params: Params, memory: Memory | None,
    h_BTD: jax.Array, **extra: Any,
) -> jax.Array:  # fmt: skip
    """See `contract.Head`."""
    if memory is not None and memory.tables is not None:
        params = {**params, 'tables': memory.tables}
    logits_BTV = transformer.head(params, config, h_BTD)
    if never:
        logits_BTV = logits_BTV.at[..., np.asarray(never)].set(-jnp.inf)
    return logits_BTV


def _layout(config: Config, params: Params, **extra: Any) -> Params:
    """See `contract.Layout`: on one CPU device a copy (`lm.model.cpu_layout`)."""
    if platform() != 'cpu' or cpu_layout.is_prepared(params):
        return params
    if any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(params)):
        return params  # rows of joined matrices mix axes, so no mesh axis shards them
    return cpu_layout.prepare(params, config)
