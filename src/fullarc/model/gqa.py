"""Grouped-query attention: the baseline that MLA is held against (GLM-5 section 2.1, Table 1; arXiv 2305.13245).

Query heads share key and value heads in groups: query head h reads key and value head h // (H / G). Heads have the
widths of MLA's: N dimensions without position, R rotated ones, V of values. There is no latent, so no indexer either.

Invariant: a query attends to earlier-or-equal positions of its own document, within the layer's window if it has one.
Shape suffixes: see ops.py; G key and value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullarc.config.model import ModelConfig
from fullarc.model.indexer import Index
from fullarc.model.ops import apply_rope, causal_attention
from fullarc.model.quant import Linear
from fullarc.model.visibility import Visibility


class GQA(nn.Module):
    """Attention with `gqa_kv_heads` key and value heads; called as `MLA` is, but it never chooses keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = config.hidden_size, config.num_attention_heads, config.gqa_kv_heads
        self.nope, self.scale = config.qk_nope_head_dim, config.qk_head_dim**-0.5
        self.q_proj = Linear(d, self.heads * config.qk_head_dim)
        self.k_proj = Linear(d, self.kv_heads * config.qk_head_dim)
        self.v_proj = Linear(d, self.kv_heads * config.v_head_dim)
        self.o_proj = Linear(self.heads * config.v_head_dim, d)

    def queries_and_keys(self, h_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys [B, H, T, N + R] of hidden states; a key head is repeated for all of its group."""
        q = self._rotate_last(self.q_proj(h_BTD).unflatten(-1, (self.heads, -1)), cos, sin)
        k = self._rotate_last(self.k_proj(h_BTD).unflatten(-1, (self.kv_heads, -1)), cos, sin)
        return q.transpose(1, 2), self._per_head(k)

    def forward(
        self, h_BTD: Tensor, seen: Visibility, index: Index | None = None
    ) -> tuple[Tensor, None, Index | None]:
        """Attention output [B, T, D]; no indexer's loss."""
        q_BHTd, k_BHTd = self.queries_and_keys(h_BTD, seen.cos, seen.sin)
        v_BHTV = self._per_head(self.v_proj(h_BTD).unflatten(-1, (self.kv_heads, -1)))
        if seen.chunks is None:
            out_BHTV = causal_attention(q_BHTd, k_BHTd, v_BHTV, self.scale)
            return self.o_proj(out_BHTV.transpose(1, 2).flatten(2)), None, index
        outs = []
        for chunk in seen.chunks:
            mask_B1tS = chunk.allowed_BtS.unsqueeze(1)
            k_BHSd, v_BHSV = k_BHTd[:, :, chunk.keys], v_BHTV[:, :, chunk.keys]
            q_BHtd = q_BHTd[:, :, chunk.part]
            outs.append(F.scaled_dot_product_attention(q_BHtd, k_BHSd, v_BHSV, mask_B1tS, scale=self.scale))
        return self.o_proj(torch.cat(outs, 2).transpose(1, 2).flatten(2)), None, index

    def _rotate_last(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = apply_rope(x[..., self.nope :], cos.unsqueeze(-2), sin.unsqueeze(-2))
        return torch.cat((x[..., : self.nope], rotated), -1)

    def _per_head(self, x_BTGd: Tensor) -> Tensor:
        return x_BTGd.transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, 1)
