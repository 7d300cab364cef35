"""The lightning indexer of DeepSeek Sparse Attention: which keys may a query look at?

    I[t, s] = sum_j w[t, j] * ReLU(q[t, j] . k[s] * dim^-1/2)          (GLM-5 section 2.1.1; DeepSeek-V3.2, Eq. 1)

Invariants: scores are fp32; the choice is `stable_topk` over allowed keys; the indexer reads detached inputs, so
the language-model loss never reaches it and its own loss never reaches anything else.
Shape suffixes: see ops.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullarc.config.model import ModelConfig
from fullarc.model.ops import apply_rope, topk_mask
from fullarc.model.pieces import Scratch, each, gather, lanes, spans
from fullarc.model.quant import Linear
from fullarc.model.visibility import Chunk

TARGET_FLOOR = 1e-10
FEW = 128  # queries that are scored at once
TILE = 2048  # keys that they are scored on at once, by all heads


class Indexer(nn.Module):
    """Scores every key for every query with a few cheap heads that share one key per token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.rope_dim, self.topk = config.qk_rope_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.wk = Linear(config.hidden_size, self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = Linear(config.hidden_size, self.heads)

    def queries(self, q_latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index queries [..., J, dim] from q-latents [..., Q]; RoPE on the first `rope_dim` dimensions."""
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        return self._rotate_first(q, cos.unsqueeze(-2), sin.unsqueeze(-2))

    def keys(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index keys [..., dim] from hidden states [..., D]."""
        return self._rotate_first(self.k_norm(self.wk(h).to(self.k_norm.weight.dtype)).to(h.dtype), cos, sin)

    def head_weights(self, h: Tensor) -> Tensor:
        """Head weights [..., J] in fp32."""
        return self.weights_proj(h.float()) * self.heads**-0.5

    def _rotate_first(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = apply_rope(x[..., : self.rope_dim], cos, sin)
        return torch.cat((rotated, x[..., self.rope_dim :]), dim=-1)

    def scores(self, q_BTJd: Tensor, k_BSd: Tensor, w_BTJ: Tensor) -> Tensor:
        """I [B, T, S] in fp32, one head at a time so that no [T, S, J] tensor exists."""
        keys_BdS = k_BSd.float().mT
        total_BTS: Tensor | None = None
        for head in range(self.heads):
            dot_BTS = q_BTJd[:, :, head].float() @ keys_BdS * self.dim**-0.5
            if torch.is_grad_enabled():
                term_BTS = F.relu(dot_BTS) * w_BTJ[:, :, head, None]
                total_BTS = term_BTS if total_BTS is None else total_BTS + term_BTS
            else:
                term_BTS = F.relu(dot_BTS, inplace=True).mul_(w_BTJ[:, :, head, None])
                total_BTS = term_BTS if total_BTS is None else total_BTS.add_(term_BTS)
        assert total_BTS is not None
        return total_BTS

    @torch.no_grad()
    def tiled_scores(self, q_tJd: Tensor, k_Sd: Tensor, w_tJ: Tensor, scratch: Scratch) -> Tensor:
        """`scores` of a row [t, S] in a fifth of the time, in scratch memory, without a gradient; equal up to rounding.

        All heads at once, in tiles whose dot products stay in the cache until they are summed.
        """
        queries_MD, keys_dS = q_tJd.float().mul(self.dim**-0.5).flatten(0, 1), k_Sd.float().mT
        out_tS = scratch("scores", queries_MD, len(q_tJd), len(k_Sd))
        for part in spans(0, len(k_Sd), TILE):
            tile_dS = keys_dS[:, part]
            dots_MS = scratch("dots", queries_MD, len(queries_MD), tile_dS.shape[1])
            torch.mm(queries_MD, tile_dS, out=dots_MS).relu_()
            out_tS[:, part] = torch.bmm(w_tJ[:, None], dots_MS.unflatten(0, (-1, self.heads)))[:, 0]
        return out_tS

    def scores_at(self, q_BtJd: Tensor, k_BSd: Tensor, w_BtJ: Tensor, positions: Tensor) -> Tensor:
        """I [B, t, k] in fp32 of each query's own keys, at `positions` [B, t, k]; -1 is read as 0."""
        scores: Tensor = _ScoresAt.apply(q_BtJd.float() * self.dim**-0.5, k_BSd.float(), w_BtJ, positions)
        return scores


@dataclass
class Index:
    """An indexer's view of a row: queries [B, T, J, d], blocks of keys [B, S, d], head weights [B, T, J].

    Where later layers share its choice, it is remembered by the chunk's start: what was taken of the chunk's keys, as
    a mask [B, t, S] or, where keys are gathered, by a run of chunks' start as positions [B, t, k].
    """

    indexer: Indexer
    queries: Tensor
    keys: Sequence[Tensor]
    weights: Tensor
    learns: bool
    lends: bool
    masks: dict[int, Tensor] = field(default_factory=dict)
    positions: dict[int, Tensor] = field(default_factory=dict)

    def scores(self, chunk: Chunk) -> Tensor:
        """I [B, t, S] over the chunk's keys."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            keys = chunk.of(self.keys, 1)
            return self.indexer.scores(self.queries[:, chunk.part], keys, self.weights[:, chunk.part])

    def scores_at(self, part: slice, positions: Tensor) -> Tensor:
        """I [B, t, k] of a run of queries at their positions [B, t, k] in the row only."""
        keys = torch.cat(list(self.keys), 1)
        return self.indexer.scores_at(self.queries[:, part], keys, self.weights[:, part], positions)

    @torch.no_grad()
    def choose(self, run: Sequence[Chunk]) -> Tensor:
        """The keys that each query of neighbouring chunks takes: positions in the row [B, t, k], int32, then -1."""
        known = self.positions.get(run[0].part.start)
        if known is not None:
            return known
        row_BTd = torch.cat(list(self.keys), 1)
        rows, start, stop = len(self.weights), run[0].part.start, run[-1].part.stop
        positions = torch.empty(
            rows, stop - start, self.indexer.topk, dtype=torch.int32, device=self.weights.device
        )

        def take(place: tuple[Chunk, int, slice], scratch: Scratch) -> None:
            chunk, b, few = place
            past = slice(max(chunk.in_row(few).stop, self.indexer.topk + 1))
            keys = row_BTd[b, past] if chunk.packed_BtS is None else row_BTd[b, chunk.keys]
            scores = self.indexer.tiled_scores(self.queries[b, few], keys, self.weights[b, few], scratch)
            taken = choose(chunk.hide(scores, b, few), self.indexer.topk, scratch)
            mine = torch.where(taken < 0, -1, chunk.keys[taken.clamp_min(0)])
            positions[b, few.start - start : few.stop - start] = mine

        parts = ((chunk, spans(chunk.part.start, chunk.part.stop, FEW)) for chunk in run)
        each(take, [(chunk, b, few) for chunk, fews in parts for b in range(rows) for few in fews])
        if self.lends:
            self.positions[start] = positions
        return positions


class _ScoresAt(torch.autograd.Function):
    """Scores [B, t, k] of scaled queries over their own keys; the backward pass computes them again."""

    @staticmethod
    def forward(ctx: Any, q_BtJd: Tensor, k_BSd: Tensor, w_BtJ: Tensor, positions: Tensor) -> Tensor:
        out = w_BtJ.new_empty(positions.shape)

        def score(place: tuple[int, slice], scratch: Scratch) -> None:
            b, part = place
            chosen_tkd, _ = gather(k_BSd[b], positions[b, part], scratch)
            dots_tkJ = F.relu(chosen_tkd @ q_BtJd[b, part].mT, inplace=True)
            out[b, part] = (dots_tkJ @ w_BtJ[b, part, :, None]).squeeze(-1)

        each(score, [(b, part) for b in range(len(out)) for part in spans(0, out.shape[1], FEW)])
        ctx.save_for_backward(q_BtJd, k_BSd, w_BtJ, positions)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q_BtJd, k_BSd, w_BtJ, positions), grad_out = ctx.saved_tensors, grads[0]
        grad_q, grad_w, grad_k = torch.empty_like(q_BtJd), torch.empty_like(w_BtJ), torch.zeros_like(k_BSd)

        def lane(place: tuple[int, slice], scratch: Scratch) -> Tensor:
            b, run = place
            grad_Sd = torch.zeros_like(k_BSd[b])
            for part in spans(run.start, run.stop, FEW):
                chosen_tkd, where = gather(k_BSd[b], positions[b, part], scratch)
                dots_tkJ = F.relu(chosen_tkd @ q_BtJd[b, part].mT, inplace=True)
                g_tk1 = grad_out[b, part, :, None]
                grad_w[b, part] = (dots_tkJ.mT @ g_tk1).squeeze(-1)
                grad_dots = (g_tk1 * w_BtJ[b, part, None]).masked_fill_(dots_tkJ == 0, 0.0)
                grad_q[b, part] = grad_dots.mT @ chosen_tkd
                grad_Sd.index_add_(
                    0, where, torch.bmm(grad_dots, q_BtJd[b, part], out=chosen_tkd).flatten(0, 1)
                )
            return grad_Sd

        places = [(b, run) for b in range(len(k_BSd)) for run in lanes(positions.shape[1])]
        for (b, _), grad_Sd in zip(places, each(lane, places), strict=True):
            grad_k[b] += grad_Sd
        return grad_q, grad_k, grad_w, None


def choose(scores_tS: Tensor, k: int, scratch: Scratch) -> Tensor:
    """The keys that `select` takes, as positions [t, k], int32 and ascending; -1 after a row's last.

    `scores_tS` are fp32 and -inf where a key is not allowed; there must be more than k keys.
    """
    kth_t1 = _kth(scores_tS, k, scratch)
    taken_tS = torch.ge(
        scores_tS, kth_t1, out=scratch("taken", scores_tS, *scores_tS.shape, dtype=torch.bool)
    )
    flat = _true(taken_tS)
    if len(flat) == len(scores_tS) * k and kth_t1.amin() > -torch.inf:  # k in every row
        rows_t1 = torch.arange(len(scores_tS), device=flat.device)[:, None]
        return (flat.view(-1, k) - rows_t1 * scores_tS.shape[-1]).int()
    taken_tS &= scores_tS > -torch.inf
    tied = taken_tS.sum(-1) > k
    taken_tS[tied] = topk_mask(scores_tS[tied], k)
    positions = torch.full((len(scores_tS), k), -1, dtype=torch.int32, device=scores_tS.device)
    filled = torch.arange(k, device=scores_tS.device) < taken_tS.sum(-1, keepdim=True)
    positions[filled] = (_true(taken_tS) % scores_tS.shape[-1]).int()
    return positions


def _kth(scores_tS: Tensor, k: int, scratch: Scratch) -> Tensor:
    """The k-th best score of each row [t, 1]; on a CPU by numpy, whose partition uses the vector unit."""
    if scores_tS.device.type != "cpu":
        return scores_tS.topk(k, sorted=False).values.amin(-1, keepdim=True)
    parted_tS, cut = scratch("parted", scores_tS, *scores_tS.shape).copy_(scores_tS), scores_tS.shape[-1] - k
    parted_tS.numpy().partition(cut, axis=-1)
    return parted_tS[:, cut, None]


def _true(mask: Tensor) -> Tensor:
    """Where a mask is true, as positions in its flat form; numpy's search skips what is false faster than torch's."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def select(scores: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Boolean [..., S]: the allowed keys among the k best-scored allowed ones; ties go to the lower position.

    Equal to `topk_mask` of the masked scores; its sort keys are built only for rows where scores tie with the k-th.
    """
    if k >= scores.shape[-1]:
        return allowed
    masked = scores.masked_fill(~allowed, -torch.inf)
    kth = masked.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    chosen = (masked >= kth) & allowed
    tied = chosen.sum(-1) > k
    if tied.any():
        chosen[tied] = topk_mask(masked[tied], k) & allowed[tied]
    return chosen


class _KlSum(torch.autograd.Function):
    """`indexer_kl`'s sum; its gradient is made in the forward pass, and both for some queries at a time."""

    @staticmethod
    def forward(ctx: Any, scores_BTS: Tensor, mass_BTS: Tensor, support_BTS: Tensor) -> Tensor:
        grad_BTS = torch.empty_like(scores_BTS) if ctx.needs_input_grad[0] else None
        total = scores_BTS.new_zeros(())
        for few in spans(0, scores_BTS.shape[1], FEW):
            none_BtS = ~support_BTS[:, few]
            p_BtS = mass_BTS[:, few].masked_fill(none_BtS, 0.0)
            p_BtS /= p_BtS.sum(-1, keepdim=True).clamp_min_(TARGET_FLOOR)
            log_q_BtS = scores_BTS[:, few].masked_fill(none_BtS, -torch.inf).log_softmax(-1)
            log_q_BtS.masked_fill_(none_BtS, 0.0)
            total += (p_BtS.clamp_min(TARGET_FLOOR).log_().sub_(log_q_BtS).mul_(p_BtS)).sum()
            if grad_BTS is not None:
                q_BtS = log_q_BtS.exp_().mul_(p_BtS.sum(-1, keepdim=True))
                grad_BTS[:, few] = q_BtS.sub_(p_BtS).masked_fill_(none_BtS, 0.0)
        ctx.save_for_backward(grad_BTS)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTS,) = ctx.saved_tensors
        return grad_BTS * grads[0], None, None


def indexer_kl(scores_BTS: Tensor, mass_BTS: Tensor, support_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over query rows of KL(p || softmax(I)) on `support`, and the number of rows.

    p is `mass`, the main attention summed over heads, normalised on the support and detached (DeepSeek-V3.2, Eqs 3-4):
    the support is all causal keys during warm-up and the selected set afterwards. Rows without support count 0.
    """
    total: Tensor = _KlSum.apply(scores_BTS, mass_BTS.detach(), support_BTS)
    return total, support_BTS.any(-1).sum()
