"""Latent attention over a cache whose result for one query does not depend on anything else in the batch.

How, without a kernel of our own (after "Defeating Nondeterminism in LLM Inference", Thinking Machines 2025):
    runs        consecutive queries of one sequence; runs of about the same shape are computed together, as a `Grid`
    scores      products of >= 4 query rows with [dim, position] keys: each element is one fixed-order dot product
    softmax     keys that are not seen are -inf and become exact zeros, which add nothing wherever they stand
    values      tile by tile of TILE keys, summed from left to right; the last tile may be cut off where zeros begin
With DSA, queries at positions before GATHER_FROM * top-k do the same computation with the keys outside the indexer's
choice masked; all later ones, in prefill and in decoding alike, gather their own top-k rows and compute with these, so
that their cost does not grow but for the indexer's scan, which goes in tiles of SCAN keys. Element-wise multiply and
add are never fused (addcmul), which would round by layout.

Invariant (tests/engine/test_bitwise.py): equal query, position and cache content give equal bits.
Shape suffixes: as in model/ops.py; A padded heads, W = C + R, I index dim, N queries of a grid = runs x queries of
each, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullarc.engine.cache import TILE
from fullarc.model.indexer import choose as chosen
from fullarc.model.indexer import select
from fullarc.model.mla import GATHER_FROM
from fullarc.model.pieces import Scratch

KEY_BLOCK = 32
QUERY_CHUNK = 128
SHORT_RUN = 32
SCAN = 2048
GATHERED = (
    32  # queries whose rows are gathered at once, so that these are still in the cache when they are used
)
DECODING_RUN = 8


@dataclass(frozen=True)
class Run:
    """Queries at positions start, start + 1, … of `slot`, in rows row, row + 1, … of the batch."""

    slot: int
    start: int
    row: int
    count: int


@dataclass(frozen=True)
class Grid:
    """Runs padded to one number of queries, which see the first `size` keys of their slots.

    Attributes:
        slots: of the runs.
        rows: of the batch that hold the queries; -1 = padding.
        longest: greatest position.
        causal_NS, bias_NS: keys that each query may see, as booleans and as 0 | -inf.
        gathers: whether each query's chosen keys are gathered.
    """

    slots: slice | Tensor
    rows: list[int]
    longest: int
    causal_NS: Tensor
    bias_NS: Tensor
    gathers: bool


def _grid(
    slots: slice | Sequence[int], runs: Sequence[Run | None], queries: int, first: int, gathers: bool
) -> Grid:
    rows, positions = list[int](), list[int]()
    for run in runs:
        count = run.count if run else 0
        rows += [*(range(run.row, run.row + count) if run else ()), *[-1] * (queries - count)]
        positions += [*(range(run.start, run.start + count) if run else ()), *[0] * (queries - count)]
    longest = max(positions)
    key_S, query_N1 = torch.arange(_blocks(longest + 1)), torch.tensor(positions)[:, None]
    causal_NS = key_S <= query_N1
    if first:
        causal_NS &= (key_S >= first) | (query_N1 < first)
    where = slots if isinstance(slots, slice) else torch.tensor(slots)
    return Grid(where, rows, longest, causal_NS, torch.where(causal_NS, 0.0, -torch.inf), gathers)


def grids(runs: Sequence[Run], topk: int, first: int = 0) -> list[Grid]:
    """Runs in groups that are computed together; keys before `first` are seen by no query behind them.

    `topk`: of the indexer, at least the longest sequence where attention is dense.

    Very short runs (decoding sequences, with or without drafts) of about the same length share a grid whatever their
    past; short ones one of the same past too; long ones stand alone, in pieces of QUERY_CHUNK.
    """
    alike: dict[tuple[int, int, bool], list[Run]] = {}
    border = GATHER_FROM * topk
    for run in runs:
        at = 0
        while at < run.count:
            begin = run.start + at
            count = min(QUERY_CHUNK, run.count - at, border - begin if begin < border else QUERY_CHUNK)
            piece = Run(run.slot, begin, run.row + at, count)
            at += count
            queries = count if count > SHORT_RUN else 1 << (count - 1).bit_length()
            past = 0 if queries <= DECODING_RUN else _blocks(piece.start + count)
            alike.setdefault((queries, past, begin >= border), []).append(piece)
    return [_together(group, queries, first, far) for (queries, _, far), group in alike.items()]


def _together(runs: Sequence[Run], queries: int, first: int, gathers: bool) -> Grid:
    """One grid. Its slots are used in place when most of them take part, and copied otherwise."""
    low, high = min(run.slot for run in runs), max(run.slot for run in runs) + 1
    at = {run.slot: run for run in runs}
    if high - low > len(runs) * (2 if queries <= DECODING_RUN else 1):
        return _grid([run.slot for run in runs], runs, queries, first, gathers)
    return _grid(slice(low, high), [at.get(slot) for slot in range(low, high)], queries, first, gathers)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """RoPE in place on [..., R] whose pairs are stored as halves; `cos`, `sin` broadcast as [..., R], halves equal."""
    half = x.shape[-1] // 2
    across, along = x * sin, x * cos
    torch.sub(along[..., :half], across[..., half:], out=x[..., :half])
    torch.add(along[..., half:], across[..., :half], out=x[..., half:])


def _index_scores(dots_NJS: Tensor, w_NJ: Tensor) -> Tensor:
    """I [N, S] = sum_j w_j ReLU(q_j . k), heads added in order."""
    terms = dots_NJS.relu_().mul_(w_NJ[..., None])
    total = terms[:, 0].clone()
    for head in range(1, terms.shape[1]):
        total += terms[:, head]
    return total


def choose(iq_NJI: Tensor, w_NJ: Tensor, grid: Grid, keys: Tensor, topk: int, scratch: Scratch) -> Tensor:
    """What the indexer lets a grid's queries see: as 0 | -inf [N, S], or as positions [N, k] where they are gathered.

    All that they may see where that is at most `topk` keys. `iq_NJI` and `w_NJ` are the indexer's queries and head
    weights, `keys` one layer's cache [G, W + I, P].
    """
    if grid.longest < topk:
        return grid.bias_NS
    (*shape, dim), size = iq_NJI.shape, grid.bias_NS.shape[-1]
    index_keys = keys[grid.slots, -dim:, :size]
    iq_GMI = iq_NJI.reshape(len(index_keys), -1, dim)
    scores_NS = iq_NJI.new_empty(shape[0], size)
    for start in range(0, size, SCAN):
        dots = torch.bmm(iq_GMI, index_keys[..., start : start + SCAN]).view(*shape, -1)
        scores_NS[:, start : start + SCAN] = _index_scores(dots, w_NJ)
    if grid.gathers:
        # padding has fewer keys, and -1 for those that it lacks
        return chosen(scores_NS.add_(grid.bias_NS), topk, scratch).clamp_min_(0).long()
    return torch.where(select(scores_NS, grid.causal_NS, topk), 0.0, -torch.inf)


def attend(q_NAW: Tensor, choice: Tensor, grid: Grid, keys: Tensor, values: Tensor, latent: int) -> Tensor:
    """Attention of a grid's queries: latents [N, A, C], C = `latent`.

    `keys` [G, W + I, P] and `values` [G, P, W] are one layer's cache and already hold the runs themselves. `choice`
    says which keys a query sees, as `choose` returns it.
    """
    if grid.gathers:
        return _attend_gathered(q_NAW, choice, grid, values, latent)
    (queries, heads, width), size, bias_NS = q_NAW.shape, choice.shape[-1], choice
    keys, values = keys[grid.slots, :width, :size], values[grid.slots, :size, :latent]
    runs = len(keys)
    scores = torch.bmm(q_NAW.reshape(runs, -1, width), keys)
    scores.view(queries, heads, size).add_(bias_NS[:, None])
    p = scores.softmax(-1)
    out = torch.bmm(p[..., :TILE], values[:, :TILE])
    for start in range(TILE, size, TILE):
        out += torch.bmm(p[..., start : start + TILE], values[:, start : start + TILE])
    return out.view(queries, heads, -1)


def _attend_gathered(q_NAW: Tensor, chosen_NK: Tensor, grid: Grid, values: Tensor, latent: int) -> Tensor:
    """The same over each query's own rows of the cache."""
    slots, (_, positions, width) = grid.slots, values.shape
    slot_G = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
    at_NK = chosen_NK + slot_G.repeat_interleave(len(chosen_NK) // len(slot_G))[:, None] * positions
    rows_PW, outs = values.view(-1, width), []
    for q_nAW, at_nK in zip(q_NAW.split(GATHERED), at_NK.split(GATHERED), strict=True):
        rows_nKW = rows_PW.index_select(0, at_nK.flatten()).view(*at_nK.shape, width)
        p = torch.bmm(q_nAW, rows_nKW.mT).softmax(-1)
        outs.append(torch.bmm(p, rows_nKW[..., :latent]))
    return torch.cat(outs)


def _blocks(length: int) -> int:
    """`length` rounded up to whole blocks of keys."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK
