"""Multi-head latent attention, dense or sparse (GLM-5 section 2.1; DeepSeek-V2 section 2.1).

A token leaves behind one latent [C] and one rotated key part [R], shared by all heads. Two forms give the same
result: *expanded* rebuilds keys and values per head (training), *absorbed* folds the up-projections into queries
and outputs so that attention runs on the latents themselves (decoding).

Invariant: a query attends to earlier-or-equal positions of its own document, and with DSA only to the indexer's
choice among them. Shape suffixes: see ops.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fullarc.config.model import ModelConfig
from fullarc.model.gather import gathered_attention
from fullarc.model.indexer import Index, Indexer, indexer_kl, select
from fullarc.model.ops import RMSNorm, apply_rope, causal_attention
from fullarc.model.quant import Linear
from fullarc.model.visibility import Chunk, Visibility

GATHER_FROM = 3  # times the top-k that must be visible


class MLA(nn.Module):
    """Latent attention with its indexer, or, where `indexer` is None, with the choice of an earlier layer's.

    Args:
        layer: number of the decoder layer; None for the MTP layer, which always has its own.
    """

    def __init__(self, config: ModelConfig, layer: int | None = None) -> None:
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = config.qk_head_dim**-0.5
        self.q_a_proj = Linear(d, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(d, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, config.latent_norm_eps)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, d)
        self.indexer = Indexer(config) if layer is None or config.has_indexer(layer) else None
        following = config.num_hidden_layers if layer is None else layer + 1
        self.lends = following < config.num_hidden_layers and not config.has_indexer(following)
        self.topk = config.index_topk

    # --- projections shared by both forms --------------------

    def queries(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q-latent [..., Q], nope part [..., H, N] and rotated part [..., H, R] of hidden states [..., D]."""
        q_latent = self.q_a_layernorm(self.q_a_proj(h))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        return q_latent, q_nope, apply_rope(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2))

    def latents(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What a token leaves in the cache: latent [..., C] (normalised) and rotated key part [..., R]."""
        latent, k_rope = self.kv_a_proj_with_mqa(h).split((self.latent, self.rope), -1)
        return self.kv_a_layernorm(latent), apply_rope(k_rope, cos, sin)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """The per-head key and value up-projections [H, N, C] and [H, V, C] inside kv_b_proj."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, self.nope + self.value))
        return weight[:, : self.nope], weight[:, self.nope :]

    # --- expanded form --------------------

    def forward(
        self, h_BTD: Tensor, seen: Visibility, index: Index | None = None
    ) -> tuple[Tensor, Tensor | None, Index | None]:
        """Attention output [B, T, D], the indexer's loss (mean KL over rows; None when it is off), and the indexer.

        A layer without an indexer uses `index`, an earlier layer's. Its loss is then about this layer's attention,
        and the mean over layers has the gradient of the KL from their mean attention (IndexShare).
        """
        q_latent, q_nope, q_rope = self.queries(h_BTD, seen.cos, seen.sin)
        stored = seen.context.gather(*self.latents(h_BTD, seen.cos, seen.sin))
        if seen.chunks is None:
            index = None
        elif self.indexer is not None:
            index = self._index(self.indexer, h_BTD, q_latent, seen)
        out_BTHV, kl, rows = seen.context.attend(self._attend, q_nope, q_rope, *stored, index, seen)
        out_BTD = self.o_proj(out_BTHV.flatten(2))
        return out_BTD, None if rows is None else kl / seen.context.total(rows).clamp_min(1), index

    def _attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent_BSC: Tensor,
        k_rope_BSR: Tensor,
        index: Index | None,
        seen: Visibility,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output [B, T, H, V] of these queries, the indexer's KL summed over rows, and how many (None: it is off).

        The keys are the whole row's, of which the expanded form takes what the queries that do not gather may see.
        """
        runs = self._runs(index, seen)
        expanded = [run[0] for run in runs if not self._gathers(index, seen, run[0])]
        near = slice(max((chunk.part.stop for chunk in expanded), default=0) if runs else None)
        ends = ((chunk.blocks[-1] + 1) * seen.block for chunk in expanded)
        reach = slice(max(ends, default=0) if runs else None)
        up = self.kv_b_proj(latent_BSC[:, reach]).unflatten(-1, (self.heads, self.nope + self.value))
        k_rope = k_rope_BSR[:, reach].unsqueeze(2).expand(-1, -1, self.heads, -1)
        q_BHTd = torch.cat((q_nope[:, near], q_rope[:, near]), -1).transpose(1, 2)
        k_nope, v_BSHV = up.split((self.nope, self.value), -1)
        k_BHSd = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        v_BHSV = v_BSHV.transpose(1, 2)

        if seen.chunks is None:
            return causal_attention(q_BHTd, k_BHSd, v_BHSV, self.scale).transpose(1, 2), None, None
        keys, values = k_BHSd.split(seen.block, 2), v_BHSV.split(seen.block, 2)
        stored_BSW = torch.cat((latent_BSC, k_rope_BSR), -1)
        outs, kl, rows = [], q_nope.new_zeros((), dtype=torch.float32), q_nope.new_zeros((), dtype=torch.long)
        for chunk, *others in runs:
            if index is not None and self._gathers(index, seen, chunk):
                run = [chunk, *others]
                out, chunk_kl, chunk_rows = self._gathered(q_nope, q_rope, stored_BSW, index, run, seen)
                outs.append(out)
                kl, rows = kl + chunk_kl, rows + chunk_rows
                continue
            q_BHtd, mine_BHSd = q_BHTd[:, :, chunk.part], chunk.of(keys, 2)
            scores_BtS, mask_BtS = self._choose(index, chunk)
            if index is not None and index.learns:
                if scores_BtS is None:
                    chunk_kl, chunk_rows = checkpoint(
                        self._dense_kl, q_BHTd, keys, index, chunk, seen, use_reentrant=False, preserve_rng_state=False
                    )  # fmt: skip
                else:
                    chunk_kl, chunk_rows = self._kl(q_BHtd, mine_BHSd, scores_BtS, mask_BtS, chunk, seen)
                kl, rows = kl + chunk_kl, rows + chunk_rows
            outs.append(
                F.scaled_dot_product_attention(
                    q_BHtd, mine_BHSd, chunk.of(values, 2), mask_BtS.unsqueeze(1), scale=self.scale
                ).transpose(1, 2)
            )
        out_BTHV = torch.cat(outs, 1)
        return (out_BTHV, None, None) if seen.indexer_loss == "off" else (out_BTHV, kl, rows)

    def _index(self, indexer: Indexer, h_BTD: Tensor, q_latent: Tensor, seen: Visibility) -> Index | None:
        """What the indexer says of each token; None where nobody asks. Its inputs are detached."""
        if seen.indexer_loss == "off" and not seen.sparse:
            return None
        with torch.set_grad_enabled(seen.indexer_loss != "off" and torch.is_grad_enabled()):
            h, latent = h_BTD.detach(), q_latent.detach()
            return Index(
                indexer,
                indexer.queries(latent, seen.cos, seen.sin),
                seen.context.gather(indexer.keys(h, seen.cos, seen.sin))[0].split(seen.block, 1),
                indexer.head_weights(h),
                seen.indexer_loss != "off",
                self.lends,
            )

    def _choose(self, index: Index | None, chunk: Chunk) -> tuple[Tensor | None, Tensor]:
        """Index scores [B, t, S] over the chunk's keys, if it is sparse, and which of the allowed keys are taken."""
        if index is None or not chunk.sparse:
            return None, chunk.allowed_BtS
        known = index.masks.get(chunk.part.start)
        scores = index.scores(chunk) if known is None or index.learns else None
        if known is None:
            assert scores is not None
            known = select(scores.detach(), chunk.allowed_BtS.expand_as(scores), self.topk)
            if index.lends:
                index.masks[chunk.part.start] = known
        return scores, known

    def _dense_kl(
        self, q_BHTd: Tensor, keys: Sequence[Tensor], index: Index, chunk: Chunk, seen: Visibility
    ) -> tuple[Tensor, Tensor]:
        """`_kl` of a chunk of the queries on all that they may see.

        It is computed again in the backward pass: all chunks together would keep a number for every pair and head.
        """
        q_BHtd, mine_BHSd = q_BHTd[:, :, chunk.part], chunk.of(keys, 2)
        return self._kl(q_BHtd, mine_BHSd, index.scores(chunk), chunk.allowed_BtS, chunk, seen)

    def _kl(
        self, q_BHtd: Tensor, k_BHSd: Tensor, scores_BtS: Tensor, support: Tensor, chunk: Chunk, seen: Visibility
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The indexer's KL on `support` [B or 1, t, S], summed over a chunk's queries, and how many these are."""
        if seen.valid_BT is not None:
            support = support & seen.valid_BT[:, chunk.part, None]
        support = support.expand_as(scores_BtS)
        return indexer_kl(scores_BtS, self._mass(q_BHtd, k_BHSd, support), support)

    # --- gathered form --------------------

    def _gathers(self, index: Index | None, seen: Visibility, chunk: Chunk) -> bool:
        """Whether a chunk's queries see so much more than their choice that gathering it is worth the copies."""
        far = chunk.sparse and len(chunk.keys) >= GATHER_FROM * self.topk
        return far and index is not None and seen.indexer_loss != "dense"

    def _runs(self, index: Index | None, seen: Visibility) -> list[list[Chunk]]:
        """The chunks in order; neighbours that gather are together, all others alone."""
        runs: list[list[Chunk]] = []
        for chunk in seen.chunks or ():
            if runs and all(self._gathers(index, seen, other) for other in (runs[-1][0], chunk)):
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return runs

    def _gathered(
        self, q_nope: Tensor, q_rope: Tensor, stored_BTW: Tensor, index: Index, run: list[Chunk], seen: Visibility
    ) -> tuple[Tensor, Tensor | float, Tensor | int]:  # fmt: skip
        """Output [B, t, H, V] of a run of the queries [B, T, H, N|R], the indexer's KL summed, and of how many rows."""
        part = slice(run[0].part.start, run[-1].part.stop)
        positions = index.choose(run)
        out_BtHV, mass_Btk = gathered_attention(
            q_nope[:, part], q_rope[:, part], stored_BTW, *self.up_projections(), positions, self.scale, index.learns
        )  # fmt: skip
        if not index.learns:
            return out_BtHV, 0.0, 0
        support = positions >= 0
        if seen.valid_BT is not None:
            support &= seen.valid_BT[:, part, None]
        kl, rows = indexer_kl(index.scores_at(part, positions), mass_Btk, support)
        return out_BtHV, kl, rows

    @torch.no_grad()
    def _mass(self, q_BHtd: Tensor, k_BHSd: Tensor, support_BtS: Tensor) -> Tensor:
        """The main attention's probabilities on `support`, summed over heads [B, t, S]; rows without support are zero.

        One head at a time, so that no [H, t, S] tensor exists.
        """
        exact, none_BtS = self.kv_b_proj.weight.dtype, ~support_BtS
        total_BtS: Tensor | None = None
        for head in range(self.heads):
            logits_BtS = (q_BHtd[:, head].to(exact) @ k_BHSd[:, head].to(exact).mT).mul_(self.scale)
            p_BtS = logits_BtS.masked_fill_(none_BtS, -torch.inf).softmax(-1)
            total_BtS = p_BtS if total_BtS is None else total_BtS.add_(p_BtS)
        assert total_BtS is not None
        return total_BtS.nan_to_num_(0.0)

    # --- absorbed form --------------------

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, allowed: Tensor
    ) -> Tensor:
        """Attention of queries [M, H, N|R] over their own latents [M, S, C] and rope keys [M, S, R]; out [M, H*V].

        `allowed` [M, S] is boolean with at least one True a row.
        """
        up_k, up_v = self.up_projections()
        q_latent_MHC = torch.einsum("mhn,hnc->mhc", q_nope, up_k)
        scores_MHS = (q_latent_MHC @ latent.mT + q_rope @ k_rope.mT) * self.scale
        weights_MHS = scores_MHS.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        return torch.einsum("mhc,hvc->mhv", weights_MHS @ latent, up_v).flatten(1)
