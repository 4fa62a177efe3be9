"""The source model of a transfer: trained here over BPE, or given as a bundle."""

from typing import cast

from etils import epath
from jax.sharding import Mesh

from experiments import language_model, resume
from experiments.corpora import Corpus
from experiments.transfer.config import Config
from lm.checkpoints import bundle
from tokenization import loading
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.transfer import decompose
from tokenization.transfer.transfer import SourceModel
from tokenization.vocabularies.bpe import BPETokenizer


def open_source(config: Config, corpus: Corpus, out: epath.Path, mesh: Mesh) -> SourceModel:
    """Returns the source: the config's bundle, or a model trained here, now or by an earlier run.

    Raises:
      ValueError: the bundle has no id that can serve as BOS, or its tokenizer cannot decompose the
        tokens of another.
    """
    if config.bundle is None:
        _train(config, corpus, out, mesh)
    loaded = bundle.load(config.bundle or out / 'source' / 'bundle', mesh)
    tokenizer = loading.load(loaded.tokenizer_path)
    bos = loaded.bos
    if bos is None and isinstance(tokenizer, HuggingFaceTokenizer):
        bos = tokenizer.special.get('eos')  # Qwen has no BOS; EOS separates documents
    if bos is None:
        raise ValueError(f'--bundle {config.bundle}: no id that starts documents: a transferred '
                         'model would not know where a text begins')  # fmt: skip
    if not hasattr(tokenizer, 'encode_piece'):
        raise ValueError(f'--bundle {config.bundle}: its tokenizer cannot decompose tokens; '
                         'expected BPE, bytes or an imported one')  # fmt: skip
    return SourceModel(loaded.config, loaded.params, cast(decompose.PieceTokenizer, tokenizer), bos)


def _train(config: Config, corpus: Corpus, out: epath.Path, mesh: Mesh) -> None:
    folder = out / 'source'
    if (folder / 'bundle').exists():
        return
    tokenizer = resume.tokenizer_once(
        folder / 'tokenizer', lambda: BPETokenizer.train(corpus.train, config.vocab_size)
    )
    documents = resume.encoded_once(tokenizer, corpus.train, folder / 'encoded', 'encoding')
    fitted = language_model.fit(
        config.model, config.train, documents, tokenizer.vocab_size, folder, mesh, 'source model'
    )
    bundle.save(
        folder / 'bundle', fitted.config, fitted.params, tokenizer, tokenizer.vocab_size,
        {'train_seconds': fitted.seconds},
    )  # fmt: skip
