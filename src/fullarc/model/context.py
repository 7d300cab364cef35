"""Where a row's positions are: all of them here, or, when processes share a row, some here and some elsewhere.

The model computes the positions that this process owns and asks its `Context` for the rest: the keys that its
queries may see, and sums over a whole row. In one process every answer is the question.

Shapes: B rows, T positions of a row, t positions owned here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Context:
    """Every position of every row is here. `train.parallel` has the others."""

    divided = False

    def runs(self, length: int) -> list[tuple[int, int]]:
        """The runs (start, stop) of positions owned here, of rows of `length`, ascending."""
        return [(0, length)]

    def own(self, x: Tensor) -> Tensor:
        """The owned positions [B, t, ...] of [B, T, ...]."""
        return x

    def targets(self, x: Tensor) -> Tensor:
        """What of targets or of a mask [B, T] belongs to the final states that are computed here."""
        return x

    def gather(self, *tensors: Tensor) -> Sequence[Tensor]:
        """All positions [B, T, ...], in order, of tensors [B, t, ...]; gradients go back to the owners."""
        return tensors

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes that share the rows; a constant."""
        return x

    def attend(self, attention: Callable[..., Any], *arguments: Any) -> Any:
        """Call `attention`, which expands what was gathered; says whether the expansion is kept for the backward."""
        return attention(*arguments)


WHOLE = Context()
