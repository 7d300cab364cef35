"""Memory in huge pages where the system has them: a step walks over all weights and much of the cache.

With pages of 4 KB the processor would look most of them up anew, which in a virtual machine costs as much as
reading them.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
ARENA = 1 << 24


def zeros(size: int) -> Tensor:
    """`size` bytes of zeros, which take no room before they are touched."""
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def floats(*shape: int) -> Tensor:
    """fp32 zeros of a shape."""
    return zeros(4 * math.prod(shape))[: 4 * math.prod(shape)].view(torch.float32).view(shape)


class Arena:
    """Copies of tensors, one behind the other; they live as long as the arena."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._used = 0

    def keep(self, values: Tensor) -> int:
        """Copy a tensor; its address."""
        data = values.contiguous().flatten().view(torch.uint8)
        if not self._blocks or self._used + len(data) > len(self._blocks[-1]):
            self._blocks.append(zeros(max(ARENA, len(data))))
            self._used = 0
        start, block = self._used, self._blocks[-1]
        block[start : start + len(data)] = data
        self._used += -(-len(data) // ALIGNMENT) * ALIGNMENT
        return block.data_ptr() + start
