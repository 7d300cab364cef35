"""What attention remembers, and which part of it the next request may reuse.

`Cache` holds, per layer and slot (= one running sequence), what a token leaves behind: the absorbed key (latent and
rotated part) and the index key; and the absorbed key again as a row, whose latent is the value. Keys are stored
[dim, position] because that makes the product with a few query heads twice as fast; rows are what sparse attention
gathers. The last slot receives the padding rows of a batch.

`PrefixCache` keeps whole blocks of finished or prefilled sequences under their token ids and the weight version.
Invariants: a block is found only through its parent block, so equal keys mean equal prefixes; a parent is always
used more recently than its children, so the oldest block is a leaf and dropping it breaks no chain.

Shape suffixes: as in model/ops.py; W = C + R, I = index dim, L layers, N blocks, P positions.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fullarc.config.model import ModelConfig

BLOCK = 16
TILE = 128
SKEW = 16


class Latents(Protocol):
    """A cache as the scheduler and the prefix cache see it, whatever its layout."""

    slots: int
    max_len: int

    def read(self, slot: int, start: int, count: int) -> Tensor:
        """What `count` tokens of a slot left behind: [L, count, W + I]."""
        ...

    def write(self, slot: int, start: int, kept_LPW: Tensor) -> None:
        """Put back what `read` gave."""
        ...


class Cache:
    """Latents, keys and index keys of `slots` sequences of up to `max_len` tokens (rounded up to whole tiles).

    With `mtp` the last layer is the MTP layer's, whose row p joins token p with the trunk's state at p - 1; it has no
    row 0.
    """

    def __init__(self, config: ModelConfig, slots: int, max_len: int, mtp: bool = False) -> None:
        self.slots, self.max_len = slots, -(-max_len // TILE) * TILE
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        layers, key = config.num_hidden_layers + mtp, self.width + config.index_head_dim
        # rows a power of two apart would share the same few cache sets
        self.keys = torch.zeros(layers, slots + 1, key, self.max_len + SKEW)[..., : self.max_len]
        self.values = torch.zeros(layers, slots + 1, self.max_len, self.width)

    @property
    def padding_slot(self) -> int:
        """Where rows go that belong to no sequence."""
        return self.slots

    def read(self, slot: int, start: int, count: int) -> Tensor:
        """What `count` tokens from position `start` on left behind: [L, count, W + I]."""
        return self.keys[:, slot, :, start : start + count].mT

    def write(self, slot: int, start: int, kept_LPW: Tensor) -> None:
        """Put back what `read` gave."""
        span = slice(start, start + kept_LPW.shape[1])
        self.keys[:, slot, :, span] = kept_LPW.mT
        self.values[:, slot, span] = kept_LPW[..., : self.width]


class PrefixCache:
    """Blocks of BLOCK tokens, up to `budget` tokens, least recently used first out."""

    def __init__(self, cache: Latents, budget: int) -> None:
        self.cache = cache
        layers, _, key = cache.read(0, 0, 1).shape
        self.kept = torch.zeros(budget // BLOCK, layers, BLOCK, key)
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._blocks: OrderedDict[tuple[int, tuple[int, ...]], int] = OrderedDict()
        self._free = list(range(len(self.kept)))

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._blocks) * BLOCK

    @property
    def enabled(self) -> bool:
        """False when the budget is smaller than one block."""
        return len(self.kept) > 0

    def clear(self) -> None:
        """Forget everything (weights changed, or /flush_cache)."""
        self._free.extend(self._blocks.values())
        self._blocks.clear()
        self._key_of.clear()

    def match(self, ids: Sequence[int]) -> list[int]:
        """Blocks of the longest known prefix of `ids`."""
        found: list[int] = []
        parent = -1
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            block = self._blocks.get((parent, tuple(ids[start : start + BLOCK])))
            if block is None:
                break
            found.append(block)
            parent = block
        self._touch(found)
        return found

    def restore(self, blocks: list[int], slot: int) -> None:
        """Copy `blocks` to the beginning of a slot."""
        if not blocks:
            return
        self.cache.write(slot, 0, self.kept[torch.tensor(blocks)].transpose(0, 1).flatten(1, 2))

    def publish(self, ids: Sequence[int], slot: int) -> None:
        """Remember the whole blocks of `ids`, whose entries stand at the beginning of `slot`."""
        chain = self.match(ids)
        first, new, mine = len(chain), list[int](), set(chain)
        for start in range(first * BLOCK, len(ids) - BLOCK + 1, BLOCK):
            block = self._allocate(mine)
            if block is None:
                break
            key = (chain[-1] if chain else -1, tuple(ids[start : start + BLOCK]))
            self._blocks[key], self._key_of[block] = block, key
            chain.append(block)
            new.append(block)
            mine.add(block)
        self._touch(chain)
        if new:
            kept_LPW = self.cache.read(slot, first * BLOCK, len(new) * BLOCK)
            self.kept[torch.tensor(new)] = kept_LPW.unflatten(1, (-1, BLOCK)).transpose(0, 1)

    def _touch(self, chain: list[int]) -> None:
        """Mark a chain as used, the root last: a parent is always more recent than its children."""
        for block in reversed(chain):
            self._blocks.move_to_end(self._key_of[block])

    def _allocate(self, protected: set[int]) -> int | None:
        """A free block, or the oldest one outside `protected`; None when there is none."""
        if self._free:
            return self._free.pop()
        if not self._blocks:
            return None
        key, block = next(iter(self._blocks.items()))
        if block in protected:
            return None
        del self._blocks[key], self._key_of[block]
        return block
