"""Documents that are one text feature of a prepared TFDS dataset, read lazily."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.file_documents import contiguous


@dataclasses.dataclass
class TfdsDocuments(Sequence[bytes]):
    """One text feature of a prepared TFDS dataset; reopens its files after unpickling.

    Attributes:
      builder_dir, split: folder of the dataset, and one of its splits.
      feature: name of the text feature.
      first, last: half-open range of documents; `last=None` is the end.
    """

    builder_dir: str
    split: str
    feature: str
    first: int = 0
    last: int | None = None
    _source: Any = dataclasses.field(default=None, repr=False, compare=False)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # takes seconds to import

        return tfds.builder_from_directory(self.builder_dir)

    def _open(self) -> Any:
        if self._source is None:
            self._source = self._builder().as_data_source(split=self.split)
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_source': None}

    def __len__(self) -> int:
        return (len(self._open()) if self.last is None else self.last) - self.first

    def __getitem__(self, index: Any) -> Any:
        """Returns the bytes of one document, or `TfdsDocuments` for a slice of step 1."""
        if isinstance(index, slice):
            start, stop = contiguous(index, len(self))
            return dataclasses.replace(self, first=self.first + start, last=self.first + stop)
        if not -len(self) <= index < len(self):
            raise IndexError(f'document {index} of {len(self)}')
        return self._open()[self.first + index % len(self)][self.feature]

    @property
    def size(self) -> int:
        """Approximate bytes of all documents, from the dataset's own metadata."""
        split = self._builder().info.splits[self.split.partition('[')[0]]
        return split.num_bytes * len(self) // max(split.num_examples, 1)

    def starts(self, parts: int) -> list[int]:
        """Returns the first document of each of `parts` parts with equal counts, and the end."""
        return [i * len(self) // parts for i in range(parts + 1)]

    def identity(self) -> bytes:
        """Returns a cheap fingerprint of the documents, without reading them."""
        name = f'{self._builder().info.full_name}/{self.split}/{self.feature}'
        return f'{name} {len(self)}'.encode()
