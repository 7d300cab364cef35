"""Mixture of experts: a router that decides, a dispatcher that moves, experts that compute (GLM-5 Table 10).

    s = sigmoid(W_r x);  take the top-k of s + b;  g_i = scale * s_i / (sum of taken s);  y = shared(x) + sum g_i E_i(x)

b is the balancing bias: it steers the choice, never the weights, and is moved by the trainer against the load
(aux-loss-free balancing). Nothing is dropped: an expert computes all the tokens it is given.
Shape suffixes: see ops.py; M = tokens (B * T), flattened; P = rows of the buffer sorted by expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullarc.config.model import ModelConfig
from fullarc.model.context import WHOLE, Context
from fullarc.model.ops import stable_topk
from fullarc.model.quant import Linear, QuantScheme, fake_quantize, rounded

WEIGHT_FLOOR = 1e-20
ROW_BLOCK = 16


class FFN(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, inner)
        self.up_proj = Linear(dim, inner)
        self.down_proj = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores in fp32, group-limited top-k with a balancing bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [M, E], chosen experts [M, K] (ascending) and their weights [M, K]."""
        c = self.config
        scores_ME = F.linear(x_MD.float(), self.weight.float()).sigmoid()
        choice_ME = scores_ME.detach() + self.e_score_correction_bias
        if c.n_group > 1:
            grouped = choice_ME.unflatten(-1, (c.n_group, -1))
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(
                -1, stable_topk(group_score, c.topk_group), True
            )
            choice_ME = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        chosen_MK = stable_topk(choice_ME, c.num_experts_per_tok)
        weights_MK = scores_ME.gather(-1, chosen_MK)
        if c.norm_topk_prob:
            weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + WEIGHT_FLOOR)
        return scores_ME, chosen_MK, weights_MK * c.routed_scaling_factor


