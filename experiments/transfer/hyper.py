"""The hypernetwork: trained in two stages, or loaded from a bundle."""

import functools
import time
from typing import NamedTuple

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments import resume
from experiments.corpora import Corpus
from experiments.transfer.config import Config
from lm.checkpoints import bundle
from lm.devices import processes
from lm.model import leaves as leaves_lib
from lm.model.leaves import Params
from lm.training import train
from lm.training.train import TrainConfig
from tokenization import loading
from tokenization.transfer import hypernetwork, transfer
from tokenization.transfer import losses as hypernetwork_losses
from tokenization.transfer.hypernetwork import HypernetworkConfig
from tokenization.transfer.sampled_batches import Settings, sampled_batches
from tokenization.transfer.transfer import SourceModel

# Bytes of text per token of a row; few rows are left shorter than their length.
_BYTES_PER_TOKEN = 6


class Trained(NamedTuple):
    """A trained hypernetwork; `seconds` that its training took."""

    config: HypernetworkConfig
    weights: Params
    seconds: float


def open_network(
    config: Config, source: SourceModel, corpus: Corpus, out: epath.Path, mesh: Mesh
) -> Trained:
    """Returns the hypernetwork of the config's bundle, or trains one and saves it as a bundle.

    Raises:
      FileNotFoundError, ValueError: what `bundle.load` raises; the bundle's hypernetwork was
        trained for another model or another tokenizer.
    """
    if config.hypernetwork_bundle is not None:
        return _load(config.hypernetwork_bundle, source, mesh)
    network = _fit(config, source, corpus, out / 'hypernetwork', mesh)
    # of the process that trained it, not of one that found it trained
    seconds = resume.part_once(out / 'parts' / 'hypernetwork.json', lambda: network.seconds)
    path = out / 'bundles' / 'hypernetwork'
    if not processes.agree((path / 'config.json').exists()):
        bundle.save(
            path, network.config, network.weights, source.tokenizer, None,
            {'train_seconds': seconds}, architecture=hypernetwork.ARCHITECTURE,
        )  # fmt: skip
    return network._replace(seconds=seconds)


def _load(path: str, source: SourceModel, mesh: Mesh) -> Trained:
    known = {hypernetwork.ARCHITECTURE.name: hypernetwork.ARCHITECTURE}
    loaded = bundle.load(path, mesh, architectures=known)
    size = source.tokenizer.vocab_size
    config = hypernetwork.for_model(loaded.config, source.config, size)
    for name in ('vocab_size', 'd_model', 'tied'):
        had, wanted = getattr(loaded.config, name), getattr(config, name)
        if had != wanted:
            raise ValueError(
                f'--hypernetwork_bundle {path}: {name} {had}, and the model has {wanted}: it was '
                'trained for another model'
            )
    tokenizer = loading.load(loaded.tokenizer_path)
    if transfer.token_table(tokenizer) != transfer.token_table(source.tokenizer):
        raise ValueError(
            f'--hypernetwork_bundle {path}: it was trained for another tokenizer than the model has'
        )
    return Trained(config, loaded.params, loaded.metrics.get('train_seconds', 0.0))


def _fit(
    config: Config, source: SourceModel, corpus: Corpus, out: epath.Path, mesh: Mesh
) -> Trained:
    """Trains a hypernetwork in two stages, resuming from the checkpoints in `out`."""
    begin = time.monotonic()
    shape = hypernetwork.for_model(config.hypernetwork, source.config, source.tokenizer.vocab_size)
    leaves = hypernetwork.leaves(shape)
    placed = leaves_lib.placed(leaves, mesh)
    init = jax.jit(functools.partial(hypernetwork.init, shape), out_shardings=placed)
    first = train.run(
        config.identity,
        functools.partial(init, source.params['tables']),
        lambda weights, batch, key, frozen: hypernetwork_losses.identity_loss(
            weights, shape, frozen, batch
        ),
        _rows(config.identity, shape.vocab_size),
        out / 'identity', mesh, 'rows of the source', frozen=(source.params,), leaves=leaves,
    )  # fmt: skip
    batches = sampled(config, source, corpus, shape)
    second = train.run(
        config.transfer,
        lambda key: jax.tree.map(lambda x: x.copy(), first.params),
        lambda weights, batch, key, frozen: hypernetwork_losses.transfer_loss(
            weights, shape, source.config, source.bos, config.auxiliary, frozen, batch
        ),
        batches, out / 'transfer', mesh, 'drawn tokenizers', frozen=(source.params,),
        leaves=leaves,
    )  # fmt: skip
    return Trained(shape, second.params, time.monotonic() - begin)


def _rows(config: TrainConfig, vocab_size: int) -> grain.IterDataset:
    """Returns batches of random source ids, a function of the step, so that runs can resume."""
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
    """Returns batches, each with its own sampled tokenizer."""
    run = config.transfer
    settings = Settings(
        run.batch_size // jax.process_count(), run.length, _BYTES_PER_TOKEN * run.length,
        # the remaining row is that of BOS
        config.sampled_size - 1, shape.pieces, run.steps, run.seed,
        jax.process_index(), jax.process_count(),
    )  # fmt: skip
    return sampled_batches(corpus.train, source.tokenizer, settings, config.workers)
