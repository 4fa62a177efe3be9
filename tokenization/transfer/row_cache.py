"""Rows that a hypernetwork predicted, kept on the device until room is needed.

The rows lie in tables of fixed shape; the host knows which unit has which slot, and which units
were used last. What a batch lacks is predicted in chunks of one shape, so nothing compiles after
the first call, and a row has the same bits whether it was kept or is new:

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

# int32 pieces [U, P], -1 after a unit's last -> tables [U, D] by name. Jitted; each row depends on
# its own pieces alone.
Rows = Callable[[jax.Array], dict[str, jax.Array]]


@flax.struct.dataclass
class RowCache:
    """Predicted rows.

    Attributes:
      tables: by name, as the hypernetwork names them: `[capacity, D]`.
    """

    tables: dict[str, jax.Array]


class Slots:
    """Which unit has which row of a cache, from the least to the most recently used.

    Attributes:
      capacity: rows of the cache.
      found, missed: distinct units of all batches that were there, and that had to be predicted.
    """

    def __init__(self, capacity: int):
        """Knows no unit yet; raises ValueError for a capacity below 1."""
        if capacity < 1:
            raise ValueError(f'capacity {capacity}: expected at least 1 row')
        self.capacity = capacity
        self.found = self.missed = 0
        self._slot: OrderedDict[Unit, int] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slot)

    def make_room(self, units: Sequence[Unit]) -> tuple[list[Unit], list[int]]:
        """Returns the units that have no row, and free slots for them, which stay free.

        The units at hand count as used; where there is no room, those unused for longest go.

        Raises:
          ValueError: they are more than the capacity; nothing is changed.
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
        # the units at hand are the last in the order, and there is room for all of them
        while len(self._free) < len(missing):
            self._free.append(self._slot.popitem(last=False)[1])
        self.found += len(distinct) - len(missing)
        self.missed += len(missing)
        return missing, self._free[len(self._free) - len(missing) :]

    def fill(self, units: Sequence[Unit]) -> None:
        """Notes that the units now lie in the slots that `make_room` gave for them."""
        start = len(self._free) - len(units)
        self._slot.update(zip(units, self._free[start:], strict=True))
        del self._free[start:]

    def of(self, units: Sequence[Unit]) -> np.ndarray:
        """Returns the slots of units, int32 `[U]`; KeyError for one that has none."""
        return np.fromiter((self._slot[unit] for unit in units), np.int32, len(units))


def init(rows: Rows, capacity: int, pieces: int) -> RowCache:
    """Returns an empty cache for the tables that `rows` predicts from `pieces` ids a unit."""
    one = jax.eval_shape(rows, jax.ShapeDtypeStruct((1, pieces), jnp.int32))
    return RowCache({n: jnp.zeros((capacity, *x.shape[1:]), x.dtype) for n, x in one.items()})


@functools.partial(jax.jit, donate_argnums=0)
def insert(cache: RowCache, slot_U: jax.Array, rows: dict[str, jax.Array]) -> RowCache:
    """Returns the cache with rows `[U, D]` in slots int32 `[U]`; a slot that is none drops its row.

    The cache given is used up.
    """
    return RowCache(
        {name: x.at[slot_U].set(rows[name], mode='drop') for name, x in cache.tables.items()}
    )


def predict(rows: Rows, units: Sequence[Unit], chunk: int, pieces: int) -> list[dict]:
    """Returns the rows of units, `chunk` at a time: each `[chunk, D]`, the last one filled up.

    One shape for every call, so that a row's bits do not depend on how many others there are.
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
      cache: what `init` or the last call returned; it is used up.
      slots: of this cache; it is changed, and still right if predicting fails.
      units: of the batch, `Merged.units`.
      chunk: units predicted at a time.
      pieces: source ids a unit at most.

    Raises:
      ValueError: a batch needs more rows than the cache has, or a unit has too many pieces.
    """
    longest = max(map(len, units), default=0)
    if longest > pieces:
        raise ValueError(f'{longest} source ids in the longest unit: there is room for {pieces}')
    missing, free = slots.make_room(units)
    for index, part in enumerate(predict(rows, missing, chunk, pieces)):
        slot_C = np.full(chunk, slots.capacity, np.int32)
        some = free[index * chunk : (index + 1) * chunk]
        slot_C[: len(some)] = some
        cache = insert(cache, jnp.asarray(slot_C), part)
    slots.fill(missing)
    return cache, slots.of(units)
