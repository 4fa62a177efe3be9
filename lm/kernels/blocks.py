"""Block sizes of a kernel, checked against a chip's fast memory before anything is compiled."""

import dataclasses

MIB = 2**20
# Memory that every supported chip has for one kernel. The compiler can take minutes to refuse a
# kernel that does not fit.
VMEM = 48 * MIB  # TPU v5e, v5p, v6e: 64 MiB or more of vector memory per core
SMEM = 512 * 1024  # TPU: scalar memory
SHARED = 227 * 1024  # NVIDIA, from Ampere's largest on: shared memory per block of threads


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The block sizes of a kernel.

    Attributes:
      query: queries per block; decoding kernels take all their queries and ignore it.
      key: keys per block.
      splits: GPU: splits of a row's keys that run in parallel, merged by their LSE.
      warps, stages: GPU: warps per block of threads, depth of the load pipeline.
    """

    query: int = 128
    key: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise ValueError(f'BlockSizes.{field.name}: {value}; expected at least 1')


def check(kernel: str, work: str, memory: str, needed: int, limit: int, advice: str) -> None:
    """Refuses a kernel that needs more of a memory than there is.

    Args:
      kernel: its name, for the message.
      work: description of the operands, in the sizes that the kernel uses.
      memory: its name.
      needed, limit: bytes.
      advice: what to change: larger blocks need more vector memory, and less scalar memory.

    Raises:
      ValueError: in one line, with the need, the limit and the advice.
    """
    if needed > limit:
        raise ValueError(
            f'{kernel}: {work} need {needed / MIB:.2f} MiB of {memory}, and there are '
            f'{limit / MIB:.2f}; {advice}'
        )
