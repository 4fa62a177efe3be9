"""Trains a language model over a tokenizer and saves it as a bundle."""

from collections.abc import Sequence

from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from experiments import corpora, language_model, report, resume
from experiments.pretrain.config import Config
from experiments.shard_text import ShardText
from lm.checkpoints import bundle
from lm.losses import next_token as losses
from lm.model import params
from tokenization import loading
from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer


def main(config: Config, out: epath.Path, mesh: Mesh) -> dict[str, float]:
    """Trains, evaluates and saves the model; resumes from the checkpoints in `out`."""
    language_model.check(config.model, config.train, mesh, 'train')
    corpus = corpora.open_corpus(config.data, config.tfds)
    resume.claim_corpus(out, corpus)
    tokenizer = open_tokenizer(config, corpus.train, out)
    documents = resume.encoded_once(tokenizer, corpus.train, out / 'encoded', 'encoding')
    fitted = language_model.fit(
        config.model, config.train, documents, tokenizer.vocab_size, out, mesh, 'training'
    )
    valid = corpora.first_bytes(corpus.valid, config.valid_bytes)
    n_bytes = sum(map(len, valid))
    ids = tokenizer.encode_batch(valid)
    batches = language_model.evaluation(
        ids, tokenizer.vocab_size, config.train.batch_size, config.train.length
    )
    nats = language_model.nats(fitted, batches, mesh)
    bytes_per_token = n_bytes / sum(map(len, ids))
    metrics = {
        'bits_per_byte': losses.bits_per_byte(nats, n_bytes),
        'bytes_per_token': bytes_per_token,
        'flops_per_byte': 2 * params.count_body(fitted.config) / bytes_per_token,
        'train_seconds': fitted.seconds,
    }
    bundle.save(
        out / 'bundle', fitted.config, fitted.params, tokenizer, tokenizer.vocab_size, metrics
    )
    Console().print(
        f'{metrics["bits_per_byte"]:.3f} bits per byte, {bytes_per_token:.2f} bytes per token; '
        f'bundle: {out / "bundle"}'
    )
    return {report.key(name, 'model'): value for name, value in metrics.items()}


def open_tokenizer(config: Config, train: Sequence[bytes], out: epath.Path) -> Tokenizer:
    """Returns the tokenizer that the config selects."""
    if config.tokenizer is None and isinstance(train, ShardText):
        return train.tokenizer
    if config.tokenizer in (None, 'bytes'):
        return ByteTokenizer()
    if config.tokenizer != 'bpe':
        folder = epath.Path(config.tokenizer)
        return loading.load(folder / 'tokenizer' if (folder / 'params').exists() else folder)
    return resume.tokenizer_once(
        out / 'tokenizer', lambda: BPETokenizer.train(train, config.vocab_size)
    )
