"""The target, the draft models and the adapter: trained here, or loaded from bundles."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decoding.drafts import adapter as adapter_lib
from decoding.drafts import adapter_architecture
from decoding.drafts.adapter_architecture import AdapterConfig
from decoding.drafts.early_exit import Adapter
from decoding.model import LM, for_decoding
from experiments import corpora, decoding_models, language_model, resume
from experiments.corpora import Corpus
from experiments.decoding_models import Loaded
from experiments.pretrain import main as pretrain
from experiments.pretrain.config import Config as PretrainConfig
from experiments.speculative.config import Config
from lm.checkpoints import bundle
from lm.data.documents import Documents
from lm.devices import processes
from lm.losses import next_token as losses
from lm.model.params import Params
from lm.training import train
from tokenization.tokenizer import Tokenizer

_VALID_BYTES = 50_000


class Models(NamedTuple):
    """The models of the grid.

    Attributes:
      target: the model that verifies.
      drafts: draft models, ready for decoding, by the target's size ratio to them.
      adapter: parameters of the early exit's adapter; None if no row needs it.
    """

    target: Loaded
    drafts: dict[int, LM]
    adapter: Adapter | None


def prepare(config: Config, corpus: Corpus, out: epath.Path, mesh: Mesh) -> Models:
    """Loads the config's bundles, or trains (where `out` lacks them) and loads the models.

    Raises:
      ValueError: as `language_model.check` does; or a draft bundle has another tokenizer, or no
        adapter can be trained for the target.
    """
    if config.target_bundle is not None:
        paths = [epath.Path(path) for path in (config.target_bundle, *config.draft_bundles)]
    else:
        paths = _trained(config, corpus, out, mesh)
    target, *drafts = (decoding_models.load(path, mesh) for path in paths)
    for path, draft in zip(paths[1:], drafts, strict=True):
        if draft.model.tokenizer != target.model.tokenizer:
            raise ValueError(f'{path}: another tokenizer than that of {paths[0]}')
    size = target.model.model.size
    by_ratio = {}
    for path, draft in zip(paths[1:], drafts, strict=True):
        ratio = round(size / draft.model.model.size)
        if ratio < 1 or ratio in by_ratio:
            raise ValueError(
                f'{path}: {ratio} times smaller than the target; expected draft models of '
                'different sizes, all smaller than the target'
            )
        by_ratio[ratio] = for_decoding(draft.model)
    adapter = None
    if 'early_exit_adapter' in config.drafters:
        adapter = _adapter(config, target, corpus.train, out, mesh)
    return Models(target, dict(sorted(by_ratio.items())), adapter)


def nearest(models: Models, ratio: int) -> int:
    """Returns the size ratio of the draft model that is nearest to `ratio`."""
    return min(models.drafts, key=lambda known: abs(known - ratio))


def _trained(config: Config, corpus: Corpus, out: epath.Path, mesh: Mesh) -> list[epath.Path]:
    """Returns the bundles of the target and of the draft models."""
    runs = {
        'target': (config.target, config.target_train),
        **{
            f'draft_{n}': (getattr(config, f'draft_{n}'), config.draft_train) for n in config.ratios
        },
    }
    for name, (model, run) in runs.items():
        language_model.check(model, run, mesh, f'{name}_train')
    asked = PretrainConfig(tokenizer=config.tokenizer, vocab_size=config.vocab_size)
    tokenizer = pretrain.open_tokenizer(asked, corpus.train, out)
    documents = _encoded(tokenizer, corpus.train, out)
    valid = corpora.first_bytes(corpus.valid, _VALID_BYTES)
    ids = tokenizer.encode_batch(valid)
    paths = []
    for name, (model, run) in runs.items():
        paths.append(out / 'bundles' / name)
        if (paths[-1] / 'config.json').exists():
            continue
        fitted = language_model.fit(
            model, run, documents, tokenizer.vocab_size, out / name, mesh, name
        )
        batches = language_model.evaluation(ids, tokenizer.vocab_size, run.batch_size, run.length)
        nats = language_model.nats(fitted, batches, mesh)
        metrics = {'bits_per_byte': losses.bits_per_byte(nats, sum(map(len, valid)))}
        bundle.save(
            paths[-1], fitted.config, fitted.params, tokenizer, tokenizer.vocab_size, metrics
        )
    return paths


def _adapter(
    config: Config, target: Loaded, documents: Sequence[bytes], out: epath.Path, mesh: Mesh
) -> Adapter:
    """Trains the adapter of the target's early exit on the training text."""
    lm, model, vocab_size = target.model, target.config, target.tokenizer.vocab_size
    if lm.bos != vocab_size:
        raise ValueError(
            f'--drafters: no adapter can be trained for this target, whose BOS is {lm.bos} '
            f'instead of {vocab_size}: omit early_exit_adapter'
        )
    run = config.adapter_train
    language_model.check(model, run, mesh, 'adapter_train')
    documents_of_ids = _encoded(target.tokenizer, documents, out)
    batches = language_model.training(run, documents_of_ids, vocab_size)

    def loss(adapter: Params, batch: dict[str, jax.Array], key: jax.Array):
        del key
        return adapter_lib.loss(adapter, lm.params, model, config.exit_layers, batch)

    init = jax.jit(
        functools.partial(adapter_lib.init, config=model),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    state = train.run(
        run, init, loss, batches, out / 'adapter', mesh, 'adapter',
        leaves=adapter_lib.leaves(model),
    )  # fmt: skip
    path = out / 'bundles' / 'adapter'
    if not processes.agree((path / 'config.json').exists()):
        bundle.save(
            path, AdapterConfig(model, config.exit_layers), state.params, target.tokenizer, lm.bos,
            architecture=adapter_architecture.ARCHITECTURE,
        )  # fmt: skip
    return Adapter(adapter_lib.model(model), adapter_lib.as_params(state.params))


def _encoded(tokenizer: Tokenizer, documents: Sequence[bytes], out: epath.Path) -> Documents:
    return resume.encoded_once(tokenizer, documents, out / 'encoded', 'encoding')
