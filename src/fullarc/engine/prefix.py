"""Which part of the cache the next request may reuse: a tree of blocks of BLOCK tokens, each found through its parent.

    key of a block = (its parent, its tokens);  of a first block = (space, its tokens)
    space          = (number of the weights, adapter, salt): latents of one space mean nothing in another

Blocks are copies, so a slot may be given away. Those that running requests began with are held (counted references)
and stay; the others go, the least recently used first, when the memory is full: to the spill file if there is one,
and from there for good.

Invariants: equal keys mean equal prefixes. A held block's ancestors are held. Of the others a parent is always used
more recently than its children, so the oldest is a leaf of what is in memory, and dropping it breaks no chain; the
same order holds on disk, where no block has a child in memory. A block is in memory, on disk or forgotten.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fullarc.engine.cache import Latents
from fullarc.engine.spill import SpillFile

BLOCK = 16


@dataclass(eq=False)
class Block:
    """BLOCK tokens of a prefix: at `place` in memory, or on `page` of the spill file; `holders` want it to stay."""

    key: tuple[Hashable, tuple[int, ...]]
    place: int | None = None
    page: int | None = None
    holders: int = 0


def block_bytes(cache: Latents) -> int:
    """Memory that one block takes."""
    return BLOCK * cache.read(0, 0, 1).nbytes


class PrefixCache:
    """Room for `blocks` blocks in memory, and for more in `spill`. Counts what went to the file and came back."""

    def __init__(self, cache: Latents, blocks: int, spill: SpillFile | None = None) -> None:
        self.cache, self.spill = cache, spill
        self.spilled = self.returned = 0
        layers, _, width = cache.read(0, 0, 1).shape
        self._kept = torch.zeros(blocks, layers, BLOCK, width)
        self._known: dict[tuple[Hashable, tuple[int, ...]], Block] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()  # in memory and not held
        self._asleep: OrderedDict[Block, None] = OrderedDict()  # on disk
        self._places = list(range(blocks))
        self._pages = list(range(spill.pages)) if spill else []

    def __len__(self) -> int:
        """Tokens held in memory."""
        return (len(self._kept) - len(self._places)) * BLOCK

    @property
    def on_disk(self) -> int:
        """Tokens held in the spill file."""
        return len(self._asleep) * BLOCK

    @property
    def takes_more(self) -> bool:
        """Whether a block can be put in: False without room for one, and while running requests hold all."""
        return bool(self._places or self._idle)

    def clear(self) -> None:
        """Forget everything (weights changed, or /flush_cache). Held blocks too: they are copies that nobody reads."""
        for block in list(self._known.values()):
            self._forget(block)

    def match(self, space: Hashable, ids: Sequence[int]) -> list[Block]:
        """Blocks of the longest known prefix of `ids`, which count as used now."""
        found, parent = list[Block](), space
        for tokens in _blocks(ids):
            block = self._known.get((parent, tokens))
            if block is None:
                break
            found.append(block)
            parent = block
        for block in reversed(found):  # the first one last: it must be the most recent
            for order in (self._idle, self._asleep):
                if block in order:
                    order.move_to_end(block)
        return found

    def restore(self, chain: Sequence[Block], slot: int) -> list[Block]:
        """Copy a chain to the beginning of a slot, as far as it can be had; that part is held from now on."""
        for block in chain:
            self._hold(block)
        ready = 0
        while ready < len(chain) and self._wake(chain[ready]):
            ready += 1
        self.release(chain[ready:])
        if ready:
            at = torch.tensor([block.place for block in chain[:ready]])
            self.cache.write(slot, 0, self._kept[at].transpose(0, 1).flatten(1, 2))
        return list(chain[:ready])

    def publish(self, space: Hashable, ids: Sequence[int], slot: int) -> list[Block]:
        """Remember the whole blocks of `ids`, which stand at the beginning of `slot`; they are held from now on."""
        chain, new, parent = list[Block](), list[int](), space
        for number, tokens in enumerate(_blocks(ids)):
            key = parent, tokens
            block = self._known.get(key)
            if block is None or block.place is None:
                place = self._allocate()
                if place is None:
                    break
                block = self._known.setdefault(key, Block(key))  # now: making room may have cost it its page
                self._leave_disk(block)
                block.place = place
                new.append(number)
            self._hold(block)
            chain.append(block)
            parent = block
        if new:
            first = new[0]
            kept_LPW = self.cache.read(slot, first * BLOCK, (new[-1] + 1 - first) * BLOCK)
            blocks = kept_LPW.unflatten(1, (-1, BLOCK)).transpose(0, 1)
            for number in new:
                self._kept[chain[number].place] = blocks[number - first]
        return chain

    def release(self, chain: Sequence[Block]) -> None:
        """No longer hold a chain."""
        for block in reversed(chain):
            block.holders -= 1
            if block.holders == 0 and block.place is not None:
                self._idle[block] = None

    # --- where blocks are ---------------------------------------------------------------------------------------

    def _hold(self, block: Block) -> None:
        block.holders += 1
        self._idle.pop(block, None)

    def _allocate(self) -> int | None:
        """A place in memory: a free one, or that of the oldest block that nobody holds."""
        if self._places:
            return self._places.pop()
        if not self._idle:
            return None
        block, _ = self._idle.popitem(last=False)
        place, block.place = block.place, None
        if not self._fall_asleep(block, place):
            self._known.pop(block.key, None)
        return place

    def _fall_asleep(self, block: Block, place: int | None) -> bool:
        """Write the block at `place` to disk, if there is one."""
        if self.spill is None or self.spill.stopped:
            return False
        if not self._pages:
            self._forget(next(iter(self._asleep)))
        page = self._pages.pop()
        if not self.spill.write(page, self._bytes(place)):
            self._forget_disk()
            return False
        block.page = page
        self._asleep[block] = None
        self.spilled += 1
        return True

    def _wake(self, block: Block) -> bool:
        """Have a held block in memory."""
        if block.place is not None:
            return True
        if block.page is None or self.spill is None or (place := self._allocate()) is None:
            return False
        # making room may have cost this very block's page
        if block.page is None or not self.spill.read(block.page, self._bytes(place)):
            self._places.append(place)
            if self.spill.stopped:
                self._forget_disk()
            return False
        self._leave_disk(block)
        block.place = place
        self.returned += 1
        return True

    def _bytes(self, place: int | None) -> memoryview:
        assert place is not None
        return self._kept[place].view(torch.uint8).numpy().data.cast("B")

    def _leave_disk(self, block: Block) -> None:
        if block.page is not None:
            self._pages.append(block.page)
            del self._asleep[block]
            block.page = None

    def _forget(self, block: Block) -> None:
        self._known.pop(block.key, None)
        self._leave_disk(block)
        if block.place is not None:
            self._idle.pop(block, None)
            self._places.append(block.place)
            block.place = None

    def _forget_disk(self) -> None:
        for block in list(self._asleep):
            self._forget(block)


def _blocks(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The whole blocks of `ids`."""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        yield tuple(ids[start : start + BLOCK])
