"""Transfers a fine-tuned variant of the model with the results for its base: task arithmetic.

The source is fine-tuned briefly on prose. This variant then takes the base's tables for another
tokenizer, and a weighted part of the change in the base's body during continued training
(`add_task` in `tokenization.transfer.transfer`). The variant itself is not trained further.
"""

from typing import Any

from etils import epath
from jax.sharding import Mesh

from experiments import corpora
from experiments.language_model import Fitted
from experiments.lexinvariant import domains
from experiments.transfer import measure
from experiments.transfer.config import Config, Target
from experiments.transfer.measure import Moved
from lm.checkpoints import bundle
from tokenization.tokenizer import Tokenizer
from tokenization.transfer import transfer
from tokenization.transfer.transfer import SourceModel


def rows(
    config: Config, source: SourceModel, found: dict[Target, Tokenizer], out: epath.Path, mesh: Mesh
) -> list[dict[str, Any]]:
    """Returns bits per byte of held-out prose of base and variant, before and after a transfer.

    Args:
      found: the targets, of which `config.variants` are used.
      out: folder with bundles of the base, transferred by the hypernetwork and trained further.
    """
    library = corpora.standard_library()
    prose, held_out = (
        [text for document in documents if (text := domains.prose(document))]
        for documents in (library.train, library.test)
    )
    texts = corpora.first_bytes(held_out, config.valid_bytes)

    def row(target: str, model: str, weight: float | None, moved: Moved) -> dict[str, Any]:
        bits = measure.bits_per_byte(moved, config, texts, mesh)
        return {'target': target, 'model': model, 'weight': weight, 'bits_per_byte': bits}

    base = measure.unmoved(source)
    ids = source.tokenizer.encode_batch(corpora.first_bytes(prose, measure.SHOT_BYTES))
    tuned = measure.train_on(
        base, config, config.variant_steps, ids, out / 'variant', mesh, 'variant, on prose'
    )
    result = [row('own', 'base', None, base), row('own', 'variant', None, tuned)]
    for target in [target for target in found if target in config.variants]:
        loaded = bundle.load(out / 'bundles' / f'{target}_{max(config.shots)}', mesh)
        tokenizer = found[target]
        moved = Moved(
            Fitted(loaded.config, loaded.params, 0.0), tokenizer, tokenizer.vocab_size, 0.0
        )
        result.append(row(target, 'base', None, moved))
        for weight in config.task_weights:
            params = transfer.add_task(tuned.fitted.params, loaded.params, source.params, weight)
            variant = moved._replace(fitted=Fitted(loaded.config, params, 0.0))
            result.append(row(target, 'variant', weight, variant))
    return result
