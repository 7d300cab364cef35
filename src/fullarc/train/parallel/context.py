"""Context parallelism: the positions of every row divided over ranks (GLM-5 section 2.4).

A row of T positions is cut into 2 S equal runs and rank r has runs r and 2 S - 1 - r, an early and a late one: a
query's work grows with its position, so all ranks have the same. What a query needs of other positions is what the
cache stores of them, one latent, one rotated key part and one index key a token; these are gathered in every layer,
and the backward pass sums their gradients at their owners. Keys and values that are expanded from latents live while
their layer runs and are expanded again for the backward pass, so all that a rank keeps is its share of the
activations, and the latents.

Invariant: loss, metrics, loads and gradients of a rank are parts whose sums over the ranks are those of one process;
indexers choose the same keys. Every rank runs every pass, forward and backward.

Shapes: B rows, T positions, t = T / S positions of a rank, S ranks, X features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fullarc.config.errors import FullarcError
from fullarc.model import GlmMoeDsa
from fullarc.model.context import Context
from fullarc.train.losses import LossSum
from fullarc.train.optim import OptimSettings
from fullarc.train.parallel.ranks import Ranks
from fullarc.train.trainer import LossFn, Trainer


class DividedContext(Context):
    """This rank's share of the positions; see `Context`. What talks to other ranks is never compiled.

    Raises:
        FullarcError: rows cannot be cut into two runs a rank.
    """

    divided = True

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def runs(self, length: int) -> list[tuple[int, int]]:
        """An early and a late run of the same length."""
        run, rest = divmod(length, 2 * self.ranks.size)
        if rest:
            raise FullarcError(
                f"Rows of {length} positions cannot be divided over {self.ranks.size} ranks: each has two runs.",
                f"Choose a row length that is a multiple of {2 * self.ranks.size}, or other processes.",
            )
        return [
            (n * run, (n + 1) * run) for n in (self.ranks.rank, 2 * self.ranks.size - 1 - self.ranks.rank)
        ]

    def own(self, x: Tensor) -> Tensor:
        """The positions of the two runs."""
        return torch.cat([x[:, start:stop] for start, stop in self.runs(x.shape[1])], 1)

    def targets(self, x: Tensor) -> Tensor:
        """States are computed where their positions are."""
        return self.own(x)

    @torch.compiler.disable
    def gather(self, *tensors: Tensor) -> Sequence[Tensor]:
        """One all-gather for all; a reduce-scatter in the backward pass."""
        joined_BtX = torch.cat(tensors, -1)
        return _Gather.apply(joined_BtX, self.ranks.size).split([x.shape[-1] for x in tensors], -1)

    @torch.compiler.disable
    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on all."""
        total = x.detach().clone()
        self.ranks.sum_([total])
        return total

    @torch.compiler.disable
    def attend(self, attention: Callable[..., Any], *arguments: Any) -> Any:
        """Attention is computed again in the backward pass; what it expands of all positions is not kept."""
        return checkpoint(attention, *arguments, use_reentrant=False, preserve_rng_state=False)


class _Gather(torch.autograd.Function):
    """[B, t, X] of every rank to [B, T, X] in the order of the row; the gradient is summed at the owner."""

    @staticmethod
    def forward(ctx: Any, x_BtX: Tensor, size: int) -> Tensor:
        ctx.size = size
        parts_SBtX = x_BtX.new_empty(size, *x_BtX.shape)
        dist.all_gather(list(parts_SBtX), x_BtX.contiguous())
        early, late = parts_SBtX.chunk(2, 2)
        return torch.cat((early, late.flip(0))).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        early, late = grad_outputs[0].unflatten(1, (2 * ctx.size, -1)).movedim(1, 0).chunk(2)
        parts_SBtX = torch.cat((early, late.flip(0)), 2).contiguous()
        grad_BtX = torch.empty_like(parts_SBtX[0])
        dist.reduce_scatter(grad_BtX, list(parts_SBtX))
        return grad_BtX, None


class ContextTrainer(Trainer):
    """`Trainer` whose ranks compute all micro-batches together, each its positions; see `Trainer` for the arguments.

    Optimizer state is divided as by `Trainer`.

    Raises:
        FullarcError: the model has grouped-query attention.
    """

    def __init__(
        self,
        model: GlmMoeDsa,
        settings: OptimSettings,
        lr: Callable[[int], float],
        trainable: Callable[[str], bool],
        router_bias_rate: float,
        ranks: Ranks,
    ) -> None:
        if model.config.gqa_kv_heads:
            raise FullarcError(
                "Context parallelism shares latents: it cannot divide the rows of grouped-query attention.",
                "Choose another `parallel`, or gqa_kv_heads = 0.",
            )
        model.context = DividedContext(ranks)
        super().__init__(model, settings, lr, trainable, router_bias_rate, ranks=ranks)

    def _share(self, micro_batches: int) -> range:
        return range(micro_batches)

    def _pass(self, loss_fn: LossFn, batch: Any) -> tuple[LossSum, Sequence[Tensor | None]]:
        out = loss_fn(self.model, batch)  # whatever the loss is: the other ranks take part in its gradients
        return out, torch.autograd.grad(out.total, list(self.parameters.values()), allow_unused=True)
