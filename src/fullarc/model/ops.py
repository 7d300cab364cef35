"""The small exact operations that the trainer and the engine share.

Shape suffixes, here and in the other files of this room:
    B batch, T queries, S keys, D hidden, H attention heads, J index heads, K chosen items,
    Q q-latent, C kv-latent, N nope, R rope, V value head, E experts, F expert FFN, P pairs (R / 2)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_BLOCK = 128
SHORT_ROW = 512


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x) over the last dimension; the backward pass in the fewest passes over memory.

    With u = x / rms(x), g = dL/dy and the mean over the last dimension: dL/dx = (w g - u mean(w g u)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (x, weight_D, inverse) = grad_outputs, ctx.saved_tensors
        unit = x * inverse
        product = grad * unit
        share = torch.mv(product.flatten(0, -2), weight_D).div_(-len(weight_D)).view_as(inverse)
        grad_x = (grad * weight_D).addcmul_(unit, share).mul_(inverse)
        return grad_x, product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned scale, computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return (F.rms_norm(x.float(), (x.shape[-1],), None, self.eps) * self.weight).to(x.dtype)


def rope_tables(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., dim / 2] in fp32 for integer `positions` [...]."""
    frequency_P = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angles = positions[..., None].float() * frequency_P
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (0,1), (2,3), … of the last dimension of `x`.

    `cos` and `sin` end in [dim / 2] and broadcast against x's leading dimensions. The result holds all first
    members, then all second ones: queries and keys are permuted alike, so their products are unchanged. Computed in
    fp32, returned in the dtype of `x`.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


def causal_attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTV: Tensor, scale: float) -> Tensor:
    """Attention [B, H, T, V] of rows that are one document each, dense.

    On a CPU short rows go a block of queries at a time, each with its past only: the backward pass of torch's kernel
    computes the whole square of a short causal row, and takes a third longer.
    """
    length = q_BHTd.shape[2]
    if q_BHTd.device.type != "cpu" or not CAUSAL_BLOCK < length <= SHORT_ROW:
        return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTV, is_causal=True, scale=scale)
    past_TT = torch.ones(length, length, dtype=torch.bool).tril()
    outs: list[Tensor] = []
    for q_BHtd, mask_tT in zip(q_BHTd.split(CAUSAL_BLOCK, 2), past_TT.split(CAUSAL_BLOCK), strict=True):
        past = slice((len(outs) + 1) * CAUSAL_BLOCK)
        mask_11tS = mask_tT[None, None, :, past]
        outs.append(
            F.scaled_dot_product_attention(
                q_BHtd, k_BHTd[:, :, past], v_BHTV[:, :, past], mask_11tS, scale=scale
            )
        )
    return torch.cat(outs, 2)


def sort_keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys [..., S] ordered by fp32 score, then by lower position.

    The fp32 bit pattern is mapped to an integer of the same order (-0.0 counts as +0.0) and the position fills
    the low half, so no two keys of a row are equal and the order depends on nothing but score and position.
    """
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    size = scores.shape[-1]
    low = torch.arange(size - 1, -1, -1, device=scores.device)
    return (monotone << 32) | low


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Positions [..., min(k, S)], ascending, of the k best scores; ties go to the lower position.

    The same rule serves the router, the indexer, prefill and decoding. `torch.topk` breaks ties in an order that
    depends on the row's length, which makes training and rollout disagree wherever ReLU leaves exact zeros.
    """
    k = min(k, scores.shape[-1])
    return sort_keys(scores).topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Boolean [..., S]: True for the positions that `stable_topk` would return."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    keys = sort_keys(scores)
    return keys >= keys.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
