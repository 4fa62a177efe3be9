"""Parses the text of a compiled program: computations, call graph, and trip counts of loops."""

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
_SOURCE = re.compile(r'\bop_name="([^"]*)"')
_CALLEE = re.compile(r'\b(?:body|calls|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')


class Instruction(NamedTuple):
    """One line, `name = type opcode(rest`; `rest` holds operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r'%([\w.\-]+)', self.rest.partition(')')[0])


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: name -> instructions in order; the last one is the result.
      instructions: all instructions by name; XLA's names are unique.
      entry: name of the entry computation.
    """

    computations: dict[str, list[Instruction]]
    instructions: dict[str, Instruction]
    entry: str


class Copy(NamedTuple):
    """An array that a program copies or transposes within device memory (HBM).

    Attributes:
      array: type and shape, as in `bf16[8,128]`.
      size: bytes per device, without padding.
      source: the operation or argument of the traced program that it comes from.
    """

    array: str
    size: float
    source: str


def parse(text: str) -> Module:
    """Parses the result of `compiled.as_text()`."""
    module = Module({}, {}, '')
    name = ''
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            module.computations[name] = []
            module = module._replace(entry=name) if header[1] else module
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = Instruction(*match.group(2, 3, 4, 5))
            module.computations[name].append(instruction)
            module.instructions[instruction.name] = instruction
        elif line == '}':
            name = ''
    return module


def callees(instruction: Instruction) -> list[str]:
    """Returns the computations that an instruction calls; for a conditional, all branches."""
    if instruction.opcode.endswith(('-done', '-update')):  # counted at their start
        return []
    names = _CALLEE.findall(instruction.rest)
    if instruction.opcode == 'call':
        names += re.findall(r'\bto_apply=%?([\w.\-]+)', instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += re.findall(r'%?([\w.\-]+)', branches)
    return names


def trip_count(loop: Instruction, module: Module) -> int | None:
    """Returns the trip count of a `while` loop, or None if it cannot be determined.

    Uses XLA's annotation, or else a condition `i < limit` with constant limit and step. An initial
    value that is not a constant, because it comes from an enclosing loop, is taken as zero.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest):
        return int(noted[1])
    names = dict(re.findall(r'\b(condition|body)=%?([\w.\-]+)', loop.rest))
    condition, body = (module.computations.get(names[n]) for n in ('condition', 'body'))
    if not condition or not body:
        return None
    compared = _unwrapped(condition[-1], module)
    operands = compared.operands()
    if compared.opcode != 'compare' or 'direction=LT' not in compared.rest or len(operands) != 2:
        return None
    limit = _constant(operands[1], module)
    index = module.instructions.get(operands[0])
    slot = re.search(r'\bindex=(\d+)', index.rest) if index else None
    if limit is None or slot is None:
        return None
    advanced = _element(body[-1], int(slot[1]), module)
    if advanced is None or (advanced := _unwrapped(advanced, module)).opcode != 'add':
        return None
    step = next(filter(None, (_constant(name, module) for name in advanced.operands())), None)
    if step is None:
        return None
    start = module.instructions.get(loop.operands()[0])
    first = _element(start, int(slot[1]), module) if start else None
    begin = (_constant(first.name, module) if first else None) or 0
    return max(math.ceil((limit - begin) / step), 0)


def array_bytes(text: str) -> list[float]:
    """Returns the bytes of each array in an instruction's type."""
    return [
        (int(array[2]) if array[2] else 8) / 8 * math.prod(int(d) for d in array[3].split(',') if d)
        for array in _ARRAY.finditer(text)
    ]


def copies(module: Module) -> tuple[Copy, ...]:
    """Returns the arrays that a program copies within device memory (HBM), largest first.

    Excludes copies that are fused into other operations and copies to the cores' on-chip memory
    (`S(1)`): neither takes device memory.
    """
    instructions = module.instructions.values()
    fused = {name for i in instructions if i.opcode == 'fusion' for name in callees(i)}
    found = []
    for name, body in module.computations.items():
        for instruction in body if name not in fused else []:
            last = instruction
            if instruction.opcode == 'fusion':
                last = (module.computations.get(callees(instruction)[0]) or [instruction])[-1]
            layout = instruction.type.partition('}')[0]
            array = _ARRAY.search(layout)
            if last.opcode in ('copy', 'copy-start', 'transpose') and array and 'S(' not in layout:
                source = _SOURCE.search(instruction.rest)
                size = array_bytes(array[0])[0]
                found.append(Copy(array[0], size, source[1] if source else instruction.name))
    return tuple(sorted(found, key=lambda copy: -copy.size))


def _element(instruction: Instruction, index: int, module: Module) -> Instruction | None:
    """Returns the instruction that produces element `index` of a tuple."""
    operands = instruction.operands()
    if instruction.opcode != 'tuple' or index >= len(operands):
        return None
    return module.instructions.get(operands[index])


def _unwrapped(instruction: Instruction, module: Module) -> Instruction:
    """Returns the only operation of a one-operation fusion, applied to the fusion's operands."""
    if instruction.opcode != 'fusion':
        return instruction
    inside = module.computations.get(callees(instruction)[0], [])
    work = [i for i in inside if i.opcode not in ('parameter', 'constant')]
    if len(work) != 1:
        return instruction
    given = instruction.operands()
    places = {i.name: int(i.rest.partition(')')[0]) for i in inside if i.opcode == 'parameter'}
    names = [given[places[name]] if name in places else name for name in work[0].operands()]
    attributes = work[0].rest.partition(')')[2]
    return work[0]._replace(rest=', '.join(f'%{name}' for name in names) + ')' + attributes)


def _constant(name: str, module: Module) -> int | None:
    """Returns the value of an integer constant, following copies."""
    instruction = module.instructions.get(name)
    while instruction is not None and instruction.opcode in ('copy', 'bitcast', 'convert'):
        instruction = module.instructions.get((instruction.operands() or [''])[0])
    if instruction is None or instruction.opcode != 'constant':
        return None
    match = re.match(r'(-?\d+)\)', instruction.rest)
    return int(match[1]) if match else None
