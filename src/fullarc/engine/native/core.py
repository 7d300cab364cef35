"""A step's forward pass as one call into C, with the same face as the plain one (`engine.core.Core`).

Invariant: a row's result depends, to the bit, on its own sequence only (matrix.h, attention.h); so prefill, decoding,
scoring, any batch and any number of threads agree. The call does not hold the interpreter's lock.
Shape suffixes: as in model/ops.py; N rows, P positions, W = C + R, I index dim.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fullarc.config.model import ModelConfig
from fullarc.engine.core import Chunk
from fullarc.engine.native.library import library
from fullarc.engine.native.memory import floats
from fullarc.engine.native.weights import LANES, PANEL, NativeWeights, Product, whole
from fullarc.engine.trace import Trace

TILE = PANEL


class _Cache(ctypes.Structure):
    """attention.h, Cache."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("index_keys", "rows")),
        *((name, ctypes.c_int64) for name in ("layers", "slots", "tiles")),
        *((name, ctypes.c_int32) for name in ("width", "index_width")),
    )


class NativeCache:
    """Latents, keys and index keys of `slots` sequences of up to `max_len` tokens (rounded up to whole tiles).

    With `mtp` the last layer is the MTP layer's, whose row p joins token p with the trunk's state at p - 1.

    Attributes:
        rows [L, slots, P, W]: absorbed keys; their first C columns are the values.
        index_keys [L, slots, tiles, I, TILE].
    """

    def __init__(self, config: ModelConfig, slots: int, max_len: int, mtp: bool = False) -> None:
        tiles = -(-max_len // TILE)
        self.slots, self.max_len = slots, tiles * TILE
        self.width, self.index_width = config.kv_lora_rank + config.qk_rope_head_dim, config.index_head_dim
        layers = config.num_hidden_layers + mtp
        self.index_keys = floats(layers, slots, tiles, self.index_width, TILE)
        self.rows = floats(layers, slots, self.max_len, whole(self.width))
        self.structure = _Cache(
            self.index_keys.data_ptr(), self.rows.data_ptr(), layers, slots, tiles, self.width,
            self.index_width,
        )  # fmt: skip

    def read(self, slot: int, start: int, count: int) -> Tensor:
        """What `count` tokens from position `start` on left behind: [L, count, W + I]."""
        first, last = start // TILE, -(-(start + count) // TILE)
        index_LPI = self.index_keys[:, slot, first:last].transpose(2, 3).flatten(1, 2)
        at = start - first * TILE
        rows_LPW = self.rows[:, slot, start : start + count, : self.width]
        return torch.cat((rows_LPW, index_LPI[:, at : at + count]), -1)

    def write(self, slot: int, start: int, kept_LPW: Tensor) -> None:
        """Put back what `read` gave."""
        count = kept_LPW.shape[1]
        self.rows[:, slot, start : start + count, : self.width] = kept_LPW[..., : self.width]
        for at in range(start, start + count):  # to the end of a tile at most, then whole tiles
            if at != start and at % TILE:
                continue
            size = min(TILE - at % TILE, start + count - at)
            index_LIP = kept_LPW[:, at - start : at - start + size, self.width :].mT
            self.index_keys[:, slot, at // TILE, :, at % TILE : at % TILE + size] = index_LIP


class NativeCore:
    """Weights and cache; `forward` runs one step. Not thread-safe: one thread owns it.

    With `mtp` the cache has rows for the MTP layer and `look_ahead` may be called.
    """

    def __init__(
        self, weights: NativeWeights, slots: int, max_len: int, mtp: bool = False, threads: int = 1
    ) -> None:
        self.weights, self.threads = weights, threads
        self.cache = NativeCache(weights.config, slots, max_len, mtp)
        self._library = library()
        self._memory, self._rows = torch.empty(0, dtype=torch.uint8), 0

    def forward(self, chunks: Sequence[Chunk], trace: Trace | None = None) -> Tensor:
        """Final hidden states [rows, D] after the last norm, in the order of `chunks`. Each slot may appear once.

        `trace`, of as many rows, takes what they chose.
        """
        return self._pass(chunks, None, trace)

    def look_ahead(self, chunks: Sequence[Chunk], states_ND: Tensor) -> Tensor:
        """The MTP layer's states [rows, D] of tokens whose predecessors' states are given.

        The state of row p predicts token p + 1, and is what row p + 1 joins when the trunk's is not known yet.
        """
        return self._pass(chunks, _whole_rows(states_ND))

    def guess(
        self, states_ND: Tensor, slots: Sequence[int], positions: Sequence[int], wanted: Sequence[int],
        temperatures: Sequence[float], seeds: Sequence[int], steps: int, least: float = 0.0,
    ) -> list[list[int]]:  # fmt: skip
        """What the MTP layer guesses behind each sequence's last known token, up to wanted[i] tokens of it.

        It reads its own guesses on; the first one stands at positions[i]. Each is drawn at its temperature (0: the
        likeliest) by the number that will draw the token at its place. They end before the product of the likeliest
        ones' probabilities falls below `least`.
        """
        count = len(states_ND)
        states = _whole_rows(states_ND)
        if states.data_ptr() == states_ND.data_ptr():
            states = states.clone()
        model, vocab = self.weights.model, self.weights.config.vocab_size
        self._reserve(count)
        numbers = torch.empty((count + 2) * model.head.outputs + 5 * count)
        tokens, ints, floats32 = (
            (ctypes.c_int32 * (steps * count))(),
            ctypes.c_int32 * count,
            ctypes.c_float * count,
        )
        self._library.fullarc_draft(
            ctypes.byref(model), ctypes.byref(self.cache.structure), count, steps, states.data_ptr(), ints(*slots),
            ints(*positions), ints(*wanted), floats32(*temperatures), (ctypes.c_uint64 * count)(*seeds), vocab,
            math.log(least) if least else -math.inf, self.threads, self._memory.data_ptr(), numbers.data_ptr(), tokens,
        )  # fmt: skip
        return [[token for token in tokens[i::count] if token >= 0] for i in range(count)]

    def logits(self, hidden_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] of chosen rows."""
        chosen = hidden_ND if len(rows) == len(hidden_ND) else hidden_ND[torch.tensor(rows)]
        return multiply(self.weights.model.head, chosen, self.threads)[:, : self.weights.config.vocab_size]

    def _reserve(self, rows: int) -> None:
        """Have memory for a step of so many rows."""
        if rows > self._rows:
            model = ctypes.byref(self.weights.model)
            size = self._library.fullarc_room(model, rows, self.cache.max_len, self.threads)
            self._memory, self._rows = torch.empty(size, dtype=torch.uint8), rows

    def _pass(self, chunks: Sequence[Chunk], states_ND: Tensor | None, trace: Trace | None = None) -> Tensor:
        ids, slots, positions = list[int](), list[int](), list[int]()
        for chunk in chunks:
            ids += chunk.ids
            slots += [chunk.slot] * len(chunk.ids)
            positions += range(chunk.start, chunk.start + len(chunk.ids))
        count, c = len(ids), self.weights.config
        numbers = (ctypes.c_int32 * (3 * count))(*ids, *slots, *positions)
        at = ctypes.addressof(numbers)
        out_ND = torch.empty(count, whole(c.hidden_size))
        model = ctypes.byref(self.weights.model)
        self._reserve(count)
        self._library.fullarc_forward(
            model, ctypes.byref(self.cache.structure), count, at, at + 4 * count, at + 8 * count,
            states_ND.data_ptr() if states_ND is not None else None, self.threads, self._memory.data_ptr(),
            out_ND.data_ptr(), _pointer(trace.experts_NLK if trace else None),
            _pointer(trace.keys_NLS if trace else None),
        )  # fmt: skip
        return out_ND[:, : c.hidden_size]


def _whole_rows(states_ND: Tensor) -> Tensor:
    """Contiguous, and padded to whole vectors."""
    missing = -states_ND.shape[1] % LANES
    return (F.pad(states_ND, (0, missing)) if missing else states_ND).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def multiply(product: Product, x_NI: Tensor, threads: int = 1) -> Tensor:
    """A product of rows [N, I], whose last dimension must be contiguous: [N, outputs in whole vectors]."""
    assert x_NI.stride(-1) == 1
    rows, inputs = x_NI.shape
    memory = torch.empty(64 + rows * (8 + 2 * whole(inputs)), dtype=torch.uint8)
    out_NO = torch.empty(rows, product.outputs)
    library().fullarc_product(
        ctypes.byref(product), x_NI.data_ptr(), x_NI.stride(0), rows, threads, memory.data_ptr(), out_NO.data_ptr()
    )  # fmt: skip
    return out_NO
