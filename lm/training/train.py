"""One jitted training step, and the loop that drives it through kills and resumes."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
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
from lm.devices import preemption, processes
from lm.training import divergence
from lm.training import metrics as metrics_lib
from lm.training import optimizer as optimizer_lib
from lm.training.divergence import Failure
from lm.training.metrics import ProgressLine, Writer
from lm.training.optimizer import OptimizerConfig

# (params, batch, key) -> mean loss in nats, and sums over the batch for metrics: at least `nats`
# and `tokens`. What is `frozen` in a run follows the key.
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of training.

    Attributes:
      steps: optimizer steps in all.
      batch_size: rows per batch, over all processes.
      length: tokens per row.
      optimizer: see `lm.training.optimizer`.
      z_loss: weight of the squared log normaliser (PaLM, section 5).
      log_every: steps between metrics.
      checkpoint_every: steps between checkpoints; the last step always has one.
      explodes_at: the run stops at a loss above this many times its first one (see
        `lm.training.divergence`). Ten times the loss of guessing is reached by no run that learns.
      seed: of the initial parameters, of the order of the data and of the loss's randomness.
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


@flax.struct.dataclass
class TrainState:
    """What training changes: `step` counts the updates that `params` have seen."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state before the first step; the optimizer's arrays lie where their params do."""
    shardings = optimizer_shardings(params, jax.eval_shape(optimizer.init, params), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), everywhere), params, opt_state)


def optimizer_shardings(params: Any, opt_state: Any, mesh: Mesh) -> Any:
    """Returns where an optimizer's arrays lie: those of a parameter's shape, as the parameter does.

    Args:
      params: arrays, or their shapes with shardings.
      opt_state: shapes of the optimizer's state, in which moments have their parameters' names.
      mesh: over which all else, such as Adafactor's row and column statistics, is replicated.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        names = (path[i:] for i in range(len(path)))
        param = next((known[name] for name in names if name in known), None)
        return param.sharding if param is not None and param.shape == leaf.shape else everywhere

    return jax.tree_util.tree_map_with_path(place, opt_state)


def train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    batch: dict[str, jax.Array],
    *frozen: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; the loss's key depends on the seed and the step alone."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, sums), gradient = grad(state.params, batch, key, *frozen)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {'loss': value, 'gradient_norm': optax.tree.norm(gradient), **sums}
    return TrainState(state.step + 1, params, opt_state), metrics


def run(
    config: TrainConfig,
    init: Callable[[jax.Array], Any],
    loss: LossFn,
    batches: grain.IterDataset,
    folder: epath.PathLike,
    mesh: Mesh,
    label: str = 'train',
    frozen: tuple[Any, ...] = (),
) -> TrainState:
    """Trains to `config.steps`, from the newest checkpoint in `folder` where there is one.

    Args:
      config: see `TrainConfig`.
      init: key -> params, already sharded over the mesh.
      loss: see `LossFn`.
      batches: an endless dataset of dicts of `[B, L]` arrays, and of what is `Shared`.
      folder: gets `checkpoints/`, `metrics.jsonl` and TensorBoard events.
      mesh: over which batches are split by rows.
      label: what the progress line calls the run.
      frozen: arrays that the loss reads, nothing changes and no checkpoint holds.

    Raises:
      ValueError: the folder's checkpoints are of another model.
      OSError: no checkpoint in the folder is whole, or one cannot be written.
      FloatingPointError: the loss is no longer finite, or explodes; names the step, its documents
        and the folder with the state before it.
      Preempted: SIGTERM came; the state after the step under way is saved.
    """
    optimizer = optimizer_lib.make(config.optimizer, config.steps)
    state = init_state(init(jax.random.key(config.seed)), optimizer, mesh)
    checkpoints, iterator, start = Checkpoints(epath.Path(folder) / 'checkpoints'), iter(batches), 0
    if checkpoints.steps():
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        del state  # two states at once might not fit
        start, state = checkpoints.restore(like, iterator)
    step_fn = _compiled(config, loss, optimizer, state, mesh)
    guard = divergence.start(_first_loss(folder), mesh)
    with preemption.noticed() as notice, ProgressLine(label, config.steps, start) as progress:
        writer = Writer(folder, start) if processes.is_first() else None
        log = _Log(config, writer, progress)
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
        except _Failed as found:
            raise FloatingPointError(divergence.keep(found.failure, state, folder)) from None
        finally:
            if writer is not None:
                writer.close()
            checkpoints.close()
    return state


def _first_loss(folder: epath.PathLike) -> float:
    """Returns the loss of a run's first step, infinite before it; the same on all hosts."""
    records = metrics_lib.read_jsonl(epath.Path(folder) / 'metrics.jsonl')
    first = records[0].get('loss', math.inf) if records else math.inf
    if jax.process_count() > 1:
        first = multihost_utils.broadcast_one_to_all(np.float32(first))
    return float(first)


