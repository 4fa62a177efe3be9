"""A language model to decode with: functions under the contract, parameters, provenance.

target = model.transformer(bundle.config, bundle.params, bos=bundle.bos)
result = generate(target, prompts, key=jax.random.key(0), max_new_tokens=100)
"""

from typing import Any, NamedTuple

from lm.model import stepped
from lm.model.config import Config
from lm.model.contract import Model


class LM(NamedTuple):
    """A language model.

    Attributes:
      model: functions and sizes, compiled into the loop (`lm.model.contract`).
      params: arrays that the functions need, passed in at every call.
      tokenizer: digest of its tokenizer; draft and target must agree on it. Empty: unknown.
      bos: the input-only id that starts documents; None if there is none.
    """

    model: Model
    params: Any
    tokenizer: str = ''
    bos: int | None = None


def transformer(
    config: Config, params: Any, tokenizer: str = '', bos: int | None = None,
    never: tuple[int, ...] = (),
) -> LM:  # fmt: skip
    """Returns a decoder transformer to decode with.

    Args:
      config, params: of the model. Padding rows of its tables count as ids: list them in `never`,
        or slice them off.
      tokenizer: digest of its tokenizer.
      bos: starts documents and is never drawn.
      never: further ids that are never drawn.
    """
    masked = never if bos is None else (bos, *never)
    return LM(stepped.model(config, tuple(sorted(set(masked)))), params, tokenizer, bos)


def for_decoding(lm: LM) -> LM:
    """Returns the model with its parameters in the platform's fastest layout for decoding.

    On one CPU device that is a copy (`lm.model.cpu_layout`). `generate` does this at every call; do
    it once before many calls, and for draft models.
    """
    return lm._replace(params=lm.model.layout(lm.params))
