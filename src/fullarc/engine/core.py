"""The forward pass of a batch that mixes decoding and chunks of prompts (continuous batching).

A step is a flat list of token rows, each with its slot and position: the chunks of prompts, the last tokens and drafts
of decoding sequences, then padding to whole blocks of rows. All products see the flat rows; only attention knows
about sequences.

The MTP layer is one more layer with a cache of its own. Its row p joins token p with the trunk's state at p - 1 (in
training the row is numbered p - 1, but only distances matter), so that a row depends on its own prefix alone, as in
every other layer, and the prefix cache holds it like theirs.

Invariant: a row's result depends, to the bit, on its own sequence only. fp32 matrix products treat every row of
whole blocks of 16 alike (measured for the MKL of torch 2.13; tests/engine/test_bitwise.py guards it), experts are
given whole blocks, and attention is tiled by absolute position.
Shape suffixes: as in model/ops.py; N rows.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fullarc.engine.attention import Grid, Run, attend, choose, grids, rotate
from fullarc.engine.cache import Cache
from fullarc.engine.trace import Trace, seen
from fullarc.engine.weights import (
    AttentionWeights,
    EngineWeights,
    FFNWeights,
    LayerWeights,
    MoEWeights,
    padded_heads,
)
from fullarc.model.moe import ROW_BLOCK, dispatch, tokens_of
from fullarc.model.pieces import Scratch

# 32 floats are two vector registers: the element-wise functions of torch (sigmoid, silu, exp) compute what is left over
# at the end of a tensor with other code and other last bits, so there must be nothing left over.
VECTORS = 32


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence: `ids` stand at positions start, start + 1, … of `slot`."""

    slot: int
    start: int
    ids: list[int]


@dataclass
class _Batch:
    """A step's rows as tensors, and the grids that attention splits them into.

    Attributes:
        rows: those that are no padding.
        cos, sin: [N, R], once for each half.
        gather: rows in the order of the grids; back: for each row its place there.
        choices: what each grid's queries see in the present layer (see `choose`); layers without an indexer keep it.
    """

    rows: int
    slots_N: Tensor
    positions_N: Tensor
    cos: Tensor
    sin: Tensor
    grids: list[Grid]
    gather: Tensor
    back_N: Tensor
    choices: list[Tensor]


