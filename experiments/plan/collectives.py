"""Collectives of a compiled program: kind, size and number of executions.

XLA prints a loop's body once, so counting instructions of a model scanned over layers counts one
layer. Here each instruction is weighted by the trip counts of its enclosing loops.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from experiments.plan import hlo
from experiments.plan.hlo import Instruction
from lm.devices.mesh import Sizes

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'


class Collective(NamedTuple):
    """One collective.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the full array on one device: the result of an all-gather, the operand of all
        others.
      devices: size of the group that communicates.
      axis: mesh axis of the group: `data`, `sequence`, `model`, or several, as in `data+model`.
      times: number of executions in one call of the program.
      source: the operation of the traced program that it comes from, innermost names last.
    """

    kind: str
    size: float
    devices: int
    axis: str
    times: int
    source: str = ''

    @property
    def network_bytes(self) -> float:
        """Bytes that a device sends in all executions, by rings (Thakur et al. 2005, section 3).

        (g-1)/g of the full array for g devices; twice that for an all-reduce, which is a
        reduce-scatter and an all-gather; the full array for a permutation.
        """
        share = (self.devices - 1) / self.devices
        factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)
        return factor * self.size * self.times


class Program(NamedTuple):
    """The collectives of a program, and remarks on parts that could not be parsed reliably."""

    collectives: tuple[Collective, ...]
    remarks: tuple[str, ...]


def read(text: str, data: int = 1, model: int = 1, sequence: int = 1) -> Program:
    """Returns the collectives of a program compiled for a mesh of these sizes.

    Args:
      text: the result of `compiled.as_text()`.
      data, model, sequence: sizes of the mesh; devices are numbered in the order of its axes.
    """
    sizes = Sizes(data, sequence, model)
    module = hlo.parse(text)
    remarks: collections.Counter[str] = collections.Counter()
    # an asynchronous collective appears again in every fusion that it overlaps with
    begun = {
        _channel(instruction)
        for body in module.computations.values()
        if any(_ASYNC_START in i.rest for i in body)
        for instruction in body
        if _kind(instruction)
    }

    @functools.cache
    def found(name: str) -> collections.Counter[Collective]:
        total: collections.Counter[Collective] = collections.Counter()
        body = module.computations.get(name, [])
        starts = any(_ASYNC_START in i.rest for i in body)
        for instruction in body:
            if _kind(instruction) and (starts or _channel(instruction) not in begun):
                one, remark = _collective(instruction, sizes)
                total[one] += 1
                remarks.update(remark)
            inner = [found(callee) for callee in hlo.callees(instruction)]
            trips = hlo.trip_count(instruction, module) if instruction.opcode == 'while' else 1
            if trips is None and any(inner):
                remarks[f'loop {instruction.name}: trip count unknown, counted once'] += 1
            for counter in inner:
                for one, count in counter.items():
                    total[one] += count * (1 if trips is None else trips)
        return total

    # equal collectives from different places are merged into one entry
    result = tuple(one._replace(times=count) for one, count in found(module.entry).items())
    return Program(tuple(sorted(result, key=lambda c: -c.network_bytes)), tuple(remarks))


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix('-start')
    return kind if kind in KINDS else None


def _channel(instruction: Instruction) -> str:
    match = re.search(r'\bchannel_id=(\d+)', instruction.rest)
    return match[1] if match else instruction.name


def _collective(instruction: Instruction, mesh: Sizes) -> tuple[Collective, tuple[str, ...]]:
    kind = _kind(instruction)
    assert kind is not None
    arrays = hlo.array_bytes(instruction.type)
    remarks: tuple[str, ...] = ()
    named = re.search(r'\bop_name="([^"]*)"', instruction.rest)
    source = named[1] if named else ''
    if kind == 'collective-permute':
        pairs = re.findall(r'\{(\d+),(\d+)\}', instruction.rest)
        groups = np.asarray(pairs, np.int64).reshape(-1, 2)
        # the type of a start lists operand, result and two flags
        size = arrays[0]
        moving = groups[groups[:, 0] != groups[:, 1]]
        size *= len(moving) / max(len(groups), 1)
        return Collective(kind, size, 2, _axis(moving, mesh), 1, source), remarks
    text = instruction.rest.partition('replica_groups=')[2]
    read_groups = replica_groups(text, math.prod(mesh))
    if read_groups is None:
        remarks = (f'{instruction.name}: replica_groups of unknown form, taken as all devices',)
        read_groups = np.arange(math.prod(mesh))[None]
    devices = read_groups.shape[1]
    size = sum(arrays)
    if kind == 'all-gather' and instruction.opcode.endswith('-start'):
        size *= devices / (devices + 1)  # its type also lists the operand
    if kind == 'reduce-scatter':
        size *= devices
    return Collective(kind, size, devices, _axis(read_groups, mesh), 1, source), remarks


def _axis(groups: np.ndarray, mesh: Sizes) -> str:
    places = np.unravel_index(groups, mesh)
    names = [axis for axis, at in zip(mesh._fields, places) if (at != at[:, :1]).any()]
    return '+'.join(names) or 'none'


def replica_groups(text: str, devices: int) -> np.ndarray | None:
    """Returns the device groups of a collective, int `[groups, devices per group]`, or None.

    XLA prints them as lists, `{{0,1},{2,3}}`; as a transposed range, `[2,2]<=[2,2]T(1,0)`; or by
    mesh axes, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`. For any other form, returns
    None.
    """
    if text.startswith('{}'):
        return np.arange(devices)[None]
    if lists := re.match(r'\{(\{[\d,{}]*\})\}', text):
        rows = re.findall(r'\{([\d,]*)\}', lists[1])
        return np.asarray([[int(x) for x in row.split(',')] for row in rows])
    if iota := re.match(r'\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', text):
        return _range(iota[2]).reshape(_integers(iota[1]))
    form = r'mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}'
    if mesh := re.match(form, text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        sizes = [int(size) for size in axes.values()]
        joined = re.findall(r"'(\w+)'", mesh[3])
        if ':' in mesh[3] or not set(joined) <= set(axes):
            return None
        order = _range(mesh[2] or f'[{math.prod(sizes)}]').reshape(sizes)
        last = [list(axes).index(name) for name in joined]
        first = [i for i in range(len(sizes)) if i not in last]
        group = math.prod(sizes[i] for i in last)
        return order.transpose(*first, *last).reshape(-1, group)
    return None


def _range(text: str) -> np.ndarray:
    """Returns 0, 1, 2, ... in the order of a transposed range such as `[2,3]T(1,0)`."""
    shape, _, permutation = text.partition('T')
    sizes = _integers(shape.strip('[]'))
    values = np.arange(math.prod(sizes)).reshape(sizes)
    return values.transpose(_integers(permutation.strip('()'))) if permutation else values


def _integers(text: str) -> list[int]:
    return [int(x) for x in text.split(',')]
