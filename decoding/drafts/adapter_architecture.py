"""The adapter of an early exit as an architecture, so that a bundle can hold it by itself."""

import dataclasses
from typing import Any

from lm.checkpoints.architecture import Architecture
from lm.files import dataclass_json
from lm.model import config as config_lib
from lm.model import params
from lm.model.config import Config

_LAYERS = ('attention_norm_ND', 'wq_NDHC', 'wk_NDKC', 'wv_NDKC', 'wo_NHCD')


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


def leaves(config: AdapterConfig) -> dict[str, Any]:
    """Returns the nested dict of `Leaf`s of an adapter: a body of one layer without an MLP.

    Attention adds nothing at first: an untrained adapter is a plain early exit.
    """
    one = dataclasses.replace(config.target, n_layers=1, induction_init=False)
    body = params.leaves(one)['body']
    layers = {name: body['layers'][name] for name in _LAYERS}
    layers['wo_NHCD'] = layers['wo_NHCD']._replace(scale=None)
    return {'layers': layers, 'final_norm_D': body['final_norm_D']}


def _to_json(config: AdapterConfig) -> dict[str, Any]:
    return {'target': config_lib.to_dict(config.target), 'layers': config.layers}


ARCHITECTURE = Architecture(
    'adapter',
    _to_json,
    lambda fields: dataclass_json.read(AdapterConfig, fields, 'adapter config'),
    leaves,
    param_dtype=lambda config: config.target.param_dtype,
    vocab_size=lambda config: config.target.vocab_size,
)
