"""Sparse attention that touches chosen keys only (GLM-5 section 2.1.1; DeepSeek-V3.2, "MQA mode").

Every query has its own k keys. They are gathered as the cache stores them, one latent and one rotated part for all
heads, and attention runs in the absorbed form on these:

    q'[h] = scale * (U_k[h]^T q_nope[h], q_rope[h])     p[h] = softmax(q'[h] . key)     out[h] = U_v[h] sum p[h] latent

so a query costs k keys, whatever its position. The backward pass gathers and multiplies again instead of keeping
anything but its inputs: memory is O(T k) for the positions.

With g[h] = U_v[h]^T dout[h] and rows [q' g] and [ds p] of all heads side by side, backward is three products a query:

    (s, dp) = [q' g] key^T      (dq', sum p latent) = [ds p] key      dkey = [ds p]^T [q' g]      ds = p (dp - sum p dp)

Heads come before keys in all of them: a softmax then runs along memory, and the short side of a product is its rows.

Shapes: B rows, t queries, H heads, S keys, k chosen, N|R query, C latent, V value, W = C + R what a key stores.
"""

from typing import Any

import torch
from torch import Tensor

from fullarc.model.pieces import QUERIES, Scratch, each, gather, lanes, spans

ROOM = 2**22  # bytes of keys that are gathered at once: what is computed from them stays in the cache


class _Gathered(torch.autograd.Function):
    """`gathered_attention`; the second output is a constant."""

    @staticmethod
    def forward(
        ctx: Any, q_nope: Tensor, q_rope: Tensor, keys_BSW: Tensor, up_k: Tensor, up_v: Tensor, positions: Tensor,
        scale: float, weigh: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (rows, length, heads), latent = q_nope.shape[:3], up_k.shape[-1]
        out = q_nope.new_empty(rows, length, heads, up_v.shape[1])
        mass = keys_BSW.new_empty(positions.shape if weigh else (rows, length, 0))

        def attend(place: tuple[int, slice], scratch: Scratch) -> None:
            b, part = place
            q_tHW = _absorb(q_nope[b, part], q_rope[b, part], up_k, scale)
            sums_tHC = q_tHW.new_empty(*q_tHW.shape[:2], latent)
            for few in _few(q_tHW, positions):
                mine = positions[b, part][few]
                chosen, _ = gather(keys_BSW[b], mine, scratch)
                p = scratch("p", q_tHW, len(mine), heads, mine.shape[-1])
                _softmax_(torch.bmm(q_tHW[few], chosen.mT, out=p), mine)
                torch.bmm(p, chosen[..., :latent], out=sums_tHC[few])
                if weigh:
                    mass[b, part][few] = p.sum(1)
            out[b, part] = torch.einsum("thc,hvc->thv", sums_tHC, up_v)

        each(attend, [(b, part) for b in range(rows) for part in spans(0, length, QUERIES)])
        ctx.save_for_backward(q_nope, q_rope, keys_BSW, up_k, up_v, positions)
        ctx.scale = scale
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q_nope, q_rope, keys_BSW, up_k, up_v, positions), grad_out = ctx.saved_tensors, grads[0]
        (rows, length, heads), latent = q_nope.shape[:3], up_k.shape[-1]
        grad_nope, grad_rope = torch.empty_like(q_nope), torch.empty_like(q_rope)

        def lane(place: tuple[int, slice], scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
            b, run = place
            grad_keys, grad_k, grad_v = (torch.zeros_like(x) for x in (keys_BSW[b], up_k, up_v))
            for part in spans(run.start, run.stop, QUERIES):
                size = part.stop - part.start
                both = scratch("both", q_nope, size, 2 * heads, keys_BSW.shape[-1]).zero_()  # [q' g]
                both[:, :heads] = _absorb(q_nope[b, part], q_rope[b, part], up_k, ctx.scale)
                both[:, heads:, :latent] = torch.einsum("thv,hvc->thc", grad_out[b, part], up_v)
                back = scratch("back", both, *both.shape)
                for few in _few(both, positions):
                    mine = positions[b, part][few]
                    chosen, where = gather(keys_BSW[b], mine, scratch)
                    s = scratch("s", both, len(mine), 2 * heads, mine.shape[-1])
                    torch.bmm(both[few], chosen.mT, out=s)
                    p, grad_p = _softmax_(s[:, :heads], mine), s[:, heads:]
                    ds = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
                    grad_p.copy_(p)
                    p.copy_(ds)
                    torch.bmm(s, chosen, out=back[few])
                    grad_keys.index_add_(0, where, torch.bmm(s.mT, both[few], out=chosen).flatten(0, 1))
                grad_q, sums = back[:, :heads].mul_(ctx.scale), back[:, heads:, :latent]
                grad_nope[b, part] = torch.einsum("thc,hnc->thn", grad_q[..., :latent], up_k)
                grad_rope[b, part] = grad_q[..., latent:]
                grad_k += torch.einsum("thn,thc->hnc", q_nope[b, part], grad_q[..., :latent])
                grad_v += torch.einsum("thv,thc->hvc", grad_out[b, part], sums)
            return grad_keys, grad_k, grad_v

        places = [(b, run) for b in range(rows) for run in lanes(length)]
        grad_keys, grad_k, grad_v = torch.zeros_like(keys_BSW), torch.zeros_like(up_k), torch.zeros_like(up_v)
        for (b, _), (of_keys, of_k, of_v) in zip(places, each(lane, places), strict=True):
            grad_keys[b] += of_keys
            grad_k += of_k
            grad_v += of_v
        return grad_nope, grad_rope, grad_keys, grad_k, grad_v, None, None, None


def _absorb(q_nope_tHN: Tensor, q_rope_tHR: Tensor, up_k: Tensor, scale: float) -> Tensor:
    return torch.cat((torch.einsum("thn,hnc->thc", q_nope_tHN, up_k), q_rope_tHR), -1).mul_(scale)


def _few(q_tHW: Tensor, positions: Tensor) -> list[slice]:
    """The queries of a piece, as many at a time as their keys fit into ROOM."""
    size = positions.shape[-1] * q_tHW.shape[-1] * q_tHW.element_size()
    return spans(0, len(q_tHW), max(1, ROOM // size))


def _softmax_(scores_tHk: Tensor, positions_tk: Tensor) -> Tensor:
    if positions_tk[:, -1].amin() < 0:
        scores_tHk.masked_fill_((positions_tk < 0)[:, None], -torch.inf)
    return torch.softmax(scores_tHk, -1, out=scores_tHk)


def gathered_attention(
    q_nope: Tensor, q_rope: Tensor, keys_BSW: Tensor, up_k: Tensor, up_v: Tensor, positions: Tensor, scale: float,
    weigh: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries over their own keys.

    Args:
        q_nope, q_rope: the two parts of the queries [B, t, H, N] and [B, t, H, R].
        keys_BSW: latents and rotated parts of all keys.
        up_k, up_v: the up-projections [H, N, C] and [H, V, C].
        positions: the chosen keys [B, t, k], int32; a query has one at least, and -1 after its last.
        weigh: whether anybody asks how much weight each key got.

    Returns:
        [B, t, H, V], and the probabilities summed over heads, detached: [B, t, k], or [B, t, 0] if nobody asks.
    """
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    parts = (x.to(wide) for x in (q_nope, q_rope, keys_BSW.contiguous(), up_k, up_v))
    out, mass = _Gathered.apply(*parts, positions, scale, weigh)
    return out.to(q_nope.dtype), mass
