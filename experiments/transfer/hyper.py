"""Training of the hypernetwork, and of models after a transfer."""

import functools
import time
from typing import NamedTuple

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments.corpora import Corpus
from experiments.transfer.config import Config
from lm.model import params
from lm.model.params import Params
from lm.training import train
from lm.training.train import TrainConfig
from tokenization.transfer import hypernetwork
from tokenization.transfer import losses as hypernetwork_losses
from tokenization.transfer.hypernetwork import HypernetworkConfig
from tokenization.transfer.sampled_batches import Settings, sampled_batches
from tokenization.transfer.transfer import SourceModel

# of the texts that rows are cut from; few rows stay short of their length
_BYTES_PER_TOKEN = 6


class Trained(NamedTuple):
    """A trained hypernetwork."""

    config: HypernetworkConfig
    weights: Params
    seconds: float


def fit(
    config: Config, source: SourceModel, corpus: Corpus, out: epath.Path, mesh: Mesh
) -> Trained:
    """Trains a hypernetwork in two stages, or resumes what `out` holds."""
    begin = time.monotonic()
    shape = hypernetwork.for_model(config.hypernetwork, source.config, source.tokenizer.vocab_size)
    placed = params.placed(hypernetwork.leaves(shape), mesh)
    init = jax.jit(functools.partial(hypernetwork.init, shape), out_shardings=placed)
    first = train.run(
        config.identity,
        functools.partial(init, source.params['tables']),
        lambda weights, batch, key, frozen: hypernetwork_losses.identity_loss(
            weights, shape, frozen, batch
        ),
        _rows(config.identity, shape.vocab_size),
        out / 'identity', mesh, 'rows of the source', frozen=(source.params,),
    )  # fmt: skip
    batches = sampled(config, source, corpus, shape)
    second = train.run(
        config.transfer,
        lambda key: jax.tree.map(lambda x: x.copy(), first.params),
        lambda weights, batch, key, frozen: hypernetwork_losses.transfer_loss(
            weights, shape, source.config, source.bos, config.auxiliary, frozen, batch
        ),
        batches, out / 'transfer', mesh, 'drawn tokenizers', frozen=(source.params,),
    )  # fmt: skip
    return Trained(shape, second.params, time.monotonic() - begin)


def _rows(config: TrainConfig, vocab_size: int) -> grain.IterDataset:
    """Returns batches of random source ids, the same for a step wherever a run was resumed."""
    own = config.batch_size // jax.process_count()
    first = own * jax.process_index()

    def draw(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((config.seed, step))
        ids = rng.integers(0, vocab_size, config.batch_size)
        return {'ids': ids[first : first + own].astype(np.int32)}

    return grain.MapDataset.range(config.steps).map(draw).to_iter_dataset()


def sampled(
    config: Config, source: SourceModel, corpus: Corpus, shape: HypernetworkConfig
) -> grain.IterDataset:
    """Returns batches of which each has a tokenizer of its own."""
    run = config.transfer
    settings = Settings(
        run.batch_size // jax.process_count(), run.length, _BYTES_PER_TOKEN * run.length,
        # one row more is BOS's
        config.sampled_size - 1, shape.pieces, run.steps, run.seed,
        jax.process_index(), jax.process_count(),
    )  # fmt: skip
    return sampled_batches(corpus.train, source.tokenizer, settings, config.workers)