class Core:
    """Weights and cache; `forward` runs one step. Not thread-safe: one thread owns it.

    With `mtp` the cache has rows for the MTP layer and `look_ahead` may be called.
    """

    def __init__(self, weights: EngineWeights, slots: int, max_len: int, mtp: bool = False) -> None:
        self.weights = weights
        self.cache = Cache(weights.config, slots, max_len, mtp)
        self._scratch = Scratch()
        c = weights.config
        widths = c.n_routed_experts, c.moe_intermediate_size, c.intermediate_size
        self._block = ROW_BLOCK if all(ROW_BLOCK * width % VECTORS == 0 for width in widths) else VECTORS

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], trace: Trace | None = None) -> Tensor:
        """Final hidden states [rows, D] after the last norm, in the order of `chunks` (plus padding rows).

        Each slot may appear once. `trace`, of as many rows as `chunks` have, takes what they chose.
        """
        w = self.weights
        ids_N, batch = self._batch(chunks)
        h_ND = w.embed[ids_N].float()
        for number, layer in enumerate(w.layers):
            h_ND = self._layer(number, layer, h_ND, batch, trace)
        return _norm(h_ND, w.norm, w.config.rms_norm_eps)

    @torch.inference_mode()
    def look_ahead(self, chunks: list[Chunk], states_ND: Tensor) -> Tensor:
        """The MTP layer's states [rows, D] of tokens whose predecessors' states are given, plus padding rows.

        The state of row p predicts token p + 1, and is what row p + 1 joins when the trunk's is not known yet.
        """
        w, mtp = self.weights, self.weights.mtp
        assert mtp is not None
        eps = w.config.rms_norm_eps
        ids_N, batch = self._batch(chunks, first=1)
        states_ND = F.pad(states_ND, (0, 0, 0, len(ids_N) - len(states_ND)))
        both = torch.cat(
            (_norm(w.embed[ids_N].float(), mtp.enorm, eps), _norm(states_ND, mtp.hnorm, eps)), -1
        )
        h_ND = self._layer(len(w.layers), mtp.layer, mtp.join(both), batch)
        return _norm(h_ND, mtp.norm, eps)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor, rows: list[int]) -> Tensor:
        """Logits [len(rows), V] of chosen rows."""
        padding = -len(rows) % ROW_BLOCK
        return self.weights.head(hidden_ND[torch.tensor(rows + rows[:1] * padding)])[: len(rows)]

    # --- helpers ----------------------------------------------------------------------------------------------

    @property
    def _topk(self) -> int:
        """Keys that a query sees: where attention is dense, more than there can be."""
        c = self.weights.config
        return self.cache.max_len if c.dense_attention else c.index_topk

    def _layer(
        self, number: int, layer: LayerWeights, h_ND: Tensor, batch: _Batch, trace: Trace | None = None
    ) -> Tensor:
        h_ND = h_ND + self._attention(number, layer.attention, h_ND, batch)
        if trace and trace.keys_NLS is not None:
            trace.keys_NLS[:, number] = self._seen(batch)
        normed = _norm(h_ND, layer.ffn_norm, self.weights.config.rms_norm_eps)
        if isinstance(layer.ffn, MoEWeights):
            _, chosen_NK, g_NK = layer.ffn.router(normed)
            if trace and trace.experts_NLK is not None:
                trace.experts_NLK[:, number] = chosen_NK[: batch.rows]
            return h_ND + _moe(layer.ffn, normed, chosen_NK, g_NK, batch.rows)
        return h_ND + _ffn(layer.ffn, normed)

    def _seen(self, batch: _Batch) -> Tensor:
        """The keys that the rows see in the present layer [rows, index_topk]."""
        topk = self.weights.config.index_topk
        parts = [
            seen(*pair, topk) for pair in zip(batch.choices, (g.gathers for g in batch.grids), strict=True)
        ]
        return torch.cat(parts).index_select(0, batch.back_N[: batch.rows])

    def _batch(self, chunks: list[Chunk], first: int = 0) -> tuple[Tensor, _Batch]:
        """Token ids and tensors of a step's rows; keys before `first` are not seen."""
        ids, slots, positions = list[int](), list[int](), list[int]()
        for chunk in chunks:
            ids += chunk.ids
            slots += [chunk.slot] * len(chunk.ids)
            positions += range(chunk.start, chunk.start + len(chunk.ids))
        rows = itertools.accumulate((len(chunk.ids) for chunk in chunks), initial=0)
        runs = [Run(c.slot, c.start, row, len(c.ids)) for c, row in zip(chunks, rows, strict=False)]
        together = grids(runs, self._topk, first)
        gather = [row for grid in together for row in grid.rows]
        place = {row: at for at, row in enumerate(gather)}
        padding = -len(ids) % self._block
        slots_N = torch.tensor(slots + [self.cache.padding_slot] * padding)
        positions_N = torch.tensor(positions + [0] * padding)
        batch = _Batch(
            len(ids),
            slots_N,
            positions_N,
            self.weights.cos[positions_N].repeat(1, 2),
            self.weights.sin[positions_N].repeat(1, 2),
            together,
            torch.tensor(gather).clamp_min_(0),
            torch.tensor([place[row] for row in range(len(ids))] + [0] * padding),
            [grid.bias_NS for grid in together],
        )
        return torch.tensor(ids + [0] * padding), batch

    def _attention(self, number: int, w: AttentionWeights, h_ND: Tensor, batch: _Batch) -> Tensor:
        c = self.weights.config
        rope, eps = c.qk_rope_head_dim, c.latent_norm_eps
        parts = w.hidden(_norm(h_ND, w.norm, c.rms_norm_eps))
        q_latent, latent, k_rope, for_index = parts.tensor_split(
            (c.q_lora_rank, c.q_lora_rank + c.kv_lora_rank, c.q_lora_rank + self.cache.width), dim=-1
        )
        latent = _norm(latent, w.kv_norm, eps)
        new_keys = torch.cat((latent, k_rope), -1)
        if w.index_norm is not None:
            k_index = F.layer_norm(
                for_index[:, : c.index_head_dim], (c.index_head_dim,), *w.index_norm, eps=1e-6
            )
            new_keys = torch.cat((new_keys, k_index), -1)
        cos, sin = batch.cos[:, None], batch.sin[:, None]
        # the main key and the index key rotate neighbouring columns
        rotate(new_keys[:, c.kv_lora_rank :][:, : 2 * rope].unflatten(-1, (-1, rope)), cos, sin)
        keys, values = self.cache.keys[number], self.cache.values[number]
        keys[batch.slots_N, : new_keys.shape[1], batch.positions_N] = new_keys
        values[batch.slots_N, batch.positions_N] = new_keys[:, : self.cache.width]

        q_latent = _norm(q_latent, w.q_norm, eps)
        q_NAW = w.q(q_latent).unflatten(-1, (padded_heads(c), self.cache.width))
        rotate(q_NAW[..., c.kv_lora_rank :], cos, sin)
        q_NAW = q_NAW.index_select(0, batch.gather)
        starts = itertools.accumulate((len(grid.rows) for grid in batch.grids), initial=0)
        parts_of = [slice(at, at + len(grid.rows)) for at, grid in zip(starts, batch.grids, strict=False)]
        if w.index_q is not None and any(grid.longest >= self._topk for grid in batch.grids):
            iq_NJI = w.index_q(q_latent).unflatten(-1, (c.index_n_heads, c.index_head_dim))
            rotate(iq_NJI[..., :rope], cos, sin)
            iq_NJI = iq_NJI.index_select(0, batch.gather)
            w_NJ = for_index[:, c.index_head_dim :].index_select(0, batch.gather)
            batch.choices = [
                choose(iq_NJI[own], w_NJ[own], grid, keys, self._topk, self._scratch)
                for own, grid in zip(parts_of, batch.grids, strict=True)
            ]
        outs = [
            attend(q_NAW[own], choice, grid, keys, values, c.kv_lora_rank)
            for own, choice, grid in zip(parts_of, batch.choices, batch.grids, strict=True)
        ]
        return w.out(torch.cat(outs).index_select(0, batch.back_N).flatten(1))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight


