"""A named architecture: the functions by which a bundle saves and loads a model.

    config --to_json--> config.json --from_json--> config --leaves--> names, shapes, axes
                                                          --model---> functions that step it

`lm` has one, the transformer. Others live beside their own code and are passed to `bundle.save` and
`bundle.load`; `experiments.architectures` lists all of this repository's.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lm.model import config as config_lib
from lm.model import leaves as leaves_lib
from lm.model import params as params_lib
from lm.model import stepped
from lm.model.leaves import Params


class Architecture(NamedTuple):
    """Pure functions of a config, a frozen dataclass of any kind.

    Attributes:
      name: written to config.json.
      to_json: returns a config as plain JSON values.
      from_json: inverse of `to_json`; raises ValueError, naming the field, if a field is unknown,
        missing or has an invalid value.
      leaves: returns the nested dict of `lm.model.leaves.Leaf`s: one per parameter array. A bundle
        can be loaded by its top-level entries (`bundle.load_part`).
      param_dtype: returns the name of the parameters' dtype.
      vocab_size: returns the number of ids, including BOS; 0 if the model reads no ids.
      model: `(config, never=()) -> Model` (`lm.model.contract`); `never` lists ids that are never
        drawn. None for an architecture that cannot be stepped alone.
    """

    name: str
    to_json: Callable[[Any], dict[str, Any]]
    from_json: Callable[[dict[str, Any]], Any]
    leaves: Callable[[Any], dict[str, Any]]
    param_dtype: Callable[[Any], str] = lambda config: 'float32'
    vocab_size: Callable[[Any], int] = lambda config: 0
    model: Callable[..., Any] | None = None


TRANSFORMER = Architecture(
    'transformer',
    config_lib.to_dict,
    config_lib.from_dict,
    params_lib.leaves,
    param_dtype=lambda config: config.param_dtype,
    vocab_size=lambda config: config.vocab_size,
    model=stepped.model,
)
# The default architectures, by name.
KNOWN: Mapping[str, Architecture] = {TRANSFORMER.name: TRANSFORMER}


def named(name: Any, known: Mapping[str, Architecture]) -> Architecture:
    """Returns the architecture called `name`; raises ValueError, listing those known."""
    if isinstance(name, str) and name in known:
        return known[name]
    raise ValueError(
        f'architecture {name!r}; expected {" or ".join(known)}. '
        '`experiments.architectures.ARCHITECTURES` has all of this repository: '
        '`bundle.load(..., architectures={**ARCHITECTURES, mine.name: mine})` reads those and one '
        'of your own'
    )


def abstract(architecture: Architecture, config: Any, mesh: Mesh | None = None) -> Params:
    """Returns shapes and dtypes of the parameters, with shardings if a mesh is given."""
    return leaves_lib.abstract(architecture.leaves(config), architecture.param_dtype(config), mesh)
