"""The training loop, which resumes after kills, its jitted step, and evaluation.

The loop knows a model only by its parameters, their declarations and a loss
(`lm.losses.loss.LossFn`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.attention import zigzag
from lm.checkpoints.checkpoint import Checkpoints
from lm.data.packing import DOCUMENTS, Shared
from lm.devices import mesh as mesh_lib
from lm.devices import preemption
from lm.losses.loss import LossFn, Sum
from lm.model.leaves import Leaves
from lm.training import divergence
from lm.training import metrics as metrics_lib
from lm.training import optimizer as optimizer_lib
from lm.training.metrics import ProgressLine, Writer
from lm.training.optimizer import MakeOptimizer, OptimizerConfig
from lm.training.state import TrainState, init_state
from lm.training.step_log import StepFailed, StepLog


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of training.

    Attributes:
      steps: total optimizer steps.
      batch_size: rows per batch, over all processes.
      length: tokens per row.
      optimizer: see `lm.training.optimizer.OptimizerConfig`.
      z_loss: weight of the squared log normaliser (PaLM, section 5).
      log_every: steps between metrics.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      explodes_at: the run stops at a loss above this many times its first one (see
        `lm.training.divergence`). A run that learns never reaches ten times the uniform
        distribution's loss.
      seed: for the initial parameters, the data order and the loss's randomness.
    """

    steps: int = 1000
    batch_size: int = 16
    length: int = 128
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    z_loss: float = 1e-4
    log_every: int = 20
    checkpoint_every: int = 500
    explodes_at: float = 10.0
    seed: int = 0

    def __post_init__(self):
        for name in ('steps', 'batch_size', 'log_every', 'checkpoint_every'):
            if getattr(self, name) < 1:
                raise ValueError(f'TrainConfig.{name}: {getattr(self, name)}; expected at least 1')
        if self.length < 2:
            raise ValueError(f'TrainConfig.length: {self.length}; expected at least 2')
        if not self.explodes_at > 1:
            raise ValueError(f'TrainConfig.explodes_at: {self.explodes_at}; expected more than 1')


def run(
    config: TrainConfig,
    init: Callable[[jax.Array], Any],
    loss: LossFn,
    batches: grain.IterDataset,
    folder: epath.PathLike,
    mesh: Mesh,
    label: str = 'train',
    frozen: tuple[Any, ...] = (),
    *,
    leaves: Leaves,
    make_optimizer: MakeOptimizer = optimizer_lib.make,
) -> TrainState:
    """Trains to `config.steps`, from the newest checkpoint in `folder` if there is one.

    Args:
      config: see `TrainConfig`.
      init: key -> params, already sharded over the mesh.
      loss: see `LossFn`.
      batches: an endless dataset of dicts of arrays, sharded by rows unless `Shared`.
      folder: gets `checkpoints/`, `metrics.jsonl` and TensorBoard events.
      mesh, label: the devices; the run's name in the progress line.
      frozen: arrays that the loss reads; neither updated nor checkpointed.
      leaves: declarations of the parameters (`lm.model.leaves`).
      make_optimizer: by default the one that `config.optimizer` names.

    Raises:
      ValueError: the folder's checkpoints belong to another model.
      OSError: no checkpoint in the folder is intact, or one cannot be written.
      FloatingPointError: the loss is not finite or explodes; names the step, its documents and the
        folder with the state before it.
      Preempted: SIGTERM arrived; the state after the current step is saved.
    """
    optimizer = make_optimizer(config.optimizer, config.steps, leaves)
    checkpoints, iterator = Checkpoints(epath.Path(folder) / 'checkpoints'), iter(batches)
    start, state = _start(config, init, optimizer, mesh, checkpoints, iterator)
    step_fn = _compiled(config, loss, optimizer, state, mesh)
    guard = divergence.start(_first_loss(folder), mesh)
    with (
        preemption.noticed() as notice,
        ProgressLine(label, config.steps, start) as progress,
        contextlib.closing(Writer(folder, start)) as writer,
        contextlib.closing(checkpoints),
    ):
        log = StepLog(config.log_every, config.steps, writer, progress)
        try:
            for step in range(start + 1, config.steps + 1):
                batch = next(iterator)
                with jax.set_mesh(mesh):
                    state, guard, metrics = step_fn(state, guard, put(batch, mesh), *frozen)
                log.add(step, metrics, batch)
                stop = notice.agreed() or step == config.steps
                if stop or step % config.checkpoint_every == 0:
                    log.finish()
                    checkpoints.save(step, state, iterator)
                if stop:
                    break
        except StepFailed as found:
            raise FloatingPointError(divergence.keep(found.failure, state, folder)) from None
    return state


