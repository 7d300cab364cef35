"""What the model chose: the experts of every MoE layer and the keys of every indexer, for training that replays them.

A `Trace` takes the choices of one step's rows; `Core.forward` fills it when it is given one. `Choices` keeps those of
one request by position, whatever chunks, drafts and repetitions they came in: the last computation of a position
counts. What is asked for is computed: the prefix cache, which has no choices, serves only the positions before.

Both have a row for every layer, as SGLang's have: experts [position, layer, k] ascending, 0 in dense layers; keys
[position, layer, index_topk] ascending, -1 behind the last. A layer without an indexer of its own repeats the choice it
uses. Invariant: rows are int32 and hold no more than what the layer computed with.
Shape suffixes: N rows of a step, L layers, K experts of a token, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullarc.config.model import ModelConfig


@dataclass
class Trace:
    """Where one forward pass writes its choices, [N, L, K] and [N, L, index_topk]; None = not wanted."""

    experts_NLK: Tensor | None
    keys_NLS: Tensor | None

    @classmethod
    def of(cls, config: ModelConfig, rows: int, asked: "Sequence[Choices | None]") -> "Trace | None":
        """An empty one of `rows` rows for what some requests ask for; None if they ask for nothing."""
        wanted = [choices for choices in asked if choices]
        if not wanted:
            return None
        experts, keys = any(c.experts_from is not None for c in wanted), any(c.keys for c in wanted)
        shape = rows, config.num_hidden_layers
        return cls(
            torch.zeros(*shape, config.num_experts_per_tok, dtype=torch.int32) if experts else None,
            torch.full((*shape, config.index_topk), -1, dtype=torch.int32) if keys else None,
        )


def seen(choice: Tensor, gathers: bool, topk: int) -> Tensor:
    """A grid's `choice` (see `attention.choose`) as int32 positions [N, topk], ascending, -1 behind the last."""
    if gathers:
        return choice.int()
    size = choice.shape[-1]
    positions = torch.where(choice == 0, torch.arange(size), size).sort(-1).values[:, :topk]
    return torch.nn.functional.pad(
        positions.masked_fill(positions == size, -1), (0, topk - positions.shape[1]), value=-1
    ).int()


class Choices:
    """The choices of one request: experts from position `experts_from` on (None = none), all positions' keys, or both.

    `first`: the first position that must be computed, whatever the prefix cache has.
    """

    def __init__(self, experts_from: int | None, keys: bool = False) -> None:
        self.experts_from, self.keys = experts_from, keys
        self.first = 0 if keys or experts_from is None else experts_from
        self._parts: list[tuple[int, Trace]] = []

    def add(self, position: int, trace: Trace, rows: slice) -> None:
        """Take the `rows` of a step, which stand at `position`, `position` + 1, …"""
        experts = trace.experts_NLK if self.experts_from is not None else None
        keys = trace.keys_NLS if self.keys else None
        self._parts.append((position, Trace(*(x if x is None else x[rows].clone() for x in (experts, keys)))))

    def clear(self) -> None:
        """Forget all: the positions will be computed again."""
        self._parts.clear()

    def read(self, end: int) -> Trace | None:
        """What the positions up to `end` chose; None unless all of them from `first` on were computed."""
        known = torch.zeros(max(end, 0), dtype=torch.bool)
        for position, part in self._parts:
            rows = part.experts_NLK if part.experts_NLK is not None else part.keys_NLS
            known[position : position + len(rows if rows is not None else ())] = True
        if not self._parts or not known[self.first :].all():
            return None
        experts = self._gather([(p, part.experts_NLK) for p, part in self._parts], len(known))
        keys = self._gather([(p, part.keys_NLS) for p, part in self._parts], len(known))
        return Trace(experts if experts is None else experts[self.experts_from :], keys)

    @staticmethod
    def _gather(parts: list[tuple[int, Tensor | None]], end: int) -> Tensor | None:
        """Rows of the positions before `end`; later parts replace earlier ones."""
        out: Tensor | None = None
        for position, rows in parts:
            if rows is not None:
                out = rows.new_zeros(end, *rows.shape[1:]) if out is None else out
                some = rows[: max(end - position, 0)]
                out[position : position + len(some)] = some
        return out
