"""What attention remembers of running sequences; what later requests reuse of it is in `prefix`.

`Cache` holds, per layer and slot (= one running sequence), what a token leaves behind: the absorbed key (latent and
rotated part) and the index key; and the absorbed key again as a row, whose latent is the value. Keys are stored
[dim, position] because that makes the product with a few query heads twice as fast; rows are what sparse attention
gathers. The last slot receives the padding rows of a batch.

Shape suffixes: as in model/ops.py; W = C + R, I = index dim, L layers, P positions.
"""

from typing import Protocol

import torch
from torch import Tensor

from fullarc.config.model import ModelConfig

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
