"""Plans a training or decoding step for a TPU slice, on any CPU.

    python -m experiments.run plan --preset llama3_8b --topology v5e:4x4 --step train --batch 16
    python -m experiments.run plan --step decode --mesh data=2,model=8 --topology v6e:4x4
    python -m experiments.run plan --abstract --topology v5p:8x8x8 --batch 1024 --length 8192
    python -m experiments.run plan --sweep --preset gemma2_9b --step decode
    python -m experiments.run plan --abstract --mesh data=1,sequence=16 --batch 1 --length 65536

Compiles the project's own step ahead of time for the slice, with the compiler in libtpu (`make
tpu`). Reports whether the step fits, its bottleneck, its communication, and the sharding of each
leaf. On 2 CPU cores: two minutes for the training step of an 8B model, seconds for its decoding
step; `--abstract` estimates everything from the config, at once. Expected, by default: llama3_8b
trains on v5e:4x4 with 16 rows of 2,048 tokens in about 11 of 15.75 GiB per chip, bound by compute.
JAX_PLATFORMS=cpu keeps libtpu from searching this machine for chips and warning that there are
none.
"""

import dataclasses
from typing import Literal

from experiments.plan import chips
from lm.model import presets

PRESETS = {preset.__name__: preset for preset in presets.PRESETS}


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, slice, step and mesh.

    Attributes:
      preset: a model of `lm.model.presets`.
      topology: the slice: v4:2x2x2, v5e:4x4, v5p:4x4x4, v6e:4x4, or cpu:8 for fake CPU devices.
      step: `train` (forward, backward and AdamW) or `decode` (one token per row).
      batch: rows over all devices.
      length: tokens per row, or rows of the cache.
      mesh: mesh sizes, as in `data=4,model=4` or `data=4,sequence=4`; default: all devices on
        `data`.
      ring: the operands that ring attention sends along `sequence`; see `lm.model.config`.
      param_dtype: dtype of the parameters; default: bfloat16 for decoding, and float32 for
        training, since bfloat16 would round small updates away. Activations are bfloat16.
      sweep: try all meshes of the slice and several batches; compile the best.
      batches: batch sizes of the sweep; default: `batch` / 4 to `batch` x 8, in powers of two.
      abstract: estimate only; compile nothing.
    """

    preset: str = 'llama3_8b'
    topology: str = 'v5e:4x4'
    step: Literal['train', 'decode'] = 'train'
    batch: int = 16
    length: int = 2048
    mesh: str | None = None
    ring: Literal['keys', 'queries'] = 'keys'
    param_dtype: Literal['float32', 'bfloat16'] | None = None
    sweep: bool = False
    batches: tuple[int, ...] = ()
    abstract: bool = False

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f'--preset {self.preset!r}: there are {", ".join(PRESETS)}')
        devices = chips.parse(self.topology).devices
        for name, value in (('batch', self.batch), *(('batches', b) for b in self.batches)):
            if value < 1:
                raise ValueError(f'--{name} {value}: expected at least 1')
        if self.length < 2:
            raise ValueError(f'--length {self.length}: expected at least 2')
        positions = PRESETS[self.preset]().max_length
        if self.length > positions:
            raise ValueError(f'--length {self.length}: {self.preset} has {positions} positions')
        if self.sweep and self.mesh is not None:
            raise ValueError(f'--mesh {self.mesh}: --sweep tries every mesh; omit one of the two')
        if not self.sweep:
            self._check_rows(devices)

    def _check_rows(self, devices: int) -> None:
        data = devices
        if self.mesh is not None:
            from lm.attention import zigzag
            from lm.devices import mesh as mesh_lib  # late: --help needs no JAX

            data, sequence, _ = mesh_lib.parse(self.mesh, devices)
            if sequence > 1 and self.step == 'decode':
                raise ValueError(
                    f'--mesh {self.mesh}: decoding does not shard sequences; expected sequence=1'
                )
            if sequence > 1:
                zigzag.check(self.length, sequence)
        if self.batch % data:
            raise ValueError(
                f'--batch {self.batch}: expected a multiple of the data={data} devices'
            )


SCALES = {
    'pod': Config(),
    'tiny': Config('tiny', 'cpu:8', batch=8, length=32),
}
