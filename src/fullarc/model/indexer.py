"""The lightning indexer of DeepSeek Sparse Attention: which keys may a query look at?

    I[t, s] = sum_j w[t, j] * ReLU(q[t, j] . k[s] * dim^-1/2)          (GLM-5 section 2.1.1; DeepSeek-V3.2, Eq. 1)

Invariants: scores are fp32; the choice is `stable_topk` over allowed keys; the indexer reads detached inputs, so
the language-model loss never reaches it and its own loss never reaches anything else.
Shape suffixes: see ops.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullarc.config.model import ModelConfig
from fullarc.model.ops import apply_rope, topk_mask

TARGET_FLOOR = 1e-10
TILE = 64, 1024  # queries and keys whose dot products, of all heads, stay in the cache until they are summed


class Indexer(nn.Module):
    """Scores every key for every query with a few cheap heads that share one key per token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.rope_dim, self.topk = config.qk_rope_head_dim, config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def queries(self, q_latent: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index queries [..., J, dim] from q-latents [..., Q]; RoPE on the first `rope_dim` dimensions."""
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        return self._rotate_first(q, cos.unsqueeze(-2), sin.unsqueeze(-2))

    def keys(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index keys [..., dim] from hidden states [..., D]."""
        return self._rotate_first(self.k_norm(self.wk(h)), cos, sin)

    def head_weights(self, h: Tensor) -> Tensor:
        """Head weights [..., J] in fp32."""
        return F.linear(h.float(), self.weights_proj.weight.float()) * self.heads**-0.5

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
    def tiled_scores(self, q_BTJd: Tensor, k_BSd: Tensor, w_BTJ: Tensor) -> Tensor:
        """`scores` in a fifth of the time, without a gradient; equal up to rounding.

        All heads at once, in tiles whose dot products stay in the cache until they are summed.
        """
        queries, keys_BdS = q_BTJd.float() * self.dim**-0.5, k_BSd.float().mT
        out_BTS = queries.new_empty(*w_BTJ.shape[:2], keys_BdS.shape[-1])
        for tile_BtS, q_BtJd, w_BtJ in zip(
            *(x.split(TILE[0], 1) for x in (out_BTS, queries, w_BTJ)), strict=True
        ):
            for tile_Bts, k_Bds in zip(tile_BtS.split(TILE[1], -1), keys_BdS.split(TILE[1], -1), strict=True):
                dots_BMs = F.relu(q_BtJd.flatten(1, 2) @ k_Bds, inplace=True)
                tile_Bts.copy_((w_BtJ[:, :, None] @ dots_BMs.unflatten(1, (-1, self.heads))).squeeze(2))
        return out_BTS

    def scores_at(self, q_BtJd: Tensor, k_BSd: Tensor, w_BtJ: Tensor, positions: Tensor) -> Tensor:
        """I [B, t, k] in fp32 of each query's own keys, at `positions` [B, t, k]."""
        chosen = torch.stack([k[p] for k, p in zip(k_BSd.float(), positions, strict=True)])
        dots_BtJk = q_BtJd.float() @ chosen.mT * self.dim**-0.5
        return (w_BtJ[:, :, None] @ F.relu(dots_BtJk)).squeeze(2)


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


def indexer_kl(scores_BTS: Tensor, attention_BHTS: Tensor, support_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over query rows of KL(p || softmax(I)) on `support`, and the number of rows.

    p is the main attention summed over heads and normalised on the support, detached (DeepSeek-V3.2, Eqs 3-4):
    the support is all causal keys during warm-up and the selected set afterwards. Rows without support count 0.
    """
    target_BTS = attention_BHTS.detach().sum(1).masked_fill(~support_BTS, 0.0)
    target_BTS = target_BTS / target_BTS.sum(-1, keepdim=True).clamp_min(TARGET_FLOOR)
    rows_BT = support_BTS.any(-1)
    masked_BTS = scores_BTS.masked_fill(~support_BTS, -torch.inf)
    masked_BTS = torch.where(rows_BT[..., None], masked_BTS, torch.zeros_like(masked_BTS))
    log_q_BTS = masked_BTS.log_softmax(-1).masked_fill(~support_BTS, 0.0)
    kl_BT = (target_BTS * (target_BTS.clamp_min(TARGET_FLOOR).log() - log_q_BTS)).sum(-1)
    return (kl_BT * rows_BT).sum(), rows_BT.sum()
