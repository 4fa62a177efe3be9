"""Exports one bundle."""

import json
import time

from etils import epath
from rich.console import Console

from experiments.export_hf.config import Config
from lm.checkpoints import bundle
from lm.huggingface import checkpoint as huggingface
from lm.model import params as params_lib
from tokenization import loading
from tokenization.huggingface import json_file as tokenizer_json
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Writes the checkpoint atomically; returns its number of parameters and the seconds taken."""
    begin = time.monotonic()
    huggingface.check_replaceable(out)
    loaded = bundle.load(config.bundle)
    tokenizer = loading.load(loaded.tokenizer_path)
    ids = {} if loaded.bos is None else {'bos_token_id': loaded.bos}
    files: dict[str, str] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids |= {f'{role}_token_id': i for role, i in tokenizer.roles if role in ('eos', 'pad')}
        files = tokenizer_files(tokenizer)
    family = huggingface.save(
        out, loaded.config, loaded.params, config.family, ids=ids, files=files,
        most_shard_bytes=int(config.shard_gb * 1e9),
    )  # fmt: skip
    metrics = {
        'parameters/model': float(params_lib.count(loaded.config)),
        'seconds/export': time.monotonic() - begin,
    }
    named = 'with tokenizer.json' if files else 'without a tokenizer, which has no form there'
    Console().print(
        f'{out}: {family}, {metrics["parameters/model"]:,.0f} parameters in '
        f'{loaded.config.param_dtype}, {named}, {metrics["seconds/export"]:.1f} s',
        highlight=False, markup=False,
    )  # fmt: skip
    return metrics


def tokenizer_files(tokenizer: HuggingFaceTokenizer) -> dict[str, str]:
    """Returns the tokenizer files of a transformers checkpoint, name -> text."""
    source = tokenizer_json.parse(tokenizer.source)
    spelling = {i: piece for piece, i in source.pieces.items()}
    spelling |= {token.id: token.content for token in source.added}
    described = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    described |= {f'{role}_token': spelling[i] for role, i in tokenizer.roles if i in spelling}
    return {
        'tokenizer.json': tokenizer.source,
        'tokenizer_config.json': json.dumps(described, indent=2) + '\n',
    }
