"""Optimizers and schedules as optax chains built from one config.

Whether weight decay applies to a parameter, and its input and output axes as a matrix, are in its
declaration (`lm.model.leaves.Leaf`).
"""

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lm.model.leaves import Leaf, Leaves, map_leaves

_MUON_MOMENTUM = 0.95
_ADAM_RMS = 0.2  # of AdamW's updates, in learning rates: what Muon's are scaled to


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: `adamw`; `adafactor` (Shazeer & Stern 2018), whose state is far smaller; or `muon`
        (Jordan et al. 2024), which updates matrices by orthogonal ones of the RMS of AdamW's
        updates (Liu et al. 2025, arXiv 2502.16982), and all else by AdamW with Nesterov momentum.
      learning_rate: the peak, after a linear warm-up of `warmup_steps`.
      schedule: after the warm-up: `cosine` down to `final_fraction`, `rsqrt` or `constant`.
      warmup_steps: optimizer steps.
      final_fraction: of the peak, at the last step of `cosine`.
      weight_decay: per unit of learning rate, on leaves that declare it: not token tables, norms
        and biases.
      b1, b2: decay rates of AdamW's moments.
      clip: maximum global norm of the gradient; 0 disables clipping.
    """

    name: Literal['adamw', 'adafactor', 'muon'] = 'adamw'
    learning_rate: float = 3e-3
    schedule: Literal['cosine', 'rsqrt', 'constant'] = 'cosine'
    warmup_steps: int = 50
    final_fraction: float = 0.1
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f'OptimizerConfig.learning_rate: {self.learning_rate}; must be > 0')
        if self.warmup_steps < 0 or self.clip < 0:
            raise ValueError('OptimizerConfig: warmup_steps and clip must not be negative')


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for a run of `steps` steps."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    match config.schedule:
        case 'cosine':
            after = optax.cosine_decay_schedule(config.learning_rate, rest, config.final_fraction)
        case 'rsqrt':

            def after(step):
                # also evaluated during the warm-up, with a negative `step`
                since = jnp.maximum(step, 0) + max(warmup, 1)
                return config.learning_rate * (max(warmup, 1) / since) ** 0.5

        case 'constant':
            after = optax.constant_schedule(config.learning_rate)
        case _:
            raise ValueError(
                f'OptimizerConfig.schedule: {config.schedule!r}; expected cosine, rsqrt or constant'
            )
    rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


class MakeOptimizer(Protocol):
    """Returns the optimizer of a run of `steps` steps.

    Args:
      config: see `OptimizerConfig`.
      steps: of the run, for the schedule.
      leaves: declarations of the parameters, in their structure (a transformer's:
        `lm.model.params.leaves`).
    """

    def __call__(
        self, config: OptimizerConfig, steps: int, leaves: Leaves, /
    ) -> optax.GradientTransformation: ...


def make(config: OptimizerConfig, steps: int, leaves: Leaves) -> optax.GradientTransformation:
    """Returns the optimizer that the config names, with its clipping; see `MakeOptimizer`."""
    if config.name not in OPTIMIZERS:
        raise ValueError(f'OptimizerConfig.name: {config.name!r}; expected {", ".join(OPTIMIZERS)}')
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.name](config, steps, leaves))


def _adamw(config: OptimizerConfig, steps: int, leaves: Leaves) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(config, steps), config.b1, config.b2, weight_decay=config.weight_decay,
        mask=decayed(leaves),
    )  # fmt: skip


def _adafactor(config: OptimizerConfig, steps: int, leaves: Leaves) -> optax.GradientTransformation:
    rate = schedule(config, steps)
    # optax's Adafactor does not scale its decay by the learning rate
    return optax.chain(optax.adafactor(rate), _decay(rate, config.weight_decay, decayed(leaves)))


def _muon(config: OptimizerConfig, steps: int, leaves: Leaves) -> optax.GradientTransformation:
    return optax.contrib.muon(
        schedule(config, steps), beta=_MUON_MOMENTUM, adam_b1=config.b1, adam_b2=config.b2,
        weight_decay=config.weight_decay, weight_decay_mask=decayed(leaves),
        muon_weight_dimension_numbers=matrices(leaves), consistent_rms=_ADAM_RMS,
    )  # fmt: skip


# A new optimizer is a function like these, a line here, and its name in `OptimizerConfig.name`.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    'adamw': _adamw,
    'adafactor': _adafactor,
    'muon': _muon,
}


def decayed(leaves: Leaves) -> dict[str, Any]:
    """Returns whether weight decay applies to each leaf."""
    return map_leaves(lambda leaf: leaf.decay, leaves)


def matrices(leaves: Leaves) -> dict[str, Any]:
    """Returns each matrix's input and output dimensions for Muon; None for other leaves."""

    def sides(leaf: Leaf) -> optax.contrib.MuonDimensionNumbers | None:
        return leaf.matrix and optax.contrib.MuonDimensionNumbers(*leaf.matrix)

    return map_leaves(sides, leaves)


def _decay(
    rate: optax.Schedule, weight_decay: float, mask: dict[str, Any]
) -> optax.GradientTransformation:
    """Subtracts `rate * weight_decay * w` from the updates of decayed leaves, as AdamW does."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        shrink = rate(state.count) * weight_decay
        updates = jax.tree.map(lambda u, p, on: u - shrink * p if on else u, updates, params, mask)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)
