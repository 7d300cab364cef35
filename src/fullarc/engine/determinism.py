"""Is the forward pass, on this machine and with these weights, equal to the bit however it is asked?

One sequence is prefilled at once, then computed again in pieces and token by token beside a changing crowd; states and
logits must be the same bits. It is so long that the indexer chooses keys at its end. Both forward passes are built so,
and compute nothing differently when they are held to it; this shows it where it counts, because it rests on what the
machine's compiler, or the row blocks of its matrix library, really do.
"""

import random
import time

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine.backend import ForwardPass
from fullarc.engine.core import Chunk

LENGTH = 96
PIECES = (1, 1, 1, 2, 5, 17)
CROWD = 12


@torch.inference_mode()
def check(core: ForwardPass) -> float:
    """Seconds that it took. Raises FullarcError naming what differs. Overwrites the cache's first slots."""
    began, c, rng = time.perf_counter(), core.weights.config, random.Random(0)
    longest = min(core.cache.max_len, c.max_position_embeddings)
    length = min(LENGTH if c.dense_attention else c.index_topk + LENGTH // 2, longest)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(c.vocab_size) for _ in range(count)]

    ids = tokens(length)
    whole = core.forward([Chunk(0, 0, ids)])[:length].clone()
    logits = core.logits(whole, list(range(length)))
    done = 0
    while done < length:
        size = max(length - LENGTH, 0) if not done else 0
        size = size or min(rng.choice(PIECES), length - done)
        crowd = [
            Chunk(slot, 0, tokens(rng.randrange(1, min(40, longest))))
            for slot in range(1, rng.randrange(1, min(core.cache.slots, CROWD) + 1))
        ]
        mine = Chunk(0, done, ids[done : done + size])
        chunks = [*crowd, mine] if rng.random() < 0.5 else [mine, *crowd]
        first = sum(len(chunk.ids) for chunk in chunks[: chunks.index(mine)])
        states, rows = core.forward(chunks), list(range(first, first + size))
        where = f"{size} tokens at position {done} beside {len(crowd)} sequences"
        _same(states[first : first + size], whole[done : done + size], f"states of {where}")
        _same(core.logits(states, rows), logits[done : done + size], f"logits of {where}")
        done += size
    return time.perf_counter() - began


def _same(ours: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(ours, expected):
        raise FullarcError(
            f"Here the {what} differ from those of one prefill by up to {(ours - expected).abs().max():.1e}.",
            "Start without --deterministic, or with other --kernels.",
        )