def _ffn(w: FFNWeights, x_ND: Tensor) -> Tensor:
    """down(silu(gate x) * up x)."""
    gate, up = w.gate_up(x_ND).chunk(2, dim=-1)
    return w.down(F.silu(gate).mul_(up))


def _moe(w: MoEWeights, x_ND: Tensor, chosen_NK: Tensor, g_NK: Tensor, rows: int) -> Tensor:
    """sum_e g_e E_e(x) + shared(x), experts added in ascending order; every expert computes its own rows.

    Only the first `rows` go to experts; the others are padding.
    """
    slot_RK, ends_E = dispatch(chosen_NK[:rows], len(w.router.weight))
    token_P = tokens_of(slot_RK, int(ends_E[-1]))
    gate_PF, up_PF = w.gate_up(x_ND.index_select(0, token_P), ends_E).chunk(2, dim=-1)
    out_PD = w.down(F.silu(gate_PF).mul_(up_PF), ends_E)
    y_RD = _combine(out_PD.index_select(0, slot_RK.flatten()).unflatten(0, slot_RK.shape), g_NK[:rows])
    y_ND = F.pad(y_RD, (0, 0, 0, len(x_ND) - rows))
    return y_ND if w.shared is None else y_ND + _ffn(w.shared, x_ND)


def _combine(out_NKD: Tensor, g_NK: Tensor) -> Tensor:
    weighted = out_NKD * g_NK[..., None]
    total = weighted[:, 0]
    for choice in range(1, weighted.shape[1]):
        total = total + weighted[:, choice]
    return total
