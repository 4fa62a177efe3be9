"""Draws one decoding round: the draft tree and the accepted path."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
from etils import epath

from decoding import generate, rounds, stop, verify
from decoding.drafter import Context, Drafter, Text
from decoding.model import LM, for_decoding
from decoding.rounds import Inputs, Plan
from decoding.sample import Sampler
from experiments import plots

_TAKEN, _LEFT = plots.COLORS[0], '#888888'
_CONTEXT = 24  # bytes of preceding text in the title


class Round(NamedTuple):
    """A draft tree and the result of its verification.

    Attributes:
      token_T, parent_T, depth_T: the reachable nodes, root first.
      path: indices of the accepted nodes, root first.
      next: the token sampled from the target after the last accepted node.
      before: ids of the text up to the root.
    """

    token_T: np.ndarray
    parent_T: np.ndarray
    depth_T: np.ndarray
    path: list[int]
    next: int
    before: list[int]


def best_round(
    lm: LM, drafter: Drafter, sampler: Sampler, prompt: list[int], key: jax.Array,
    new_tokens: int, count: int,
) -> Round:  # fmt: skip
    """Returns the round with the most accepted tokens among the first `count` after a prompt.

    Args:
      lm, drafter, sampler: as for `generate`.
      prompt: ids of one row.
      key: random key of that row.
      new_tokens: maximal number of new tokens; give the same as to `generate` to reuse its compiled
        programs.
      count: number of rounds.
    """
    lm, method = for_decoding(lm), drafter.method
    length = len(prompt)
    size = generate.bucket(length + new_tokens)
    verifier = verify.default_for(method.trees)
    plan = Plan(lm.model, method, verifier, size + method.nodes)
    token_BS = np.zeros((1, size), np.int32)
    token_BS[0, :length] = prompt
    text = Text(jnp.asarray(token_BS), jnp.asarray([length], jnp.int32), key[None])
    stops = stop.none(lm.model.vocab_size, 1)
    inputs = Inputs(lm.params, drafter.params, None, sampler, stops.table)
    prompt_BL = jnp.asarray(token_BS[:, : generate.bucket(length)])
    limit_B = jnp.asarray([length + new_tokens], jnp.int32)
    state = rounds.prefill(plan, inputs, prompt_BL, text, limit_B, stops.start_B)

    @jax.jit
    def look(inputs, state):
        context = Context(state.text, inputs.params, state.memory)
        proposal = method.propose(inputs.draft, state.draft, context)
        tree = proposal.tree
        scores, _, _ = rounds.target_pass(plan, inputs.params, proposal, context)
        distribution = rounds.distribution(plan, inputs, tree, scores, state.text)
        return tree, verifier.verify(tree, distribution, state.text, method.depth, method.branching)

    seen: list[Round] = []
    while len(seen) < count and not state.done_B[0]:
        tree, verdict = look(inputs, state)
        seen.append(_of_row(*jax.device_get((tree, verdict, state.text))))
        state = rounds.loop(plan, inputs, state, 1)
    return max(seen, key=lambda one: len(one.path))


def _of_row(tree, verdict, text: Text) -> Round:
    """Returns the first row of a batch, without unreachable nodes."""
    kept = [0]
    for node in range(1, tree.token_BT.shape[1]):
        if tree.valid_BT[0, node] and tree.parent_BT[0, node] in kept:
            kept.append(node)
    index = {node: i for i, node in enumerate(kept)}
    accepted = int(verdict.accepted_B[0])
    return Round(
        tree.token_BT[0, kept],
        np.array([index.get(int(tree.parent_BT[0, node]), -1) for node in kept]),
        tree.depth_BT[0, kept],
        [index[int(node)] for node in verdict.path_BP[0, : accepted + 1]],
        int(verdict.next_B[0]),
        text.token_BS[0, : int(text.length_B[0])].tolist(),
    )


def draw(path: epath.PathLike, one: Round, token_bytes: Sequence[bytes], drafter: str) -> None:
    """Saves a drawing of a round, with depth from left to right and the accepted path in colour."""
    x_T, y_T = one.depth_T, _heights(one)
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=150, layout='constrained')
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    taken = set(one.path)
    for node in range(1, len(x_T)):
        parent = one.parent_T[node]
        style = {'color': _TAKEN, 'linewidth': 2.5} if node in taken else {'color': '#cccccc'}
        axes.plot([x_T[parent], x_T[node]], [y_T[parent], y_T[node]], zorder=1, **style)
    last = one.path[-1]
    bonus = x_T[last] + 0.62, y_T[last]
    axes.plot([x_T[last], bonus[0]], [y_T[last], bonus[1]], ':', color=plots.COLORS[1], zorder=1)
    _label(axes, *bonus, _shown(token_bytes[one.next]), plots.COLORS[1])
    for node in range(len(x_T)):
        color = _TAKEN if node in taken else _LEFT
        _label(axes, x_T[node], y_T[node], _shown(token_bytes[one.token_T[node]]), color)
    before = b''.join(token_bytes[i] for i in one.before)[-_CONTEXT:]
    axes.set_title(
        f'{drafter}: {len(x_T) - 1} nodes after "…{_shown(before)}", {len(one.path)} tokens',
        loc='left', fontsize=12, fontweight='bold', parse_math=False,
    )  # fmt: skip
    depths = range(int(x_T.max()) + 1)
    axes.set_xticks(depths, ['root', *map(str, depths[1:])])
    axes.set_xlabel(
        'depth   (blue: accepted; orange: then sampled from the target; grey: rejected)'
    )
    axes.set_yticks([])
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.margins(0.08, 0.12)
    plots.save(path, figure)


def _heights(one: Round) -> np.ndarray:
    """Returns a height for each node: leaves in depth-first order, parents centred on children.

    The first child is on top.
    """
    children: list[list[int]] = [[] for _ in one.parent_T]
    for node, parent in enumerate(one.parent_T[1:], 1):
        children[parent].append(node)
    y_T = np.zeros(len(children))
    leaves = 0

    def place(node: int) -> None:
        nonlocal leaves
        for child in children[node]:
            place(child)
        if children[node]:
            y_T[node] = np.mean([y_T[child] for child in children[node]])
        else:
            y_T[node], leaves = -leaves, leaves + 1

    place(0)
    return y_T


def _label(axes, x: float, y: float, text: str, color: str) -> None:
    axes.text(
        x, y, text, color='white', ha='center', va='center', fontsize=10, family='monospace',
        bbox={'boxstyle': 'round', 'facecolor': color, 'edgecolor': 'none'}, parse_math=False,
    )  # fmt: skip


def _shown(data: bytes) -> str:
    """Returns bytes as text with visible blanks and control characters."""
    text = data.decode('utf-8', 'backslashreplace')
    text = text.replace(' ', '␣').replace('\n', '↵').replace('\t', '→')
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text) or '∅'
