"""Optimizers and schedules as optax chains built from one config."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

_MUON_MOMENTUM = 0.95
_ADAM_RMS = 0.2  # of AdamW's updates, in learning rates: what Muon's are scaled to


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move.

    Attributes:
      name: `adamw`; `adafactor` (Shazeer & Stern 2018), whose state is far smaller; or `muon`
        (Jordan et al. 2024), which moves matrices of the body by orthogonal matrices, as far as
        AdamW would (Liu et al. 2025, arXiv 2502.16982), and all else by AdamW with Nesterov's
        momentum.
      learning_rate: the highest rate, reached after `warmup_steps` of linear growth.
      schedule: after the warm-up: `cosine` down to `final_fraction`, `rsqrt` or `constant`.
      warmup_steps: optimizer steps.
      final_fraction: of the highest rate, at the last step of `cosine`.
      weight_decay: on matrices of the body; tables, norms and biases are left alone.
      b1, b2: decay of AdamW's moments.
      clip: largest global norm of a gradient; 0 clips nothing.
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
                # evaluated during the warm-up, too, where `step` is negative
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


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run of `steps` steps."""
    rate = schedule(config, steps)
    if config.name == 'adamw':
        optimizer = optax.adamw(
            rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed
        )
    elif config.name == 'adafactor':
        # optax's own decay for it is not scaled by the learning rate
        optimizer = optax.chain(optax.adafactor(rate), _decay(rate, config.weight_decay))
    elif config.name == 'muon':
        optimizer = optax.contrib.muon(
            rate, beta=_MUON_MOMENTUM, adam_b1=config.b1, adam_b2=config.b2,
            weight_decay=config.weight_decay, weight_decay_mask=decayed,
            muon_weight_dimension_numbers=_matrices, consistent_rms=_ADAM_RMS,
        )  # fmt: skip
    else:
        raise ValueError(
            f'OptimizerConfig.name: {config.name!r}; expected adamw, adafactor or muon'
        )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, optimizer)


def _decay(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Subtracts `rate * weight_decay * w` from the updates of matrices, as AdamW does."""

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        shrink = rate(state.count) * weight_decay
        updates = jax.tree.map(
            lambda u, p, on: u - shrink * p if on else u, updates, params, decayed(params)
        )
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _matrices(params: Any) -> Any:
    """Returns which axes of a leaf are a matrix's input and its output; None where it is none.

    Names tell: of the axes, less the layers' (N), D is one side, the first or the last, and what
    remains the other side. `wq_NDHC` maps D to all heads' channels.
    """

    def sides(path, leaf):
        name = path[-1].key
        if not name.startswith('w'):
            return None
        letters = name.rpartition('_')[2]
        axes = tuple(range(letters.startswith('N'), leaf.ndim))
        inputs = 1 if letters[axes[0]] == 'D' else len(axes) - 1
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(sides, params)


def decayed(params: Any) -> Any:
    """Returns which leaves weight decay shrinks: matrices, whose names start with `w`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith('w'), params)
