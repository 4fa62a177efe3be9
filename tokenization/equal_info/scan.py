"""The inner loops of `equal_info.windows`: one model call per step, for all rows of a batch.

A step either reads one more byte of a row's window or ends the window. If the window ends before
the last byte read, the model is rewound to a mark. All decisions are data: the loop is one
`lax.scan` of a fixed number of steps, called until every row is done.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenization.coding.next_byte import State
from tokenization.equal_info import limbs
from tokenization.equal_info import rules as window_rules
from tokenization.equal_info import state as window_state
from tokenization.equal_info.rules import Interval
from tokenization.equal_info.state import Leaves, Setting, Window


class Emitted(NamedTuple):
    """The output of an encoder step: for rows with `ended_B`, a code and its number of bytes."""

    ended_B: jax.Array
    code_BZ: jax.Array
    count_B: jax.Array


class Read(NamedTuple):
    """The output of a decoder step: a byte, for rows with `position_B >= 0` at that position."""

    position_B: jax.Array
    byte_B: jax.Array


@partial(jax.jit, static_argnames=('setting', 'steps'))
def encode_steps(
    setting: Setting,
    fixed: Leaves,
    window: Window,
    text_BL: jax.Array,
    length_B: jax.Array,
    steps: int,
) -> tuple[Window, Emitted]:
    """Runs `steps` steps of the encoder.

    Args:
      setting: static.
      fixed: from `state.first_window`.
      window: the carry, from `state.first_window` or the last call.
      text_BL: uint8 `[B, longest]`, padded.
      length_B: int32 `[B]`.
      steps: static.

    Returns:
      The carry, and the output of each step, with a leading axis of `steps`.
    """
    body = partial(_encode_step, setting, fixed, text_BL, length_B)
    return jax.lax.scan(body, window, None, length=steps)


@partial(jax.jit, static_argnames=('setting', 'steps'))
def decode_steps(
    setting: Setting,
    fixed: Leaves,
    window: Window,
    codes_BJZ: jax.Array,
    number_B: jax.Array,
    length_B: jax.Array,
    steps: int,
) -> tuple[Window, Read]:
    """Runs `steps` steps of the decoder; see `encode_steps`.

    Args:
      setting: static.
      fixed: from `state.first_window`.
      window: the carry.
      codes_BJZ: uint32 limbs `[B, windows, Z]`, padded.
      number_B: windows of each row, int32 `[B]`.
      length_B: bytes of each row's text, int32 `[B]`. A row is done after its last window or byte.
      steps: static.
    """
    body = partial(_decode_step, setting, fixed, codes_BJZ, number_B, length_B)
    return jax.lax.scan(body, window, None, length=steps)


def _encode_step(
    setting: Setting,
    fixed: Leaves,
    text_BL: jax.Array,
    length_B: jax.Array,
    window: Window,
    xs: None,
) -> tuple[Window, Emitted]:
    del xs
    rule, precision = setting.rule, setting.precision
    state = window_state.join(setting, fixed, window.state)
    cdf_BV = jax.lax.optimization_barrier(setting.model.cdf(state))
    here = setting.model.mark(state)
    left_B = length_B - window.start_B
    last_B = window.read_B == window.max_bytes
    legal_B, code_BZ = rule.close(window.interval, cdf_BV, last_B, precision)
    legal_B &= window.read_B > 0
    # A replay looks for the first position with the code; no other will do.
    found_B = window.replay_B & legal_B & limbs.equal(code_BZ, window.code_BZ)
    better_B = jnp.where(window.replay_B, found_B, legal_B)
    end_B = jnp.where(better_B, window.read_B, window.end_B)
    end_mark = _choose(better_B, here, window.end_mark)
    code_BZ = jnp.where(better_B[:, None], code_BZ, window.code_BZ)

    at_B1 = jnp.minimum(window.start_B + window.read_B, text_BL.shape[1] - 1)[:, None]
    byte_B = jnp.take_along_axis(text_BL, at_B1, axis=1)[:, 0].astype(jnp.int32)
    below = window_rules.child(window.interval, cdf_BV, byte_B, precision)
    go_on_B = (window.read_B < left_B) & ~last_B & ~found_B
    go_on_B &= window_rules.has_cell(below, precision)
    # At the end of the text there may be no legal position. Then any cell of the interval will do,
    # as the decoder cuts the text at its length.
    cut_B = (end_B == 0) & (window.read_B == left_B)
    lowest_BZ, _ = window_rules.cells(window.interval, precision)
    code_BZ = jnp.where((cut_B & ~go_on_B)[:, None], lowest_BZ, code_BZ)
    end_B = jnp.where(cut_B & ~go_on_B, window.read_B, end_B)

    replay_B = jnp.zeros_like(found_B)
    if rule.reader == 'first':
        replay_B = ~go_on_B & ~window.replay_B & (left_B > 0)
    ended_B = ~go_on_B & ~replay_B & (left_B > 0)
    best = dataclasses.replace(window, end_B=end_B, end_mark=end_mark, code_BZ=code_BZ)
    after = _advance(setting, state, best, byte_B, below, go_on_B, ended_B, replay_B)
    return after, Emitted(ended_B, code_BZ, end_B)


def _decode_step(
    setting: Setting,
    fixed: Leaves,
    codes_BJZ: jax.Array,
    number_B: jax.Array,
    length_B: jax.Array,
    window: Window,
    xs: None,
) -> tuple[Window, Read]:
    del xs
    rule, precision = setting.rule, setting.precision
    state = window_state.join(setting, fixed, window.state)
    cdf_BV = jax.lax.optimization_barrier(setting.model.cdf(state))
    here = setting.model.mark(state)
    at_B = jnp.minimum(window.index_B, codes_BJZ.shape[1] - 1)
    code_BZ = jnp.take_along_axis(codes_BJZ, at_B[:, None, None], axis=1)[:, 0]
    active_B = (window.index_B < number_B) & (window.start_B < length_B)
    last_B = window.read_B == window.max_bytes

    match_B = jnp.zeros_like(last_B)
    if rule.reader != 'deepest':
        _, own_BZ = rule.close(window.interval, cdf_BV, last_B, precision)
        match_B = (window.read_B > 0) & limbs.equal(own_BZ, code_BZ)
    byte_B, inside_B, below = window_rules.descend(window.interval, cdf_BV, code_BZ, precision)
    go_on_B = active_B & inside_B & ~last_B & (window.start_B + window.read_B < length_B)
    if rule.reader == 'first':
        go_on_B &= ~match_B
    # A damaged code, which no text has, decodes to the deepest string.
    better_B = match_B | (~go_on_B & (window.end_B == 0))
    end_B = jnp.where(better_B, window.read_B, window.end_B)
    end_mark = _choose(better_B, here, window.end_mark)
    position_B = jnp.where(go_on_B, window.start_B + window.read_B, -1)

    best = dataclasses.replace(window, end_B=end_B, end_mark=end_mark)
    ended_B = active_B & ~go_on_B
    never_B = jnp.zeros_like(ended_B)
    after = _advance(setting, state, best, byte_B, below, go_on_B, ended_B, never_B)
    return after, Read(position_B, byte_B.astype(jnp.uint8))


def _advance(
    setting: Setting,
    state: State,
    window: Window,
    byte_B: jax.Array,
    below: Interval,
    go_on_B: jax.Array,
    ended_B: jax.Array,
    replay_B: jax.Array,
) -> Window:
    """Returns the carry after a step: one more byte, the next window, or a replay of this one.

    Other rows are done. They are rewound to the start of the model at every step, so that they
    never read past its context.
    """
    model = setting.model
    index_B = window.index_B + ended_B
    forget_B = (window.period > 0) & (index_B % jnp.maximum(window.period, 1) == 0)
    next_mark = _choose(ended_B & ~forget_B, window.end_mark, window.fresh)
    origin = _choose(ended_B, next_mark, window.origin)
    back = _choose(replay_B, window.origin, next_mark)
    stepped = jax.lax.optimization_barrier(model.step(state, byte_B))
    state = model.rewind(stepped, _choose(go_on_B, model.mark(stepped), back))
    whole = window_rules.whole(len(byte_B), setting.window_bits, setting.precision)
    fresh_B = ~go_on_B
    return dataclasses.replace(
        window,
        state=window_state.split(setting, state)[1],
        interval=_choose(fresh_B, whole, below),
        start_B=window.start_B + jnp.where(ended_B, window.end_B, 0),
        read_B=jnp.where(fresh_B, 0, window.read_B + 1),
        index_B=index_B,
        origin=origin,
        end_B=jnp.where(fresh_B, 0, window.end_B),
        replay_B=jnp.where(fresh_B, replay_B, window.replay_B),
    )


def _choose(mask_B: jax.Array, yes: Any, no: Any) -> Any:
    """Returns `where(mask_B, yes, no)` for pytrees whose leaves have a leading axis B."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(mask_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(leaf, yes, no)
