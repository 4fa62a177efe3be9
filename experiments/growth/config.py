"""How a training step grows with its devices: loss, time, memory and what they send each other.

    python -m experiments.run growth
    python -m experiments.run growth --abstract
    python -m experiments.run growth --preset llama3_8b --length 2048 --slices v5e:4x4 v5e:8x8

Two tables. The first trains one small model over meshes of fake CPU devices, which share the
machine's cores: it shows that the losses are the same, how memory falls, and which collectives XLA
puts in; its times say what cutting costs, not what devices gain. The second asks the planner
(`experiments/plan`) for slices of real chips: the TPU compiler (`make tpu`) compiles each step for
the devices of the slice, on this CPU; `--abstract` only counts.

On 2 CPU cores: about 10 minutes, most of it the TPU compiler's; a few minutes with `--abstract`.
Expected: losses equal to 1e-5, relative, and memory between steps on each device falling as
1 / devices. A row that is done is kept in DIR: the same command goes on after it.
"""

import dataclasses
from typing import Literal

from experiments.plan import chips
from experiments.plan.config import PRESETS

RESUMES = True


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared.

    Attributes:
      meshes: of fake devices, as `--mesh` writes them; the first is what others are compared with.
      small: the model that they train, a preset, in float32.
      batch, small_length: rows over all devices, and tokens in a row.
      steps: that are trained from the same start for the losses.
      repeats: timed steps of each mesh, taken in turn with the first's; medians are reported.
      preset: the model of the slices, as the planner trains it.
      slices: of chips; the rows per chip stay the same.
      rows_per_chip, length: of a step there.
      model_ways: devices on the mesh axis `model` of the slices, each a row; the others on `data`.
      abstract: count the slices' rows only; compile nothing for them.
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
            raise ValueError('--meshes: expected one at least')
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
