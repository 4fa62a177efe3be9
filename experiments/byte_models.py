"""Byte models on disk, as the coder wants them."""

import os

import jax
from etils import epath

from lm.checkpoints import bundle
from lm.devices import mesh
from tokenization import loading
from tokenization.coding import neural
from tokenization.coding.next_byte import NextByteModel
from tokenization.coding.ngram import NGram
from tokenization.vocabularies.byte import ByteTokenizer


def open_byte_model(path: epath.PathLike, precision: int = 16) -> NextByteModel:
    """Returns the n-gram or the byte model bundle saved in a folder.

    Raises:
      FileNotFoundError: neither is there.
      ValueError: it is damaged, or a bundle over other symbols than bytes.
    """
    folder = epath.Path(path)
    if not (folder / 'config.json').exists():
        if not folder.exists() or not any(folder.iterdir()):
            raise FileNotFoundError(f'{path}: no model here; `experiments.run pretrain` makes one')
        return NGram.load(folder).model(precision)
    # one device: float sums, and so the bits of the code, would depend on how many there are
    loaded = bundle.load(folder, mesh.make(devices=jax.devices()[:1]))
    if not isinstance(loading.load(loaded.tokenizer_path), ByteTokenizer):
        raise ValueError(f'{path}: a model over other symbols than bytes cannot code a file')
    return neural.model(loaded.params, loaded.config, loaded.config.max_length - 1, precision)


def atomically(target: epath.Path) -> epath.Path:
    """Returns where to write until `target` is whole.

    Raises:
      FileExistsError: `target` is there already.
    """
    if target.exists():
        raise FileExistsError(f'{target}: exists; give another --to, or remove it')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'{target.parent}: no such folder')
    return target.with_name(f'.{target.name}.{os.getpid()}.partial')
