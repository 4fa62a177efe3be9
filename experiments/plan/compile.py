"""Ahead-of-time compilation for devices that this machine does not have."""

import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.plan import collectives, hlo
from experiments.plan.chips import GIB, Topology
from experiments.plan.collectives import Program
from experiments.plan.hlo import Copy
from experiments.plan.steps import Step

# libtpu looks for the chips of the host that it runs on, and complains where there are none; and
# only one process may load it for chips, which a compiler does not use.
_COMPILER_ONLY = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class Compiled(NamedTuple):
    """A step as the compiler made it; bytes are those of one device.

    Attributes:
      arguments: parameters, optimizer or cache, and the batch.
      temporaries: all else at the peak, with results that take no argument's place.
      code: the program itself.
      program: its collectives.
      copies: what it copies in the devices' memory, largest first.
      seconds: that compilation took.
    """

    arguments: float
    temporaries: float
    code: float
    program: Program
    copies: tuple[Copy, ...]
    seconds: float

    @property
    def total(self) -> float:
        """Bytes on one device."""
        return self.arguments + self.temporaries + self.code


class Refused(NamedTuple):
    """What the compiler says of a step that does not fit in the devices' memory.

    Attributes:
      total: bytes that one device would need, where the compiler says it.
      reason: one line.
      seconds: that it took.
    """

    total: float | None
    reason: str
    seconds: float


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the slice's devices, to lower and compile for; fake ones for `cpu`.

    Raises:
      ValueError: libtpu is not installed or does not know the slice; or this process already uses
        fewer CPU devices.
    """
    if topology.chip.name == 'cpu':
        return _cpu_devices(topology.devices)
    if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
        raise ValueError(
            f'--topology {topology.name}: its compiler, libtpu, is not installed: make tpu '
            '(or count without it: --abstract)'
        )
    for name, value in _COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.chip.name == 'v4':
        options['chip_config_name'] = 'megacore'  # a chip's two cores as one device, JAX's default
    if topology.devices == 1:  # a host has at least four otherwise
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(topology.name, 'tpu', **options).devices
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise ValueError(f'--topology {topology.name}: libtpu refuses it: {line}') from error
    return found


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    try:
        found = jax.devices('cpu')
        if len(found) < count and jax.process_count() == 1 and not jax.live_arrays():
            # the runner has asked for the devices already, but nothing lies on them yet
            jax.extend.backend.clear_backends()
            jax.config.update('jax_num_cpu_devices', count)
            found = jax.devices('cpu')
    except RuntimeError as error:
        raise ValueError(f'--topology cpu:{count}: set JAX_PLATFORMS=cpu: {error}') from error
    if len(found) < count:
        raise ValueError(
            f'--topology cpu:{count}: this process uses {len(found)} CPU devices already; start '
            f'one with JAX_NUM_CPU_DEVICES={count}'
        )
    return found[:count]


def compile_step(step: Step, mesh: Mesh, label: str) -> Compiled | Refused:
    """Compiles a step for the devices of `mesh`; says on stderr what takes so long.

    Raises:
      ValueError: a kernel's blocks do not fit the memory beside the cores.
    """
    print(f'compiling {label} ...', end='', file=sys.stderr, flush=True)
    begin = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return refused(error, time.monotonic() - begin)
    finally:
        print(f' {time.monotonic() - begin:.0f} s', file=sys.stderr, flush=True)
    return analyse(compiled, mesh, time.monotonic() - begin)


def analyse(compiled: jax.stages.Compiled, mesh: Mesh, seconds: float) -> Compiled:
    """Returns what a compiled step says of itself; `seconds` is how long it took to compile."""
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None  # libtpu and the CPU's compiler say both
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Compiled(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes + new,
        analysis.generated_code_size_in_bytes,
        collectives.read(text, **mesh.shape),
        hlo.copies(hlo.parse(text)),
        seconds,
    )


def refused(error: Exception, seconds: float) -> Refused:
    """Returns what a compiler's error says of the devices' memory.

    Raises:
      ValueError: it is the memory beside the cores that is too small.
      Exception: `error` itself, where it is about something else.
    """
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text:
        raise error
    line = _what_ran_out(text.removeprefix('RESOURCE_EXHAUSTED: '))
    if 'hbm' not in line.lower():
        raise ValueError(line) from error
    used = re.search(r'(?:Used |\()([\d.]+)([KMG])', line)
    scale = {'K': 2**10, 'M': 2**20, 'G': GIB}
    return Refused(float(used[1]) * scale[used[2]] if used else None, line, seconds)


def _what_ran_out(text: str) -> str:
    """Returns the line that says it, which may stand below a name such as `E1001: ...Oom:`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if 'ran out of memory' in line.lower()), None)
    # the whole instruction that asked for it stands between its name and the figures
    return re.sub(r' = .*\}\. ', ': ', said) if said else ' '.join(lines[:2])