class Experts(nn.Module):
    """All routed experts as three-dimensional weights; gate rows come first in `gate_up_proj`.

    `scales` of both, [E, O, 1], where a checkpoint's products are of integers (see `quant.Linear`).
    """

    scheme: QuantScheme | None = None
    scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))

    def used(self) -> tuple[Tensor, Tensor]:
        """`gate_up_proj` and `down_proj` as the products use them: as stored, or quantised by `scheme`."""
        return fake_quantize(self.gate_up_proj, self.scheme), fake_quantize(self.down_proj, self.scheme)

    def forward(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        """Apply expert e to its own run of rows of `x`, which is sorted by expert; `ends` are the runs' ends."""
        gate_up, down = (weight.to(x_MD.dtype) for weight in self.used())
        x_MD = rounded(x_MD, self.scales[0])
        gate_MF, up_MF = F.grouped_mm(x_MD, gate_up.mT, offs=ends_E).chunk(2, dim=-1)
        inner_MF = rounded((F.silu(gate_MF) * up_MF).contiguous(), self.scales[1])
        return F.grouped_mm(inner_MF, down.mT, offs=ends_E)


def dispatch(chosen_MK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Where each (token, choice) goes: its row [M, K] in the buffer sorted by expert, and the runs' ends [E].

    Runs are padded to a multiple of ROW_BLOCK, which makes an expert's result for one token independent, to the
    bit, of how many others it was given (fp32 matmul kernels treat full blocks of rows alike).
    """
    flat = chosen_MK.flatten()
    counts_E = torch.bincount(flat, minlength=experts)
    padded_E = (counts_E + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
    ends_E = padded_E.cumsum(0)
    order = flat.argsort(stable=True)
    owner = flat[order]
    rank = torch.arange(len(flat), device=flat.device) - (counts_E.cumsum(0) - counts_E)[owner]
    slot = torch.empty_like(flat).scatter_(0, order, (ends_E - padded_E)[owner] + rank)
    return slot.view_as(chosen_MK), ends_E.to(torch.int32)


def tokens_of(slot_MK: Tensor, rows: int) -> Tensor:
    """The token that each of the buffer's rows is for [P]; the first one on padding, whose results nobody reads."""
    m, k = slot_MK.shape
    token = torch.arange(m, device=slot_MK.device).repeat_interleave(k)
    return slot_MK.new_zeros(rows).index_copy_(0, slot_MK.flatten(), token)


class _Spread(torch.autograd.Function):
    """Each token's row at all of its slots."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, slot_MK: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(slot_MK)
        return x_MD.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slot_MK,) = ctx.saved_tensors
        return F.embedding_bag(slot_MK, grad_outputs[0], mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """Each token's weighted sum of the rows at its slots."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, weights_MK: Tensor, slot_MK: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(rows_PD, weights_MK, slot_MK, token_P)
        return F.embedding_bag(slot_MK, rows_PD, mode="sum", per_sample_weights=weights_MK)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows_PD, weights_MK, slot_MK, token_P = ctx.saved_tensors
        grad_PD = grad_outputs[0].index_select(0, token_P)
        grad_weights_MK = (grad_PD * rows_PD).sum(-1)[slot_MK]
        weight_P = weights_MK.new_zeros(len(token_P)).index_copy_(0, slot_MK.flatten(), weights_MK.flatten())
        return grad_PD.mul_(weight_P[:, None]), grad_weights_MK, None, None


@dataclass
class RoutingStats:
    """Tokens per expert [E] (padding left out) and the sequence-level balance loss of one layer."""

    load_E: Tensor
    aux_loss: Tensor


class MoE(nn.Module):
    """Router, local dispatch, experts, and the shared expert that sees every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            FFN(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def quantize_experts(self, scheme: QuantScheme | None, shared: bool = False) -> None:
        """See `GlmMoeDsa.quantize_experts`."""
        self.experts.scheme = scheme
        if self.shared_experts is not None:
            for linear in self.shared_experts.children():
                assert isinstance(linear, Linear)
                linear.scheme = scheme if shared else None

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None, context: Context = WHOLE
    ) -> tuple[Tensor, RoutingStats]:
        x_MD = x_BTD.flatten(0, 1)
        scores_ME, chosen_MK, weights_MK = self.gate(x_MD)
        slot_MK, ends_E = dispatch(chosen_MK, scores_ME.shape[-1])
        token_P = tokens_of(slot_MK, int(ends_E[-1]))
        out_PD = self.experts(_Spread.apply(x_MD, slot_MK, token_P), ends_E)
        y_MD = _Combine.apply(out_PD, weights_MK.to(out_PD.dtype), slot_MK, token_P)
        if self.shared_experts is not None:
            y_MD = y_MD + self.shared_experts(x_MD)
        return y_MD.view_as(x_BTD), self._stats(scores_ME, chosen_MK, x_BTD.shape, valid_BT, context)

    def _stats(
        self,
        scores_ME: Tensor,
        chosen_MK: Tensor,
        shape: torch.Size,
        valid_BT: Tensor | None,
        context: Context,
    ) -> RoutingStats:
        """Load and sequence-wise auxiliary loss: mean over sequences of sum_e f_e P_e (DeepSeek-V3, Eqs 17-20).

        Of a divided row both are the part of the positions that are here, with the f_e of the whole row.
        """
        experts, k = scores_ME.shape[-1], chosen_MK.shape[-1]
        valid = scores_ME.new_ones(shape[:2]) if valid_BT is None else valid_BT.to(scores_ME.dtype)
        hits_BTE = (
            torch.zeros_like(scores_ME).scatter_(-1, chosen_MK, 1.0).view(*shape[:2], experts)
            * valid[..., None]
        )
        tokens_B = context.total(valid.sum(1)).clamp_min(1.0)
        share_BE = context.total(hits_BTE.sum(1)) * (experts / k) / tokens_B[:, None]
        probability = scores_ME / (scores_ME.sum(-1, keepdim=True) + WEIGHT_FLOOR)
        mean_BE = (probability.view(*shape[:2], experts) * valid[..., None]).sum(1) / tokens_B[:, None]
        return RoutingStats(hits_BTE.sum((0, 1)).detach(), (share_BE * mean_BE).sum(-1).mean())
