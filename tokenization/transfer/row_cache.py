"""A least-recently-used cache of the rows that a hypernetwork predicted, on the device.

The rows are in tables of fixed shape; the host maps units to slots, in order of last use. A batch's
missing units are predicted in chunks of one shape, so nothing compiles after the first call, and
cached and new rows are bit-identical:

    slots, cache = Slots(capacity), init(rows, capacity, pieces=7)
    cache, slot_U = fetch(rows, cache, slots, merged.units, chunk=256, pieces=7)
    x_BLD = cache.tables['input_VD'][slot_U[batch.index_BL]]
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tokenization.transfer.dynamic import to_pieces
from tokenization.vocabularies.pair_merging import Unit

# Pieces, int32 [U, P] padded with -1, -> rows [U, D] by table. Jitted; each row depends only on its
# own pieces.
Rows = Callable[[jax.Array], dict[str, jax.Array]]


@flax.struct.dataclass
class RowCache:
    """Predicted rows.

    Attributes:
      tables: `[capacity, D]`, by the hypernetwork's names.
    """

    tables: dict[str, jax.Array]


class Slots:
    """The slot of each cached unit, from the least to the most recently used.

    Attributes:
      capacity: rows of the cache.
      found, missed: distinct units, summed over batches, that were cached or had to be predicted.
    """

    def __init__(self, capacity: int):
        """Starts empty; raises ValueError for a capacity below 1."""
        if capacity < 1:
            raise ValueError(f'capacity {capacity}: expected at least 1 row')
        self.capacity = capacity
        self.found = self.missed = 0
        self._slot: OrderedDict[Unit, int] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slot)

    def make_room(self, units: Sequence[Unit]) -> tuple[list[Unit], list[int]]:
        """Returns the units without a row, and a free slot for each; `fill` assigns them.

        Marks the units as used. If there is no room, the least recently used units are evicted.

        Raises:
          ValueError: there are more units than the capacity; nothing is changed.
        """
        distinct = dict.fromkeys(units)
        if len(distinct) > self.capacity:
            raise ValueError(
                f'{len(distinct)} distinct units in one batch: the cache has {self.capacity} rows; '
                'make it larger, or the batch smaller'
            )
        missing = [unit for unit in distinct if unit not in self._slot]
        for unit in distinct:
            if unit in self._slot:
                self._slot.move_to_end(unit)
        # The batch's own units are last in the order, and all of them fit.
        while len(self._free) < len(missing):
            self._free.append(self._slot.popitem(last=False)[1])
        self.found += len(distinct) - len(missing)
        self.missed += len(missing)
        return missing, self._free[len(self._free) - len(missing) :]

    def fill(self, units: Sequence[Unit]) -> None:
        """Assigns to the units the slots that `make_room` returned for them."""
        start = len(self._free) - len(units)
        self._slot.update(zip(units, self._free[start:], strict=True))
        del self._free[start:]

    def of(self, units: Sequence[Unit]) -> np.ndarray:
        """Returns the slots of units, int32 `[U]`; raises KeyError for a unit without one."""
        return np.fromiter((self._slot[unit] for unit in units), np.int32, len(units))


def init(rows: Rows, capacity: int, pieces: int) -> RowCache:
    """Returns an empty cache for the tables that `rows` predicts from `pieces` ids per unit."""
    one = jax.eval_shape(rows, jax.ShapeDtypeStruct((1, pieces), jnp.int32))
    return RowCache({n: jnp.zeros((capacity, *x.shape[1:]), x.dtype) for n, x in one.items()})


@functools.partial(jax.jit, donate_argnums=0)
def insert(cache: RowCache, slot_U: jax.Array, rows: dict[str, jax.Array]) -> RowCache:
    """Returns the cache with rows `[U, D]` in slots int32 `[U]`; donates the given cache.

    A slot out of range drops its row.
    """
    return RowCache(
        {name: x.at[slot_U].set(rows[name], mode='drop') for name, x in cache.tables.items()}
    )


def predict(rows: Rows, units: Sequence[Unit], chunk: int, pieces: int) -> list[dict]:
    """Returns the rows of units in chunks, each `[chunk, D]`; the last one is padded.

    All calls have one shape, so that a row's bits do not depend on the number of units.
    """
    parts = []
    for start in range(0, len(units), chunk):
        some = list(units[start : start + chunk])
        some += some[:1] * (chunk - len(some))
        parts.append(rows(jnp.asarray(to_pieces(some, chunk, pieces))))
    return parts


def fetch(
    rows: Rows, cache: RowCache, slots: Slots, units: Sequence[Unit], chunk: int, pieces: int
) -> tuple[RowCache, np.ndarray]:
    """Returns the cache with a row for each of a batch's units, and their slots, int32 `[U]`.

    Args:
      rows: the hypernetwork, jitted once.
      cache: from `init` or the last call; it is donated.
      slots: those of this cache; updated in place, and still consistent if predicting fails.
      units: those of the batch, `Merged.units`.
      chunk: units predicted at a time.
      pieces: the greatest number of source ids per unit.

    Raises:
      ValueError: a batch needs more rows than the cache has, or a unit has too many pieces.
    """
    longest = max(map(len, units), default=0)
    if longest > pieces:
        raise ValueError(f'{longest} source ids in the longest unit: expected at most {pieces}')
    missing, free = slots.make_room(units)
    for index, part in enumerate(predict(rows, missing, chunk, pieces)):
        slot_U = np.full(chunk, slots.capacity, np.int32)
        some = free[index * chunk : (index + 1) * chunk]
        slot_U[: len(some)] = some
        cache = insert(cache, jnp.asarray(slot_U), part)
    slots.fill(missing)
    return cache, slots.of(units)
