"""A long row worked on in pieces, on all of torch's threads.

The operations of a piece are too small to be divided among threads, so each thread takes whole pieces and runs their
operations alone. They are not smaller than that, because threads wait for the interpreter's lock between operations:
of ten microseconds each, two threads do no more than one. Invariant: results depend neither on the number of threads
nor on who finishes first; what is summed over pieces is summed in LANES runs of them, and these in their order.
"""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

QUERIES = 128  # a thread takes at once
LANES = 4  # sums of a row that are taken side by side


def spans(start: int, stop: int, size: int) -> list[slice]:
    """The positions from `start` to `stop` in runs of `size`."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def lanes(length: int) -> list[slice]:
    """`length` queries in at most LANES runs of whole pieces."""
    pieces = -(-length // QUERIES)
    return spans(0, length, -(-pieces // LANES) * QUERIES)


class Scratch:
    """Memory that a thread uses again for piece after piece: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape with anything in it, valid until the next of this name."""
        size, kept = math.prod(shape), self.kept.get(name)
        if kept is None or len(kept) < size:
            kept = self.kept[name] = like.new_empty(size, dtype=dtype)
        return kept[:size].view(shape)


def each(work: Callable[[Item, Scratch], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in order, without gradients: as many at a time as torch has threads here.

    `work` gets its thread's scratch memory too, and must not return any of it.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    mine = threading.local()

    def alone(item: Item) -> Result:
        if not hasattr(mine, "scratch"):
            mine.scratch = Scratch()
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return work(item, mine.scratch)

    if threads == 1:
        return [alone(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(threads)  # new threads take the number that was set last, wherever that was


def gather(keys_SW: Tensor, positions_tk: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The keys at these positions [t, k, W], in scratch memory, and the positions as a flat index; -1 is read as 0."""
    where = positions_tk.long().clamp_min_(0).flatten()
    chosen = scratch("chosen", keys_SW, len(where), keys_SW.shape[-1])
    torch.index_select(keys_SW, 0, where, out=chosen)
    return chosen.view(*positions_tk.shape, -1), where
