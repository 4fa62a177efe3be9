"""Trains one small model on meshes of fake CPU devices: equal losses, less memory per device."""

import dataclasses
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.growth.config import Config
from experiments.plan import chips, compile, steps
from experiments.plan.collectives import Collective
from experiments.plan.compile import Compiled
from experiments.plan.config import PRESETS
from experiments.plan.config import Config as PlanConfig
from lm.devices import mesh as mesh_lib
from lm.model import params
from lm.model.config import Config as ModelConfig
from lm.training import optimizer, train


class Made(NamedTuple):
    """A compiled step for one mesh, with the compiler's analysis."""

    mesh: Mesh
    step: jax.stages.Compiled
    analysed: Compiled


def model_config(config: Config) -> ModelConfig:
    """Returns the small model in float32, so that losses can be compared within 1e-5."""
    return dataclasses.replace(PRESETS[config.small](), dtype='float32', param_dtype='float32')


def devices(text: str) -> int:
    """Returns the number of devices of a mesh such as `data=4,model=2`."""
    return math.prod(int(part.partition('=')[2] or 1) for part in text.split(','))


def compiler(config: Config) -> Callable[[str], Made]:
    """Returns a function mesh -> compiled step, which compiles each mesh once."""
    count = max(map(devices, config.meshes))

    @functools.cache
    def make(text: str) -> Made:
        # request the largest device count first: it cannot grow once a device is in use
        found = compile.devices(chips.parse(f'cpu:{count}'))[: devices(text)]
        mesh = mesh_lib.make(text, found)
        plan = PlanConfig(
            config.small, f'cpu:{len(found)}', 'train', config.batch, config.small_length, text
        )
        step = steps.make(plan, model_config(config), mesh)
        begin = time.monotonic()
        with jax.set_mesh(mesh):
            compiled = step.function.lower(*step.arguments).compile()
        return Made(mesh, compiled, compile.analyse(compiled, mesh, time.monotonic() - begin))

    return make


def row(config: Config, text: str, make: Callable[[str], Made]) -> dict[str, Any]:
    """Trains on one mesh and on the reference mesh, interleaved; returns its table row.

    Args:
      config: the experiment's config.
      text: the mesh, such as `data=4,model=2`.
      make: the result of `compiler`.

    Raises:
      ValueError: the rows do not divide over the mesh.
    """
    made = make(text)
    sides = [_start(config, make(config.meshes[0])), _start(config, made)]
    losses = np.array([[run() for run in sides] for _ in range(config.steps)])
    differences = np.abs(losses[:, 1] / losses[:, 0] - 1)
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(config.repeats):
        for run, taken in zip(sides, seconds):
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
    first, own = (float(np.median(taken)) for taken in seconds)
    sent = made.analysed.program.collectives
    return {
        'mesh': text,
        'devices': made.mesh.size,
        'first_difference': float(differences[0]),
        'difference': float(differences.max()),
        'loss': float(losses[-1, 1]),
        'ms': own * 1e3,
        'ratio': own / first,
        'kept_bytes': made.analysed.arguments,
        'step_bytes': made.analysed.temporaries,
        'sent_bytes': sum(one.network_bytes for one in sent),
        'collectives': named(sent),
    }


def named(collectives: Iterable[Collective]) -> str:
    """Returns counts of a step's collectives: `18 all-gather (data), 7 all-reduce (data+model)`."""
    times: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for one in collectives:
        times[one.kind][one.axis] = times[one.kind].get(one.axis, 0) + one.times
    return ', '.join(
        f'{count} {kind} ({axis})'
        for kind, axes in sorted(times.items())
        for axis, count in sorted(axes.items())
    )


def _start(config: Config, made: Made) -> Callable[[], float]:
    """Returns a function that runs one step and returns its loss; the initial state is shared."""
    model = model_config(config)
    state, batch = _state(model, made.mesh), _batch(config, model, made.mesh)

    def run() -> float:
        nonlocal state
        state, metrics = made.step(state, batch)
        return float(metrics['loss'])

    return run


def _state(model: ModelConfig, mesh: Mesh) -> train.TrainState:
    init = jax.jit(
        functools.partial(params.init, model), out_shardings=params.shardings(model, mesh)
    )
    adamw = optimizer.make(optimizer.OptimizerConfig(), steps.SCHEDULE, params.leaves(model))
    return train.init_state(init(jax.random.key(0)), adamw, mesh)


def _batch(config: Config, model: ModelConfig, mesh: Mesh) -> dict[str, jax.Array]:
    shape = (config.batch, config.small_length)
    rng = np.random.default_rng(0)
    text = rng.integers(model.vocab_size, size=(shape[0], shape[1] + 1), dtype=np.int32)
    values = {
        'tokens': text[:, :-1],
        'targets': text[:, 1:],
        'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        'segments': np.ones(shape, np.int32),
        'weights': np.ones(shape, np.float32),
    }
    return jax.device_put(values, mesh_lib.batch_sharding(mesh))
