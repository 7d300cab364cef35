"""Optimizer state divided over ranks: every parameter has one owner (ZeRO stage 1; GLM-5 section 2.4).

The owner alone keeps a parameter's moments, runs Newton-Schulz on its matrices or AdamW on its elements, and sends
the new weights to the others. Besides the sum of the gradients only finished weights travel: no rank gathers
moments, and no matrix is orthogonalised twice.

Invariant: given equal gradients, the weights are bit for bit those of `Optimizer`, because the update of a
parameter depends on its own gradients only.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from fullarc.train.optim import (
    HeadShape,
    Optimizer,
    OptimSettings,
    cut,
    newton_schulz_cost,
    require_gradients,
    uses_adamw,
)
from fullarc.train.parallel.ranks import Ranks


def share_out(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """An owner for each name: the dearest first, each to the rank with the least so far."""
    owners, loads = {}, [0.0] * size
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def muon_cost(name: str, shape: tuple[int, ...], heads: HeadShape, split: bool) -> int:
    """Multiplications of one update of a parameter's blocks."""
    blocks = [block for _, block in cut(name, torch.empty(shape, device="meta"), heads, split)]
    return sum(n * newton_schulz_cost(rows, columns) for n, rows, columns in blocks)


def owners_of(
    shapes: Mapping[str, tuple[int, ...]], settings: OptimSettings, heads: HeadShape, size: int
) -> dict[str, int]:
    """The owner of each parameter: matrices by what Newton-Schulz costs, the rest by number of elements."""
    muon: dict[str, float] = {}
    adamw: dict[str, float] = {}
    for name, shape in shapes.items():
        if settings.kind == "adamw" or uses_adamw(name, torch.empty(shape, device="meta")):
            adamw[name] = prod(shape)
        else:
            muon[name] = muon_cost(name, shape, heads, settings.kind == "muon_split")
    return share_out(muon, size) | share_out(adamw, size)


class ShardedOptimizer(Optimizer):
    """`Optimizer` over the parameters that this rank owns; `step` also brings the others' new weights."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimSettings,
        heads: HeadShape,
        ranks: Ranks,
        workers: int = 1,
    ) -> None:
        self.everyone, self.ranks = dict(parameters), ranks
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.owners = owners_of(shapes, settings, heads, ranks.size)
        mine = {name: p for name, p in parameters.items() if self.owners[name] == ranks.rank}
        super().__init__(mine, settings, heads, workers)

    def step(self, lr: float) -> None:
        """One update of all parameters, each by its owner."""
        require_gradients(self.everyone)
        super().step(lr)
        weights = [parameter.data for parameter in self.everyone.values()]
        self.ranks.spread_(weights, [self.owners[name] for name in self.everyone])

    def room(self, key: str, shape: torch.Size) -> Tensor | None:
        """Memory for a tensor of this rank's part of the whole state; None for the others'."""
        name = parameter_of(key)
        return None if name in self.everyone and name not in self.parameters else super().room(key, shape)


def parameter_of(key: str) -> str:
    """The parameter that a tensor of the optimizer's state belongs to."""
    kind, _, rest = key.partition(".")
    return rest.partition(".")[2] if kind == "adamw" else rest
