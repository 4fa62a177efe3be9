"""The contract of a loss: a function of parameters and a batch; it names the sums it reports.

The training loop and the evaluation add up the sums and report each as `total / count` under its
name. They know neither names nor units: a loss other than cross-entropy is not reported in nats.
"""

from typing import Any, NamedTuple, Protocol

import jax


class Sum(NamedTuple):
    """A sum over a batch, and its divisor: f32 scalars.

    Sums of several batches are added elementwise, so that `total / count` is the mean over all of
    them.
    """

    total: Any
    count: Any

    @property
    def mean(self) -> float:
        """`total / count`, on the host; 0 if the count is 0."""
        return float(self.total) / (float(self.count) or 1.0)


class Loss(NamedTuple):
    """The result of a loss.

    Attributes:
      value: the scalar to minimise, f32.
      sums: reported, by name. The name states the unit of the mean: `nats_per_token`,
        `squared_distance_per_token`.
    """

    value: jax.Array
    sums: dict[str, Sum]


class LossFn(Protocol):
    """A loss as the training loop calls it.

    Args:
      params: the trained parameters.
      batch: arrays by name (`lm.data.batches`).
      key: for the loss's randomness, a new one per step.
      frozen: arrays that the loss reads and training does not change (`lm.training.train.run`).
      extra: future keyword arguments; the loop passes none yet.
    """

    def __call__(
        self, params: Any, batch: Any, key: jax.Array, /, *frozen: Any, **extra: Any
    ) -> Loss:
        """Returns the value to minimise and the sums to report."""
        ...
