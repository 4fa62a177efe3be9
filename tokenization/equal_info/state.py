"""Where the rows of a batch are: the carry of the loops in `window_scan`."""

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
    """What a loop is compiled for; static.

    The leaves of the model's state that reading never changes, such as tables and parameters, are
    kept out of the loop's carry: it is copied at every call.
    """

    model: NextByteModel
    rule: Rule
    window_bits: int
    structure: jax.tree_util.PyTreeDef  # of the model's state
    moving: tuple[bool, ...]  # the leaves of it that change

    @property
    def precision(self) -> int:
        """Bits of the model's CDF."""
        return self.model.precision


@struct.dataclass
class Window:
    """The window that each row is in.

    Attributes:
      state: the moving leaves of the model, which has read `read_B` bytes of the window.
      interval: of those bytes.
      start_B: where in the row's text the window starts.
      read_B: bytes read.
      index_B: number of windows before this one.
      origin: the model's mark at the start of the window.
      end_B: bytes of the window if it ended at the best place so far; 0 for none yet.
      end_mark: the model's mark there.
      code_BL: the code there; while `replay_B`, the code that is looked for.
      replay_B: the code is known, and the first place that has it is being looked for.
      period: the model forgets after so many windows, int32 scalar; 0 for never.
      max_bytes: most bytes in a window, int32 scalar.
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
    code_BL: jax.Array
    replay_B: jax.Array
    period: jax.Array
    max_bytes: jax.Array
    fresh: Mark


def setting(model: NextByteModel, rule: Rule, window_bits: int) -> Setting:
    """Returns the static part; traces the model to see which leaves move."""

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
    """Returns the fixed leaves of the model, and the carry of both loops before the first step."""
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
        code_BL=jnp.zeros_like(interval.low_BL),
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
    """Returns the state of these leaves."""
    still, move = iter(fixed), iter(moving)
    leaves = [next(move) if moves else next(still) for moves in setting.moving]
    return jax.tree.unflatten(setting.structure, leaves)
