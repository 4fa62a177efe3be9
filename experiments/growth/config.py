"""Scaling of a training step over devices: loss, time, memory and communication.

    python -m experiments.run growth
    python -m experiments.run growth --abstract
    python -m experiments.run growth --preset llama3_8b --length 2048 --slices v5e:4x4 v5e:8x8

Prints two tables. The first trains one small model on meshes of fake CPU devices, which share the
machine's cores. It shows that the losses agree, how memory per device falls, and which collectives
XLA inserts; its times show the overhead of sharding, not its speed-up. The second uses the planner
(`experiments/plan`) for slices of real chips: the TPU compiler (`make tpu`) compiles each step on
this CPU; with `--abstract`, costs are only estimated from the config.

On 2 CPU cores: about 10 minutes, mostly TPU compilation; a few minutes with `--abstract`. Expected:
losses equal within 1e-5 relative, and memory between steps proportional to 1 / devices. Finished
rows are saved in DIR; the same command resumes after them.
"""

import dataclasses
from typing import Literal

from experiments.plan import chips
from experiments.plan.config import PRESETS

RESUMES = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Meshes, slices, models and sizes.

    Attributes:
      meshes: meshes of fake devices, in the syntax of `--mesh`; the first is the reference.
      small: preset of the model trained on them, in float32.
      batch, small_length: rows over all devices, and tokens per row.
      steps: training steps, from the same initial state, whose losses are compared.
      repeats: timed steps of each mesh, interleaved with the reference; medians are reported.
      preset: preset of the model planned for the slices.
      slices: TPU slices; the number of rows per chip is constant.
      rows_per_chip, length: rows per chip and tokens per row on the slices.
      model_ways: sizes of the slices' mesh axis `model`, one table row each; the rest is `data`.
      abstract: only estimate the costs of the slices; compile nothing for them.
    """

    meshes: tuple[str, ...] = (
        'data=1', 'data=2', 'model=2', 'data=4', 'data=2,model=2', 'data=8', 'data=4,model=2',
        'data=2,model=4',
    )  # fmt: skip
    small: Literal['tiny', 'm1_3m'] = 'm1_3m'
    batch: int = 16
    small_length: int = 128
    steps: int = 5
    repeats: int = 5
    preset: str = 'm2_2b'
    slices: tuple[str, ...] = ('v5e:2x2', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16')
    rows_per_chip: int = 4
    length: int = 512
    model_ways: tuple[int, ...] = (1,)
    abstract: bool = False

    def __post_init__(self):
        for name in ('batch', 'steps', 'repeats', 'rows_per_chip'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name} {getattr(self, name)}: expected at least 1')
        if not self.meshes:
            raise ValueError('--meshes: expected at least one')
        if self.preset not in PRESETS:
            raise ValueError(f'--preset {self.preset!r}: there are {", ".join(PRESETS)}')
        for name in self.slices:
            devices = chips.parse(name).devices
            for ways in self.model_ways:
                if ways < 1 or devices % ways:
                    raise ValueError(
                        f'--model_ways {ways}: does not divide the {devices} of {name}'
                    )


SCALES = {
    'demo': Config(),
    'tiny': Config(
        ('data=1', 'data=2,model=2'), 'tiny', 4, 16, 2, 1, 'tiny', ('v5e:2x2', 'v5e:4x4'), 2, 32,
        (1, 2), abstract=True,
    ),
    'pod': Config(
        preset='llama3_8b', slices=('v5p:2x2x4', 'v5p:4x4x4', 'v5p:4x8x8'), rows_per_chip=1,
        length=8192, model_ways=(1, 4),
    ),
}  # fmt: skip
