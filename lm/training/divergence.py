"""Stops a run whose loss is not finite or explodes, and saves the state before that step.

The check runs on the devices as part of the step: from the first failed step on, the state no
longer changes. So the host may read the outcome late, after dispatching the next step, and still
has the state before the failure.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.data.packing import DOCUMENTS, Shared
from lm.files import atomic

# Maximum number of document ids in an error message; the file lists all.
_SHOWN = 8


@flax.struct.dataclass
class Guard:
    """The check's state between steps.

    Attributes:
      first_loss: f32, the run's first loss; infinite before there is one.
      failed: bool, whether a step has failed; the state no longer changes.
    """

    first_loss: jax.Array
    failed: jax.Array


class Failure(NamedTuple):
    """A step that failed the check.

    Attributes:
      step: its number.
      values: its metrics.
      batch: this process's batch, as the pipeline gave it.
    """

    step: int
    values: dict[str, float]
    batch: dict[str, Any]


def start(first_loss: float, mesh: Mesh) -> Guard:
    """Returns the guard of a run whose first loss was `first_loss`; infinite before any step."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    values = Guard(jnp.float32(first_loss), jnp.bool_(False))
    return jax.device_put(values, everywhere)


def guarded(step: Callable, explodes_at: float) -> Callable:
    """Returns a step that leaves the state unchanged once a step has failed.

    A step fails if its loss or the norm of its gradient is not finite, or if the loss explodes:
    exceeds `explodes_at` times the run's first loss, or `explodes_at` if the first loss is below 1.

    Args:
      step: (state, batch, ...) -> (state, metrics with `loss` and `gradient_norm`).
      explodes_at: see above.

    Returns:
      (state, guard, batch, ...) -> (state, guard, metrics, `failed` among them).
    """

    def checked(state: Any, guard: Guard, batch: Any, *rest: Any):
        after, metrics = step(state, batch, *rest)
        loss = metrics['loss'].astype(jnp.float32)
        first = jnp.where(jnp.isinf(guard.first_loss), loss, guard.first_loss)
        whole = jnp.isfinite(loss) & jnp.isfinite(metrics['gradient_norm'])
        failed = guard.failed | ~whole | (loss > explodes_at * jnp.maximum(first, 1.0))
        kept = jax.tree.map(lambda old, new: jnp.where(failed, old, new), state, after)
        return kept, Guard(first, failed), {**metrics, 'failed': failed}

    return checked


def keep(failure: Failure, state: Any, folder: epath.PathLike) -> str:
    """Saves the evidence in `folder/stopped/step_N/`; returns the error's message.

    These are `state/` (Orbax: the state before step N) and, for each process, `batch_process_I.npz`
    and `why_process_I.json`.
    """
    target = atomic.absolute(folder) / 'stopped' / f'step_{failure.step}'
    target.mkdir(parents=True, exist_ok=True)
    arrays = _arrays(failure.batch)
    process = jax.process_index()
    with (target / f'batch_process_{process}.npz').open('wb') as file:
        np.savez(file, allow_pickle=False, **arrays)
    described = {
        'step': failure.step,
        'documents': _documents(arrays),
        # as text: JSON has no NaN
        'metrics': {name: str(value) for name, value in failure.values.items()},
    }
    text = json.dumps(described, indent=2) + '\n'
    (target / f'why_process_{process}.json').write_text(text)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target / 'state', state, force=True)
    return describe(failure, target)


def describe(failure: Failure, kept: epath.PathLike) -> str:
    """Returns the error message for a failed step; `kept` has its state and batch."""
    documents = _documents(_arrays(failure.batch))
    if documents is None:
        said = 'its pipeline does not report documents'
    else:
        more = f' and {len(documents) - _SHOWN} more' if len(documents) > _SHOWN else ''
        said = f'documents {", ".join(map(str, documents[:_SHOWN]))}{more}'
    loss, norm = failure.values['loss'], failure.values['gradient_norm']
    return (
        f'step {failure.step}: the loss is {loss:g} and the norm of its gradient {norm:g} '
        f'({said}); the state before it and its batch are in {kept}; lower the learning rate, or '
        'look at the documents'
    )


def _arrays(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: x.array if isinstance(x, Shared) else x for name, x in batch.items()}


def _documents(arrays: dict[str, np.ndarray]) -> list[int] | None:
    if DOCUMENTS not in arrays:
        return None
    indices = np.unique(arrays[DOCUMENTS])
    return indices[indices >= 0].tolist()
