"""Every architecture that a bundle may hold, by its name in config.json: one dict.

    loaded = bundle.load(path, architectures=ARCHITECTURES)

A new architecture is one file, beside the code that computes it, and one entry here. `lm` itself
knows only the transformer, since it imports neither `tokenization` nor `decoding`.
"""

from decoding.drafts import adapter_architecture
from lm.checkpoints.architecture import TRANSFORMER, Architecture
from tokenization.transfer import hypernetwork

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        TRANSFORMER,
        hypernetwork.ARCHITECTURE,
        adapter_architecture.ARCHITECTURE,
    )
}
