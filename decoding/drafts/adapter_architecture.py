"""The adapter of an early exit as an architecture, so that it can have a bundle of its own."""

import dataclasses
from typing import Any

from decoding.drafts import adapter
from lm.checkpoints.architecture import Architecture
from lm.files import dataclass_json
from lm.model import config as config_lib
from lm.model.config import Config


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """An adapter of one target.

    Attributes:
      target: the target's config, from which the adapter's widths follow.
      layers: E, layers of the target below the adapter.
    """

    target: Config
    layers: int

    def __post_init__(self):
        if not 1 <= self.layers < self.target.n_layers:
            raise ValueError(
                f'AdapterConfig.layers: {self.layers}; expected at least 1, and fewer than the '
                f'target has: {self.target.n_layers}'
            )


def _to_json(config: AdapterConfig) -> dict[str, Any]:
    return {'target': config_lib.to_dict(config.target), 'layers': config.layers}


ARCHITECTURE = Architecture(
    'adapter',
    _to_json,
    lambda fields: dataclass_json.read(AdapterConfig, fields, 'adapter config'),
    lambda config: adapter.leaves(config.target),
    param_dtype=lambda config: config.target.param_dtype,
    vocab_size=lambda config: config.target.vocab_size,
)
