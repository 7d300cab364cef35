"""Memory that all ranks of a machine see: sums and copies through it cost a tenth of what sockets cost.

The first rank makes an anonymous file, the others open it through its entry in /proc. It has no name in any folder,
so it is gone with the last process, however that one ended. Where that cannot be (another host, no Linux) every rank
is told so and collectives go through gloo.

Invariant: every rank calls the same methods with equally long tensors. A rank writes its own row, or its own run of
the first row between two barriers, so nothing is read while it is written; elements are added in the order of the
ranks, so all ranks get the same bits.

Shapes: R ranks, N elements of all tensors together.
"""

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BYTES = 4


class SharedRows:
    """A row of fp32 numbers for each rank, grown when more are asked for.

    Args:
        gather: the JSON value of every rank, in their order.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> None:
        self.rank, self.size, self._gather = rank, size, gather
        self._rows_RN: Tensor | None = torch.empty(size, 0)

    def sum_(self, tensors: Sequence[Tensor]) -> bool:
        """Replace each tensor by its sum over the ranks; False, and nothing done, where that cannot be."""
        rows_RN = self._rows(tensors)
        if rows_RN is None:
            return False
        torch._foreach_copy_(_views(rows_RN[self.rank], tensors), list(tensors))
        dist.barrier()
        total, *others = rows_RN.tensor_split(self.size, 1)[self.rank]
        for other in others:
            total += other
        dist.barrier()
        torch._foreach_copy_(list(tensors), _views(rows_RN[0], tensors))
        dist.barrier()
        return True

    def reduce_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> bool:
        """Replace each tensor at its owner by its sum over the ranks; False, and nothing done, where that cannot be."""
        rows_RN = self._rows(tensors)
        if rows_RN is None:
            return False
        views = [_views(row_N, tensors) for row_N in rows_RN]
        foreign = [at for at, owner in enumerate(owners) if owner != self.rank]
        if foreign:
            torch._foreach_copy_([views[self.rank][at] for at in foreign], [tensors[at] for at in foreign])
        dist.barrier()
        for at, owner in enumerate(owners):
            if owner == self.rank:
                parts = [tensors[at] if rank == owner else view[at] for rank, view in enumerate(views)]
                total = parts[0] + parts[1]
                for part in parts[2:]:
                    total += part
                tensors[at].copy_(total)
        dist.barrier()
        return True

    def spread_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> bool:
        """Replace each tensor by its owner's; False, and nothing done, where that cannot be."""
        rows_RN = self._rows(tensors)
        if rows_RN is None:
            return False
        pairs = list(zip(tensors, _views(rows_RN[0], tensors), owners, strict=True))
        mine = [(tensor, view) for tensor, view, owner in pairs if owner == self.rank]
        others = [(tensor, view) for tensor, view, owner in pairs if owner != self.rank]
        if mine:
            torch._foreach_copy_([view for _, view in mine], [tensor for tensor, _ in mine])
        dist.barrier()
        if others:
            torch._foreach_copy_([tensor for tensor, _ in others], [view for _, view in others])
        dist.barrier()
        return True

    def _rows(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """[R, N] for these tensors; None where memory cannot be shared or they are not fp32."""
        numel = sum(tensor.numel() for tensor in tensors)
        if self._rows_RN is None or any(tensor.dtype != torch.float32 for tensor in tensors):
            return None
        if self._rows_RN.shape[1] < numel:
            self._rows_RN = self._made(numel)
        return None if self._rows_RN is None else self._rows_RN[:, :numel]

    def _made(self, numel: int) -> Tensor | None:
        """New memory for all ranks, or None on all of them."""
        size, fd = self.size * numel * BYTES, -1
        name = f"fullarc-{secrets.token_hex(8)}"
        if self.rank == 0 and hasattr(os, "memfd_create"):
            fd = os.memfd_create(name)
            os.ftruncate(fd, size)
        path, name = self._gather([f"/proc/{os.getpid()}/fd/{fd}", name])[0]
        try:
            if fd < 0 and name in os.readlink(path):  # else another host's process of that number
                fd = os.open(path, os.O_RDWR)
        except OSError:
            pass
        everyone = all(self._gather(fd >= 0))
        memory = mmap.mmap(fd, size) if everyone else None
        if fd >= 0:
            os.close(fd)
        return (
            None if memory is None else torch.frombuffer(memory, dtype=torch.float32).view(self.size, numel)
        )


def _views(row_N: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The row in the shapes of the tensors, one after another."""
    runs = row_N.split([tensor.numel() for tensor in tensors])
    return [run.view(tensor.shape) for run, tensor in zip(runs, tensors, strict=True)]
