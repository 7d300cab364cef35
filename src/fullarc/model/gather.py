"""Sparse attention that touches chosen keys only (GLM-5 section 2.1.1; DeepSeek-V3.2, "MQA mode").

Every query has its own k keys. They are gathered as the cache stores them, one latent and one rotated part for all
heads, and attention runs in the absorbed form on these:

    p[h] = softmax(scale * q[h] . key)      out[h] = sum p[h] latent

so a query costs k keys, whatever its position. The backward pass gathers again instead of keeping what was gathered:
memory is O(T k) numbers for the indices, and O(QUERIES k W) for one piece of the work.

Shapes: B rows, t queries, H heads, S keys, k chosen, C latent, W = C + R (latent and rotated part).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fullarc.model.indexer import select

QUERIES = (
    64  # gathered at once: a few megabytes, so that they are still in the cache when they are multiplied
)


def choose(scores: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The keys that `indexer.select` takes, as positions: [..., k] ascending, and which of them count [..., k].

    There must be more than k keys. Rows with fewer than k allowed ones are filled up with positions that do not count.
    """
    masked = scores.masked_fill(~allowed, -torch.inf)
    best, last, following = _partition(masked, k)
    tied = (last == following) & (last > -torch.inf)
    if tied.any():
        best[tied] = select(scores[tied], allowed[tied], k).nonzero()[:, 1].view(-1, k)
    best = best.sort(-1).values
    return best, allowed.gather(-1, best)


def _partition(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of k best scores [..., k] in any order, the k-th best score and the one after it [...].

    On a CPU by numpy, whose partition uses the vector unit: half the time of torch's.
    """
    if scores.device.type == "cpu":
        cut = scores.shape[-1] - k
        order = torch.from_numpy(np.argpartition(scores.numpy(), [cut - 1, cut], axis=-1))
        border = scores.gather(-1, order[..., cut - 1 : cut + 1])
        return order[..., cut:], border[..., 1], border[..., 0]
    values, positions = scores.topk(k + 1, dim=-1)
    return positions[..., :k], values[..., k - 1], values[..., k]


class _Gathered(torch.autograd.Function):
    """Outputs [B, t, H, C] and probabilities [B, t, H, k] (a constant) of queries [B, t, H, W] over their own keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys_BSW: Tensor, positions: Tensor, counts: Tensor, latent: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, p = q.new_empty(*q.shape[:3], latent), q.new_empty(*q.shape[:3], positions.shape[-1])
        for b, part in _pieces(q):
            chosen = (
                keys_BSW[b].index_select(0, positions[b, part].flatten()).view(*positions[b, part].shape, -1)
            )
            p[b, part] = _probabilities(q[b, part], chosen, counts[b, part], scale)
            torch.bmm(p[b, part], chosen[..., :latent], out=out[b, part])
        ctx.save_for_backward(q, keys_BSW, positions, counts)
        ctx.latent, ctx.scale = latent, scale
        ctx.mark_non_differentiable(p)
        return out, p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, keys_BSW, positions, counts), grad_out = ctx.saved_tensors, grads[0]
        grad_q, grad_keys = torch.empty_like(q), torch.zeros_like(keys_BSW)
        for b, part in _pieces(q):
            where = positions[b, part]
            chosen = keys_BSW[b].index_select(0, where.flatten()).view(*where.shape, -1)
            p, g = _probabilities(q[b, part], chosen, counts[b, part], ctx.scale), grad_out[b, part]
            grad_p = torch.bmm(g, chosen[..., : ctx.latent].mT)
            grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * ctx.scale
            torch.bmm(grad_s, chosen, out=grad_q[b, part])
            grad_chosen = torch.bmm(grad_s.mT, q[b, part])
            grad_chosen[..., : ctx.latent] += torch.bmm(p.mT, g)
            grad_keys[b].index_add_(0, where.flatten(), grad_chosen.flatten(0, 1))
        return grad_q, grad_keys, None, None, None, None


def _pieces(q: Tensor) -> list[tuple[int, slice]]:
    """Rows and runs of queries that are worked on at once."""
    rows, length = q.shape[:2]
    return [(b, slice(i, min(i + QUERIES, length))) for b in range(rows) for i in range(0, length, QUERIES)]


def _probabilities(q_tHW: Tensor, chosen_tkW: Tensor, counts_tk: Tensor, scale: float) -> Tensor:
    scores_tHk = torch.bmm(q_tHW, chosen_tkW.mT).mul_(scale)
    return scores_tHk.masked_fill_(~counts_tk[:, None], -torch.inf).softmax(-1)


def gathered_attention(
    q: Tensor, keys_BSW: Tensor, positions: Tensor, counts: Tensor, latent: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of absorbed queries over their own keys.

    Args:
        q: [B, t, H, W].
        keys_BSW: latents and rotated parts of all keys.
        positions, counts: chosen keys [B, t, k] and which of them count, at least one a query.
        latent: C, the part of a key that is also its value.

    Returns:
        [B, t, H, C], to be multiplied by the value up-projection, and the probabilities [B, t, H, k], detached.
    """
    out, p = _Gathered.apply(q.contiguous(), keys_BSW.contiguous(), positions, counts, latent, scale)
    return out, p