def train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    batch: dict[str, jax.Array],
    *frozen: Any,
) -> tuple[TrainState, dict[str, Any]]:
    """Applies one update; the loss's key depends only on the seed and the step.

    Returns:
      The next state and the metrics: `loss`, `gradient_norm` and the loss's sums.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, sums), gradient = grad(state.params, batch, key, *frozen)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {'loss': value, 'gradient_norm': optax.tree.norm(gradient), **sums}
    return TrainState(state.step + 1, params, opt_state), metrics


def evaluate(
    loss: LossFn, params: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh,
    frozen: tuple[Any, ...] = (),
) -> dict[str, Sum]:  # fmt: skip
    """Returns the loss's sums over all batches, added in f64 on the host; `frozen` as for `run`."""
    step = jax.jit(lambda params, batch, key, *frozen: loss(params, batch, key, *frozen).sums)
    totals: dict[str, Sum] = {}
    pending: dict[str, Sum] = {}
    with jax.set_mesh(mesh):
        for i, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(0), i)
            sums = step(params, put(batch, mesh), key, *frozen)
            # read after dispatching the next batch, so that devices never wait
            totals, pending = _add(totals, pending), sums
    return _add(totals, pending)


def put(batch: Mapping[str, np.ndarray | Shared], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a host batch as arrays sharded over the mesh; each process passes its own rows.

    Rows are sharded over `data`. With devices along `sequence`, each row is in zigzag order
    (`lm.attention.zigzag`). `Shared` arrays are replicated; `documents` is dropped.

    Raises:
      ValueError: the rows do not divide into two chunks per device of `sequence`.
    """
    whole, devices = NamedSharding(mesh, PartitionSpec()), mesh.shape['sequence']
    place = jax.make_array_from_process_local_data

    def rows(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return place(
            mesh_lib.batch_sharding(mesh, x.ndim), zigzag.apply(x, devices) if x.ndim > 1 else x
        )

    return {
        name: place(whole, x.array) if isinstance(x, Shared) else rows(x)
        for name, x in batch.items()
        if name != DOCUMENTS
    }


def _start(
    config: TrainConfig, init, optimizer, mesh: Mesh, checkpoints: Checkpoints, iterator: Any
) -> tuple[int, TrainState]:
    """Returns the step and the state of the newest checkpoint, or 0 and the initial state."""
    state = init_state(init(jax.random.key(config.seed)), optimizer, mesh)
    if not checkpoints.steps():
        return 0, state
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    del state  # two states may not fit in memory
    return checkpoints.restore(like, iterator)


def _compiled(
    config: TrainConfig, loss: LossFn, optimizer, state: TrainState, mesh: Mesh
) -> Callable:
    """Returns the jitted step; the state is donated, and the learning rate reported."""
    rate = optimizer_lib.schedule(config.optimizer, config.steps)

    def step(state, batch, *frozen):
        after, metrics = train_step(loss, optimizer, config.seed, state, batch, *frozen)
        return after, {**metrics, 'learning_rate': rate(state.step)}

    # fixed shardings of the state: otherwise some leaves move, and the second step recompiles
    where = jax.tree.map(lambda x: x.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        divergence.guarded(step, config.explodes_at),
        donate_argnums=0,
        out_shardings=(where, everywhere, None),
    )


def _add(totals: dict[str, Sum], sums: dict[str, Sum]) -> dict[str, Sum]:
    """Returns the totals with a batch's sums added, if there are any."""
    zero = Sum(0.0, 0.0)
    before = {name: totals.get(name, zero) for name in sums}
    added = {
        name: Sum(before[name].total + float(x.total), before[name].count + float(x.count))
        for name, x in sums.items()
    }
    return {**totals, **added}


def _first_loss(folder: epath.PathLike) -> float:
    """Returns the loss of a run's first step, or infinity before it; the same on all hosts."""
    records = metrics_lib.read_jsonl(epath.Path(folder) / 'metrics.jsonl')
    first = records[0].get('loss', math.inf) if records else math.inf
    if jax.process_count() > 1:
        first = multihost_utils.broadcast_one_to_all(np.float32(first))
    return float(first)