def _compiled(
    config: TrainConfig, loss: LossFn, optimizer, state: TrainState, mesh: Mesh
) -> Callable:
    """Returns the jitted step, which uses up the state and tells the learning rate, too."""
    rate = optimizer_lib.schedule(config.optimizer, config.steps)

    def step(state, batch, *frozen):
        after, metrics = train_step(loss, optimizer, config.seed, state, batch, *frozen)
        return after, {**metrics, 'learning_rate': rate(state.step)}

    # the state stays where it is: otherwise some leaves move, and the second step recompiles
    where = jax.tree.map(lambda x: x.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        divergence.guarded(step, config.explodes_at),
        donate_argnums=0,
        out_shardings=(where, everywhere, None),
    )


class _Failed(Exception):
    def __init__(self, failure: Failure):
        super().__init__(f'step {failure.step}')
        self.failure = failure


class _Log:
    """Reads each step's metrics only once the next step is under way, so devices never wait."""

    def __init__(self, config: TrainConfig, writer: Writer | None, progress: ProgressLine):
        self._config, self._writer, self._progress = config, writer, progress
        self._pending: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None
        self._since, self._tokens = time.monotonic(), 0.0

    def add(self, step: int, metrics: dict[str, jax.Array], batch: dict[str, Any]) -> None:
        """Takes a step's metrics, and raises `_Failed` if the step before it failed."""
        self.finish()
        self._pending = (step, metrics, batch)

    def finish(self) -> None:
        """Waits for the last step taken, and raises `_Failed` if it failed."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if values.pop('failed'):
            raise _Failed(Failure(step, values, batch))
        tokens = values.pop('tokens')
        self._tokens += tokens
        values['nats_per_token'] = values.pop('nats') / max(tokens, 1.0)
        self._progress.update(step, f'loss {values["loss"]:.3f}')
        if step % self._config.log_every == 0 or step in (1, self._config.steps):
            now = time.monotonic()
            if self._writer is not None:
                speed = self._tokens / max(now - self._since, 1e-9)
                self._writer.write(step, values, {'tokens_per_second': speed})
            self._since, self._tokens = now, 0.0


def put(batch: Mapping[str, np.ndarray | Shared], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a host batch as arrays split over the mesh; each process gives its own rows.

    Rows are divided over `data`. Where there are devices along `sequence`, each row is in zigzag
    order (`lm.attention.zigzag`). `Shared` arrays are replicated; `documents` is left out.

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


def evaluate(
    loss: LossFn, params: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, float]:
    """Returns the loss's sums over all batches, added up in f64 on the host."""
    step = jax.jit(lambda params, batch, key: loss(params, batch, key)[1])
    totals: dict[str, float] = {}
    pending = None
    with jax.set_mesh(mesh):
        for i, batch in enumerate(batches):
            sums = step(params, put(batch, mesh), jax.random.fold_in(jax.random.key(0), i))
            totals, pending = _add(totals, pending), sums
    return _add(totals, pending)


def _add(totals: dict[str, float], sums: dict[str, jax.Array] | None) -> dict[str, float]:
    if sums is None:
        return totals
    return {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
