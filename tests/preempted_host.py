"""One of two hosts that train together: a process that `tests.lm.devices.test_preemption` starts.

    python -m tests.preempted_host PORT INDEX FOLDER STEP

Gets SIGTERM in the middle of step STEP, or never if that is 0.
"""

import functools
import os
import signal
import sys

import jax

from lm.data import batches as batches_lib
from lm.devices import mesh, preemption
from lm.losses import next_token as losses
from lm.model import params
from lm.training import train
from tests.lm.checkpoints import make


def main(port: str, index: int, folder: str, step: int) -> None:
    """Trains until a signal comes; ends as `experiments.run` does."""
    jax.config.update('jax_disable_most_optimizations', True)  # as in tests/conftest.py
    jax.config.update('jax_enable_preemption_service', False)  # as `lm.devices.mesh.start` does
    jax.distributed.initialize(f'localhost:{port}', 2, index)
    put, read = train.put, []

    def signalled(batch, grid):
        read.append(batch)
        if len(read) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, grid)

    train.put = signalled
    grid = mesh.make()
    batches = batches_lib.training_batches(
        make.DOCUMENTS, None, batch_size=1, length=8, bos=31, seed=3, shard_index=index,
        shard_count=2,
    )  # fmt: skip
    init = jax.jit(
        functools.partial(params.init, make.MODEL), out_shardings=params.shardings(make.MODEL, grid)
    )
    config = train.TrainConfig(steps=10_000, batch_size=2, length=8, checkpoint_every=10_000)

    def loss(weights, batch, key):
        return losses.next_token_loss(weights, make.MODEL, batch)

    with preemption.ends_cleanly():
        train.run(config, init, loss, batches, folder, grid, leaves=params.leaves(make.MODEL))


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
