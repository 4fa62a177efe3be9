"""Imports one checkpoint."""

import time

from etils import epath
from rich.console import Console

from experiments.import_hf.config import Config
from lm.checkpoints import bundle
from lm.huggingface import checkpoint as huggingface
from lm.model import params as params_lib
from tokenization.huggingface import tokenizer as huggingface_tokenizer


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Writes the bundle atomically; returns its number of parameters and the seconds taken.

    Raises:
      ValueError: the checkpoint or its tokenizer is damaged or cannot be represented exactly, or
        the tokenizer has more ids than the model's token tables have rows.
    """
    begin = time.monotonic()
    bundle.check_replaceable(out)
    found = huggingface.check(config.folder, config.dtype)
    rows = found.config.vocab_size
    tokenizer, beyond = huggingface_tokenizer.load_folder(config.folder).within(rows)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f'{config.folder}: its tokenizer has {tokenizer.vocab_size} ids, '
            f'{tokenizer.added_bytes} of them for missing bytes; the model has {rows} rows'
        )
    model, params = huggingface.load(config.folder, dtype=config.dtype)
    bundle.save(out, model, params, tokenizer, tokenizer.special.get('bos'))
    metrics = {
        'parameters/model': float(params_lib.count(model)),
        'seconds/import': time.monotonic() - begin,
    }
    lines = [f'note: {repair}' for repair in tokenizer.repairs]
    lines += [f'note: {name} left out: the model has no row for it' for name in beyond]
    lines += [
        f'{out}: {found.family.model_type}, {metrics["parameters/model"]:,.0f} parameters in '
        f'{model.param_dtype}, {tokenizer.vocab_size:,} tokens, {metrics["seconds/import"]:.1f} s'
    ]
    Console().print('\n'.join(lines), highlight=False, markup=False)
    return metrics
