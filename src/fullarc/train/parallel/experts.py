"""Expert parallelism: experts divided over ranks, tokens sent to them and back (GLM-5 section 2.4).

`divide_experts` swaps every MoE layer's experts for `ParallelExperts`, which take the same call: rows sorted by
expert and the ends of the runs. Router, shared expert and the rest of the model are untouched. The gradient of an
expert is then the sum over the tokens of all ranks, and is not to be summed again; a gradient of anything else is
this rank's part.

Invariant: outputs and input gradients are bit for bit those of the local layer, because runs are padded to
ROW_BLOCK before they travel; weight gradients are equal up to the order of sums. Every rank runs the layer, forward
and backward, equally often; a rank may have no tokens for an expert.

Shapes: P padded rows sent, Q padded rows received, D hidden, E experts, S ranks, L local experts (E / S).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fullarc.config.errors import FullarcError
from fullarc.model import GlmMoeDsa
from fullarc.model.moe import Experts, MoE
from fullarc.train.parallel.ranks import Ranks


class ParallelExperts(Experts):
    """This rank's run of the experts of a layer; the call is that of `Experts` with all of them.

    Raises:
        FullarcError: the experts cannot be divided evenly.
    """

    def __init__(self, experts: Experts, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        total = len(experts.gate_up_proj)
        if total % ranks.size:
            raise FullarcError(
                f"{total} experts cannot be divided evenly over {ranks.size} ranks.",
                "Choose a number of ranks that divides them.",
            )
        self.scheme = experts.scheme
        self.size, self.here = ranks.size, total // ranks.size
        mine = slice(ranks.rank * self.here, (ranks.rank + 1) * self.here)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[mine].clone())
        self.down_proj = nn.Parameter(experts.down_proj.detach()[mine].clone())

    def forward(self, x_PD: Tensor, ends_E: Tensor) -> Tensor:
        """Apply expert e to its own run of rows, on the rank that has it."""
        counts_SL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.size, self.here)
        received_SL = torch.empty_like(counts_SL)
        dist.all_to_all_single(received_SL, counts_SL)
        out_rows, in_rows = counts_SL.sum(1).tolist(), received_SL.sum(1).tolist()

        y_QD = _AllToAll.apply(x_PD, in_rows, out_rows)
        # runs arrive by source, then expert; the experts want them by expert
        expert_Q = torch.arange(self.here).repeat(self.size).repeat_interleave(received_SL.flatten())
        order_Q = expert_Q.argsort(stable=True)
        ends_L = received_SL.sum(0).cumsum(0).to(torch.int32)
        y_QD = super().forward(y_QD[order_Q], ends_L)[order_Q.argsort()]
        return _AllToAll.apply(y_QD, out_rows, in_rows)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, by runs; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, in_rows: Sequence[int], out_rows: Sequence[int]) -> Tensor:
        ctx.rows = in_rows, out_rows
        received_QD = x_PD.new_empty(sum(in_rows), x_PD.shape[1])
        dist.all_to_all_single(received_QD, x_PD.contiguous(), in_rows, out_rows)
        return received_QD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        in_rows, out_rows = ctx.rows
        return _AllToAll.apply(grad_outputs[0], out_rows, in_rows), None, None


def divide_experts(model: GlmMoeDsa, ranks: Ranks) -> None:
    """Leave this rank with its share of the experts of every MoE layer, in place."""
    for module in list(model.modules()):
        if isinstance(module, MoE):
            module.experts = ParallelExperts(module.experts, ranks)


def divided_experts(model: GlmMoeDsa) -> frozenset[str]:
    """Names of the parameters of which this rank has only its experts."""
    found = {name for name, module in model.named_modules() if isinstance(module, ParallelExperts)}
    return frozenset(name for name, _ in model.named_parameters() if name.rpartition(".")[0] in found)
