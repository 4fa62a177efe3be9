"""Trains and evaluates one language model on documents of ids; shared by all experiments."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lm.attention import zigzag
from lm.data import batches as batches_lib
from lm.data.documents import Documents
from lm.losses import next_token as losses
from lm.losses.loss import LossFn
from lm.model import params, transformer
from lm.model.config import Config
from lm.model.leaves import Params
from lm.training import train
from lm.training.train import TrainConfig

# Token tables are padded to a multiple of this, to divide over devices and to fill tiles.
_TABLE_MULTIPLE = 128


class Fitted(NamedTuple):
    """A trained model.

    Attributes:
      config: the model's config, with its vocabulary size.
      params: the model's parameters.
      seconds: wall-clock seconds of training in this process.
    """

    config: Config
    params: Params
    seconds: float


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """Returns the config with a vocabulary of the tokenizer's ids and an input-only BOS."""
    if config.lexinvariant is not None:
        # a lexinvariant table is not padded: its padding rows would keep probability mass
        return dataclasses.replace(config, vocab_size=vocab_size + 1)
    padded = -(-(vocab_size + 1) // _TABLE_MULTIPLE) * _TABLE_MULTIPLE
    return dataclasses.replace(config, vocab_size=padded)


def loss_fn(config: Config, z_loss: float) -> LossFn:
    """Returns the next-token loss of a model, in the form that `lm.training.train` expects."""

    def loss(weights: Params, batch: Any, key: jax.Array, **extra: Any):
        del extra
        return losses.next_token_loss(weights, config, batch, z_loss, key)

    return loss


def check(model: Config, config: TrainConfig, mesh: Mesh, name: str) -> None:
    """Raises ValueError unless the run named `name` fits its model and the devices."""
    if config.length > model.max_length:
        raise ValueError(
            f'{name}.length {config.length}: the model has {model.max_length} positions'
        )
    check_rows(config, mesh, name)
    if mesh.shape['sequence'] > 1:
        zigzag.check(config.length, mesh.shape['sequence'], f'{name}.length')


def check_rows(config: TrainConfig, mesh: Mesh, name: str) -> None:
    """Raises ValueError unless the batch of the run named `name` divides over the devices."""
    if mesh.shape['data'] % jax.process_count():
        raise ValueError(
            f'data={mesh.shape["data"]}: expected a multiple of {jax.process_count()} processes'
        )
    if config.batch_size % mesh.shape['data']:
        raise ValueError(
            f'{name}.batch_size {config.batch_size}: expected a multiple of the '
            f'data={mesh.shape["data"]} devices'
        )


def fit(
    model: Config,
    config: TrainConfig,
    documents: Documents,
    vocab_size: int,
    folder: epath.PathLike,
    mesh: Mesh,
    label: str,
) -> Fitted:
    """Trains a model on documents of ids; resumes from the checkpoints in `folder`.

    Args:
      model: the model's config; its vocabulary size is set here.
      config: the training config; `batch_size` counts rows over all processes.
      documents: arrays of ids below `vocab_size`.
      vocab_size: the tokenizer's vocabulary size; BOS is the next id.
      folder: where checkpoints and metrics are saved.
      mesh: the devices.
      label: name of the run in the progress line.

    Raises:
      ValueError: as `check` does.
    """
    check(model, config, mesh, label)
    model = with_vocabulary(model, vocab_size)
    batches = training(config, documents, vocab_size)
    init = jax.jit(
        functools.partial(params.init, model), out_shardings=params.shardings(model, mesh)
    )
    begin = time.monotonic()
    state = train.run(
        config, init, loss_fn(model, config.z_loss), batches, folder, mesh, label,
        leaves=params.leaves(model),
    )  # fmt: skip
    return Fitted(model, state.params, time.monotonic() - begin)


def training(config: TrainConfig, documents: Documents, vocab_size: int) -> grain.IterDataset:
    """Returns this process's rows of each batch, from documents that no other process reads."""
    return batches_lib.training_batches(
        documents, None, batch_size=config.batch_size // jax.process_count(),
        length=config.length, bos=vocab_size, seed=config.seed,
        shard_index=jax.process_index(), shard_count=jax.process_count(),
    )  # fmt: skip


def own_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns this process's rows of a global batch, as `train.put` expects them."""
    index, count = jax.process_index(), jax.process_count()
    own = slice(index * len(batch['tokens']) // count, (index + 1) * len(batch['tokens']) // count)
    return {name: x[own] for name, x in batch.items()}


def evaluation(
    documents: Documents, vocab_size: int, batch_size: int, length: int
) -> grain.IterDataset:
    """Returns one pass over documents of ids; each id is a target exactly once."""
    return batches_lib.evaluation_batches(
        documents, None, batch_size=batch_size // jax.process_count(), length=length,
        bos=vocab_size, shard_index=jax.process_index(), shard_count=jax.process_count(),
    )  # fmt: skip


def nats(fitted: Fitted, batches: Any, mesh: Mesh) -> float:
    """Returns the loss summed over all targets, in nats."""
    sums = train.evaluate(loss_fn(fitted.config, 0.0), fitted.params, batches, mesh)
    return sums['nats_per_token'].total


def bit_losses(
    weights: Params, config: Config, batch: dict[str, jax.Array], bits: int
) -> tuple[jax.Array, jax.Array]:
    """Splits each token's loss into the losses of the bits of its id, highest bit first.

    `-log2 p(token)` is the sum over i of `-log2 p(bit i | bits before it)`.

    Args:
      weights: the model's parameters.
      config: the model's config.
      batch: see `lm.data.batches`.
      bits: bits per id; probabilities are normalised over the first `2**bits` ids.

    Returns:
      Two f32 arrays `[bits]`: the loss in bits, summed over targets, and the number of targets
      whose bit the model predicts correctly.
    """
    logits = transformer.forward(
        weights, config, batch['tokens'], batch['positions'], batch['segments']
    )
    level, loss, right = logits[..., : 1 << bits], [], []
    for bit in range(bits):  # from the last bit to the first; each step halves the number of ids
        pairs = level.reshape(*level.shape[:-1], -1, 2)
        prefix = batch['targets'] >> (bit + 1)
        pair = jnp.take_along_axis(pairs, prefix[..., None, None], axis=-2)[..., 0, :]
        log_p = jax.nn.log_softmax(pair, axis=-1)
        value = (batch['targets'] >> bit) & 1
        chosen = jnp.take_along_axis(log_p, value[..., None], axis=-1)[..., 0]
        loss.append(-(chosen * batch['weights']).sum() / jnp.log(2.0))
        right.append(((chosen > jnp.log(0.5)) * batch['weights']).sum())
        level = jax.nn.logsumexp(pairs, axis=-1)
    return jnp.stack(loss[::-1]), jnp.stack(right[::-1])
