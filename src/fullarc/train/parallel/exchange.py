"""From rows on every rank to whole tensors at their owners, and back: one all-to-all each way (GLM-5 section 2.4).

Invariant: a rank receives the rows of what it owns and nothing else; the two directions undo each other.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from fullarc.train.parallel.ranks import Ranks


def rows_of(rank: int, size: int, rows: int) -> slice:
    """The rows of a tensor that `rank` holds: runs of ceil(rows / size), the last ones shorter or empty."""
    run = -(-rows // size)
    return slice(min(rank * run, rows), min((rank + 1) * run, rows))


class Exchange:
    """Moves named tensors between "everyone has some rows" and "the owner has it all".

    Args:
        shapes: whole shape of each tensor.
        owners: its owner.
    """

    def __init__(
        self, ranks: Ranks, shapes: Mapping[str, tuple[int, ...]], owners: Mapping[str, int]
    ) -> None:
        self.ranks, self.shapes, self.owners = ranks, shapes, owners

    def to_owners(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's tensors, whole, from every rank's rows."""
        names = sorted(shards)
        outgoing = [[shards[n] for n in names if self.owners[n] == rank] for rank in self._all]
        mine = [name for name in names if self.owners[name] == self.ranks.rank]
        incoming = _all_to_all(outgoing, [[self._part(name, rank) for name in mine] for rank in self._all])
        return {name: torch.cat(parts) for name, *parts in zip(mine, *incoming, strict=True)}

    def from_owners(self, whole: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """This rank's rows of the tensors `names`, from their owners."""
        names = sorted(names)
        outgoing = [[whole[name][self._rows(name, rank)] for name in sorted(whole)] for rank in self._all]
        theirs = [[name for name in names if self.owners[name] == rank] for rank in self._all]
        shapes = [[self._part(name, self.ranks.rank) for name in group] for group in theirs]
        incoming = _all_to_all(outgoing, shapes)
        return {
            n: t
            for group, parts in zip(theirs, incoming, strict=True)
            for n, t in zip(group, parts, strict=True)
        }

    @property
    def _all(self) -> range:
        return range(self.ranks.size)

    def _rows(self, name: str, rank: int) -> slice:
        return rows_of(rank, self.ranks.size, self.shapes[name][0])

    def _part(self, name: str, rank: int) -> tuple[int, ...]:
        rows = self._rows(name, rank)
        return (rows.stop - rows.start, *self.shapes[name][1:])


def _all_to_all(
    outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
) -> list[list[Tensor]]:
    """Send the tensors `outgoing[r]` to rank r; returns the tensors from each rank, whose `shapes` are known."""
    sent = [torch.cat([torch.zeros(0), *(tensor.flatten() for tensor in group)]) for group in outgoing]
    sizes = [[prod(shape) for shape in group] for group in shapes]
    received = torch.empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        received, torch.cat(sent), [sum(group) for group in sizes], [len(part) for part in sent]
    )
    runs = received.split([sum(group) for group in sizes])
    return [
        [part.view(shape) for part, shape in zip(run.split(group), kinds, strict=True)] if group else []
        for run, group, kinds in zip(runs, sizes, shapes, strict=True)
    ]
