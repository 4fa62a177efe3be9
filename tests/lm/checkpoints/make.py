"""Saves the checkpoint that later versions must load: `python tests/lm/checkpoints/make.py FOLDER`.

The folder is only written by the commit that README.md names; what imports it beside that are
the tests, which train on with the same model and documents.
"""

import functools
import hashlib
import json
import pathlib
import sys

import grain
import jax
import numpy as np

from lm.data import batches as batches_lib
from lm.devices import mesh
from lm.losses import next_token as losses
from lm.model import params
from lm.model.config import Config
from lm.training import train
from lm.training.optimizer import OptimizerConfig

MODEL = Config(32, 8, 1, 2, 1, 4, 8, max_length=16)
DOCUMENTS = [np.arange(7 * i, 7 * i + 20) % 31 for i in range(9)]
# Steps that the checkpoint has seen.
STEPS = 4


def batches() -> grain.IterDataset:
    """Returns the run's data."""
    return batches_lib.training_batches(DOCUMENTS, None, batch_size=2, length=8, bos=31, seed=3)


def trained(folder: pathlib.Path, steps: int) -> train.TrainState:
    """Trains to `steps`, from the newest checkpoint in `folder` where there is one."""
    config = train.TrainConfig(
        steps=steps, batch_size=2, length=8, log_every=1, checkpoint_every=4,
        optimizer=OptimizerConfig(schedule='constant', warmup_steps=2),
    )  # fmt: skip

    def loss(weights, batch, key):
        return losses.next_token_loss(weights, MODEL, batch)

    one = mesh.make(devices=jax.devices()[:1])
    init = functools.partial(params.init, MODEL)
    return train.run(config, init, loss, batches(), folder, one, leaves=params.leaves(MODEL))


def digest(state: train.TrainState) -> str:
    """Returns a SHA-256 of every leaf's name, type, shape and bytes."""
    result = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        result.update(f'{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}'.encode())
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()


if __name__ == '__main__':
    target = pathlib.Path(sys.argv[1])
    state = trained(target, STEPS)
    (target / 'digest.json').write_text(json.dumps({'sha256': digest(state)}) + '\n')
