"""The carry of the loops in `tokenization.equal_info.scan`: the current window of every row."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from tokenization.coding.next_byte import Mark, NextByteModel, State
from tokenization.equal_info import rules as window_rules
from tokenization.equal_info.rules import Interval, Rule

Leaves = tuple[jax.Array, ...]


class Setting(NamedTuple):
    """The static arguments of a loop.

    Tables, parameters and other leaves of the model's state that reading never changes are kept
    out of the loop's carry, which is copied at every call.
    """

    model: NextByteModel
    rule: Rule
    window_bits: int
    structure: jax.tree_util.PyTreeDef  # of the model's state
    moving: tuple[bool, ...]  # which of its leaves change

    @property
    def precision(self) -> int:
        """Bits of the model's CDF."""
        return self.model.precision


@struct.dataclass
class Window:
    """The current window of each row.

    Attributes:
      state: the moving leaves of the model, which has read `read_B` bytes of the window.
      interval: the interval of those bytes.
      start_B: the position in the row's text at which the window starts.
      read_B: bytes of the window read so far.
      index_B: number of windows before this one.
      origin: the model's mark at the start of the window.
      end_B: size of the window if it ended at the best position so far; 0 if there is none yet.
      end_mark: the model's mark at that position.
      code_BZ: the code at that position; in a replay, the code to find.
      replay_B: whether the row is replayed, to find the first position that has its code.
      period: the model is reset after this many windows, int32 scalar; 0 for never.
      max_bytes: the greatest size of a window, int32 scalar.
      fresh: the model's mark before it has read anything.
    """

    state: Leaves
    interval: Interval
    start_B: jax.Array
    read_B: jax.Array
    index_B: jax.Array
    origin: Mark
    end_B: jax.Array
    end_mark: Mark
    code_BZ: jax.Array
    replay_B: jax.Array
    period: jax.Array
    max_bytes: jax.Array
    fresh: Mark


def setting(model: NextByteModel, rule: Rule, window_bits: int) -> Setting:
    """Returns the static arguments; traces the model to see which leaves of its state change."""

    def read(state: State, byte_B: jax.Array, mark: Mark) -> tuple[State, State]:
        return model.step(state, byte_B), model.rewind(state, mark)

    state = jax.eval_shape(partial(model.start, 1))
    byte_B, mark = jax.ShapeDtypeStruct((1,), jnp.int32), jax.eval_shape(model.mark, state)
    jaxpr = jax.make_jaxpr(read)(state, byte_B, mark).jaxpr
    before = jaxpr.invars[: len(jax.tree.leaves(state))]
    stepped, rewound = jaxpr.outvars[: len(before)], jaxpr.outvars[len(before) :]
    moving = tuple(a is not x or b is not x for x, a, b in zip(before, stepped, rewound))
    return Setting(model, rule, window_bits, jax.tree.structure(state), moving)


def first_window(
    setting: Setting, batch: int, period: int, max_bytes: int
) -> tuple[Leaves, Window]:
    """Returns the fixed leaves of the model, and the initial carry of both loops."""
    state = setting.model.start(batch)
    mark = setting.model.mark(state)
    zero = jnp.zeros(batch, jnp.int32)
    interval = window_rules.whole(batch, setting.window_bits, setting.precision)
    fixed, moving = split(setting, state)
    window = Window(
        state=moving,
        interval=interval,
        start_B=zero,
        read_B=zero,
        index_B=zero,
        origin=mark,
        end_B=zero,
        end_mark=mark,
        code_BZ=jnp.zeros_like(interval.low_BZ),
        replay_B=jnp.zeros(batch, bool),
        period=jnp.int32(period),
        max_bytes=jnp.int32(max_bytes),
        fresh=mark,
    )
    return fixed, window


def split(setting: Setting, state: State) -> tuple[Leaves, Leaves]:
    """Returns the fixed and the moving leaves of a state."""
    leaves = list(zip(jax.tree.leaves(state), setting.moving))
    return tuple(x for x, moves in leaves if not moves), tuple(x for x, moves in leaves if moves)


def join(setting: Setting, fixed: Leaves, moving: Leaves) -> State:
    """Returns the state with these leaves; the inverse of `split`."""
    still, move = iter(fixed), iter(moving)
    leaves = [next(move) if moves else next(still) for moves in setting.moving]
    return jax.tree.unflatten(setting.structure, leaves)
