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

import torch

from fullarc.config.model import ModelConfig

BLOCK = 16
TILE = 128
SKEW = 16


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


class PrefixCache:
    """Blocks of BLOCK tokens, up to `budget` tokens, least recently used first out."""

    def __init__(self, cache: Cache, budget: int) -> None:
        self.cache = cache
        blocks = budget // BLOCK
        layers, _, key, _ = cache.keys.shape
        self.keys = torch.zeros(blocks, layers, key, BLOCK)
        self.values = torch.zeros(blocks, layers, BLOCK, cache.values.shape[-1])
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._blocks: OrderedDict[tuple[int, tuple[int, ...]], int] = OrderedDict()
        self._free = list(range(blocks))

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._blocks) * BLOCK

    @property
    def enabled(self) -> bool:
        """False when the budget is smaller than one block."""
        return len(self.keys) > 0

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
        size, at = len(blocks) * BLOCK, torch.tensor(blocks)
        self.cache.keys[:, slot, :, :size] = self.keys[at].permute(1, 2, 0, 3).flatten(2)
        self.cache.values[:, slot, :size] = self.values[at].transpose(0, 1).flatten(1, 2)

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
            span, at = slice(first * BLOCK, (first + len(new)) * BLOCK), torch.tensor(new)
            keys = self.cache.keys[:, slot, :, span].unflatten(2, (len(new), BLOCK))
            self.keys[at] = keys.permute(2, 0, 1, 3)
            values = self.cache.values[:, slot, span].unflatten(1, (len(new), BLOCK))
            self.values[at] = values.transpose(0, 1)

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
