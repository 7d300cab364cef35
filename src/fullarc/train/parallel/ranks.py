"""What the trainer knows of other processes: its number, its share, and sums over all.

Invariant: every rank calls the same collectives in the same order, and everything that decides what happens next
(a bad loss, a missing gradient, the step's count) is gathered before it is acted on, so all ranks go on or all stop.
With one rank every method is the identity and torch.distributed is not touched.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fullarc.config.context import silent
from fullarc.train.parallel.shared import SharedRows


@dataclass(frozen=True)
class Ranks:
    """This process among `size` that train one model together, over the default process group.

    Attributes:
        tell: `tell(*values, **named)` hands a message to whoever launched the ranks.
    """

    rank: int = 0
    size: int = 1
    tell: Callable[..., None] = field(default=silent, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each contiguous tensor by its sum over the ranks, the same bits on all."""
        if self.size > 1 and tensors and not self._shared.sum_(tensors):
            _wait([dist.all_reduce(tensor, async_op=True) for tensor in tensors])

    def reduce_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Replace each contiguous tensor, at its owner, by its sum over the ranks; elsewhere it stays as it is."""
        if self.size > 1 and tensors and not self._shared.reduce_(tensors, owners):
            pairs = list(zip(tensors, owners, strict=True))
            scratch = [(x if owner == self.rank else x.clone(), owner) for x, owner in pairs]
            _wait([dist.reduce(tensor, owner, async_op=True) for tensor, owner in scratch])

    def spread_(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Replace each tensor by its owner's."""
        if self.size > 1 and not self._shared.spread_(tensors, owners):
            pairs = zip(tensors, owners, strict=True)
            _wait([dist.broadcast(tensor, owner, async_op=True) for tensor, owner in pairs])

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in their order."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        pairs = zip(texts, lengths, strict=True)
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in pairs]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.gather(None)

    @cached_property
    def _shared(self) -> SharedRows:
        return SharedRows(self.rank, self.size, self.gather)


ALONE = Ranks()


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
