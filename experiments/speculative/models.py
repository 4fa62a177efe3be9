"""The target, the draft models and the adapter: trained here, or found in bundles."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decoding.drafter import Model
from decoding.drafts import adapter as adapter_lib
from decoding.generate import ready
from experiments import corpora, decoding_models, language_model, resume
from experiments.corpora import Corpus
from experiments.decoding_models import Loaded
from experiments.pretrain import main as pretrain
from experiments.pretrain.config import Config as PretrainConfig
from experiments.speculative.config import Config
from lm.checkpoints import bundle
from lm.data.documents import Documents
from lm.losses import next_token as losses
from lm.model import params
from lm.model.params import Params
from lm.training import train
from tokenization.tokenizer import Tokenizer

_VALID_BYTES = 50_000


class Models(NamedTuple):
    """What the grid is run with.

    Attributes:
      target: the model that verifies.
      drafts: draft models, ready to draft, by how many times more parameters the target has.
      adapter: of the early exit; None where no row asks for it.
    """

    target: Loaded
    drafts: dict[int, Model]
    adapter: Params | None


def prepare(config: Config, corpus: Corpus, out: epath.Path, mesh: Mesh) -> Models:
    """Trains what is not there yet in `out`, and loads it, or loads the config's bundles.

    Raises:
      ValueError: what `language_model.check` raises; a draft bundle of another tokenizer; no
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
    size = params.count(target.model.config)
    by_ratio = {}
    for path, draft in zip(paths[1:], drafts, strict=True):
        ratio = round(size / params.count(draft.model.config))
        if ratio < 1 or ratio in by_ratio:
            raise ValueError(
                f'{path}: {max(ratio, 0)} times smaller than the target, as is another draft model '
                'or none that drafts; give models of different sizes, smaller than the target'
            )
        by_ratio[ratio] = ready(draft.model)
    adapter = None
    if 'early_exit_adapter' in config.drafters:
        adapter = _adapter(config, target, corpus.train, out, mesh)
    return Models(target, dict(sorted(by_ratio.items())), adapter)


def nearest(models: Models, ratio: int) -> int:
    """Returns the ratio of the draft model that comes nearest to `ratio`."""
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
) -> Params:
    """Trains the adapter of the target's early exit, on the text that models are trained on."""
    model, vocab_size = target.model, target.tokenizer.vocab_size
    if model.bos != vocab_size:
        raise ValueError(
            f'--drafters: no adapter can be trained for this target, whose BOS is {model.bos} and '
            f'not {vocab_size}: leave early_exit_adapter out'
        )
    run = config.adapter_train
    language_model.check(model.config, run, mesh, 'adapter_train')
    documents_of_ids = _encoded(target.tokenizer, documents, out)
    batches = language_model.training(run, documents_of_ids, vocab_size)

    def loss(adapter: Params, batch: dict[str, jax.Array], key: jax.Array):
        del key
        return adapter_lib.loss(adapter, model.params, model.config, config.exit_layers, batch)

    init = jax.jit(
        functools.partial(adapter_lib.init, config=model.config),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    return train.run(
        run, init, loss, batches, out / 'adapter', mesh, 'adapter',
        leaves=adapter_lib.leaves(model.config),
    ).params  # fmt: skip


def _encoded(tokenizer: Tokenizer, documents: Sequence[bytes], out: epath.Path) -> Documents:
    return resume.encoded_once(tokenizer, documents, out / 'encoded', 'encoding')
