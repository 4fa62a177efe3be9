"""All drafters, at a given budget of nodes or a given draft length."""

import math
from typing import Any, NamedTuple

from decoding.drafter import Drafter
from decoding.drafts import chain, dynamic, early_exit, iid, lookup, recursive, recycling, template
from decoding.drafts.early_exit import Adapter
from decoding.model import LM
from decoding.sample import Sampler

# Row names -> display names.
NAMES = {
    'chain': 'chain',
    'iid': 'i.i.d. sequences (SpecTr)',
    'recursive_branching': 'recursive, branching (RSD-C)',
    'recursive': 'recursive, beam (RSD-S)',
    'dynamic': 'dynamic (DySpec)',
    'lookup': 'lookup',
    'recycling': 'recycling',
    'early_exit': 'early exit',
    'early_exit_adapter': 'early exit, adapter',
}
# Drafters that sample their trees from a draft model.
WITH_DRAFT_MODEL = ('chain', 'iid', 'recursive_branching', 'recursive', 'dynamic')

# RSD-C's branching factors for the budgets of Jeon et al. 2024, section 5: 2 + 4, 2 + 4 + 4, ...
FACTORS = {6: (2, 2), 10: (2, 2, 1), 14: (2, 2, 2), 21: (3, 2, 2), 30: (2, 2, 2, 2)}
_DEPTH = 8  # maximal depth of dynamic trees, which take one draft pass per level
_RANKS = 8  # successors per token that recycling keeps


class Parts(NamedTuple):
    """The models and settings that drafters are built from.

    Attributes:
      target: the model that verifies.
      draft: the draft model, or None.
      exit_layers: number of the target's layers that an early exit runs.
      adapter: parameters of the early exit's adapter, or None.
      longest: longest n-gram that lookup matches.
    """

    target: LM
    draft: LM | None
    exit_layers: int
    adapter: Adapter | None
    longest: int


def of_budget(name: str, parts: Parts, budget: int) -> Drafter:
    """Returns a drafter whose trees have `budget` nodes below the root.

    Multi-sequence shapes follow Jeon et al. 2024: for a budget of N, K sequences (or a beam of K)
    of N / K tokens, where K is the largest divisor of N up to sqrt(N). A prime N gives a chain.

    Raises:
      ValueError: `name` is unknown, a part is missing, or there is no tree of that budget.
    """
    if name == 'recursive_branching' and budget not in FACTORS:
        raise ValueError(
            f'{name}: no factors for a budget of {budget}; available budgets: '
            f'{", ".join(map(str, FACTORS))}'
        )
    width = max(k for k in range(1, math.isqrt(budget) + 1) if budget % k == 0)
    length = budget // width
    match name:
        case 'chain':
            return chain.chain(_draft(name, parts), budget)
        case 'recursive_branching':
            return recursive.branching(_draft(name, parts), FACTORS[budget])
        case 'dynamic':
            depth = min(budget, _DEPTH)
            return dynamic.dynamic(_draft(name, parts), budget + 1, depth)
        case 'lookup':
            return _lookup(parts, budget, min(budget, 2 * length))
        case 'recycling':
            rates = template.acceptance_of(_ranks(parts))
            return _recycling(parts, template.best_first(rates, budget + 1))
        case 'early_exit' | 'early_exit_adapter':
            return _early_exit(name, parts, budget)
    return _sequences(name, parts, width, length)


def of_length(name: str, parts: Parts, length: int, width: int) -> Drafter:
    """Returns a drafter of depth `length`, with at most `width` nodes per level.

    Raises:
      ValueError: `name` is unknown, or a part is missing.
    """
    match name:
        case 'chain':
            return chain.chain(_draft(name, parts), length)
        case 'recursive_branching':
            return recursive.branching(_draft(name, parts), (width, *[1] * (length - 1)))
        case 'dynamic':
            return dynamic.dynamic(_draft(name, parts), width * length + 1, length)
        case 'lookup':
            return _lookup(parts, width * length, length, width)
        case 'recycling':
            ranks = _ranks(parts)
            sizes = [min(width, ranks)] * length
            return _recycling(parts, template.of_levels(template.acceptance_of(ranks), sizes))
        case 'early_exit' | 'early_exit_adapter':
            return _early_exit(name, parts, length)
    return _sequences(name, parts, width, length)


def _sequences(name: str, parts: Parts, width: int, length: int) -> Drafter:
    """Returns a drafter with `width` nodes per level."""
    match name:
        case 'iid':
            return iid.iid(_draft(name, parts), width, length)
        case 'recursive':
            return recursive.beam(_draft(name, parts), width, length)
    raise ValueError(f'no drafter {name!r}; there are: {", ".join(NAMES)}')


def with_sampler(drafter: Drafter, sampler: Sampler) -> Drafter:
    """Returns the drafter with another draft distribution; causes no recompilation."""
    weights: Any = drafter.params
    if not hasattr(weights, 'sampler'):  # a deterministic drafter
        return drafter
    return drafter._replace(params=weights._replace(sampler=sampler))


def _draft(name: str, parts: Parts) -> LM:
    if parts.draft is None:
        raise ValueError(f'{name} needs a draft model: give a bundle of one with --draft')
    return parts.draft


def _lookup(parts: Parts, budget: int, length: int, branches: int = 4) -> Drafter:
    branches = max(branches, -(-budget // length))  # enough branches to fill the tree
    return lookup.lookup(nodes=budget + 1, length=length, branches=branches, longest=parts.longest)


def _ranks(parts: Parts) -> int:
    return min(_RANKS, parts.target.model.vocab_size)


def _recycling(parts: Parts, shape: template.Template) -> Drafter:
    vocab_size = parts.target.model.vocab_size
    return recycling.recycling(vocab_size, template=shape, ranks=_ranks(parts))


def _early_exit(name: str, parts: Parts, length: int) -> Drafter:
    adapter = parts.adapter if name == 'early_exit_adapter' else None
    if name == 'early_exit_adapter' and adapter is None:
        raise ValueError(f'{name} needs a trained adapter: see the speculative experiment')
    return early_exit.early_exit(parts.target, parts.exit_layers, length, adapter=adapter)
