"""Ahead-of-time compilation for devices that are not attached to this machine."""

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

# Without these, libtpu looks for chips of this host and warns if there are none, and allows only
# one process to load it. A compiler uses no chips.
_COMPILER_ONLY = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class Compiled(NamedTuple):
    """A compiled step; bytes are per device.

    Attributes:
      arguments: parameters, optimizer state or cache, and the batch.
      temporaries: everything else at the peak, including results that do not reuse an argument's
        buffer.
      code: size of the program.
      program: its collectives.
      copies: the arrays that it copies in device memory, largest first.
      seconds: compilation time.
    """

    arguments: float
    temporaries: float
    code: float
    program: Program
    copies: tuple[Copy, ...]
    seconds: float

    @property
    def total(self) -> float:
        """Peak bytes per device."""
        return self.arguments + self.temporaries + self.code


class Refused(NamedTuple):
    """The compiler's error for a step that does not fit in device memory.

    Attributes:
      total: bytes that one device would need, if the compiler reports them.
      reason: the error, as one line.
      seconds: time until the error.
    """

    total: float | None
    reason: str
    seconds: float


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the slice's devices as compilation targets; for `cpu`, fake CPU devices.

    Raises:
      ValueError: libtpu is not installed or does not support the slice; or this process already
        uses fewer CPU devices.
    """
    if topology.chip.name == 'cpu':
        return _cpu_devices(topology.devices)
    if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
        raise ValueError(
            f'--topology {topology.name}: its compiler, libtpu, is not installed: make tpu '
            '(or estimate without it: --abstract)'
        )
    for name, value in _COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.chip.name == 'v4':
        options['chip_config_name'] = 'megacore'  # a chip's two cores as one device, JAX's default
    if topology.devices == 1:  # by default, a host has at least four chips
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(topology.name, 'tpu', **options).devices
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise ValueError(f'--topology {topology.name}: rejected by libtpu: {line}') from error
    return found


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    try:
        found = jax.devices('cpu')
        if len(found) < count and jax.process_count() == 1 and not jax.live_arrays():
            # the runner has initialised the devices already, but no array is on them yet
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
    """Compiles a step for the devices of `mesh`; prints progress to stderr.

    Raises:
      ValueError: a kernel's blocks do not fit in the cores' on-chip memory (VMEM).
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
    """Returns the memory analysis and collectives of a step; `seconds` is its compilation time."""
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None  # libtpu and the CPU compiler provide both
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
    """Parses a compiler error about device memory.

    Raises:
      ValueError: the cores' on-chip memory (VMEM) is too small.
      Exception: `error` itself, if it is about something else.
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
    """Returns the line with the cause, which may follow a heading such as `E1001: ...Oom:`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if 'ran out of memory' in line.lower()), None)
    # drop the text of the instruction, printed between its name and the figures
    return re.sub(r' = .*\}\. ', ': ', said) if said else ' '.join(lines[:2])
