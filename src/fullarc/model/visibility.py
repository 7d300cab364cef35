"""Who may see whom in a row: the part of every query's keys that does not depend on what the tokens say.

A row is one document, or packed with several, which may continue a common prefix; a layer may have a window. Queries
come in chunks, each with the blocks of keys that some of them may see, so that no [T, T] tensor of scores exists.

Invariant: a query sees earlier-or-equal positions of its own document (and of the one that it continues) only.
Shape suffixes: see ops.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullarc.config.model import ModelConfig
from fullarc.model.context import WHOLE, Context
from fullarc.model.ops import rope_tables

BLOCK = 128
LONG_BLOCK = 512


@dataclass
class Chunk:
    """A run of queries and the blocks of keys that some of them may see.

    Attributes:
        part: the queries among those that are computed here.
        first: position in the row of the first of them.
        blocks: numbers of the blocks of keys, ascending; all others are invisible to all of these queries.
        keys: positions of the keys in these blocks [S].
        packed_BtS: who may see whom among them, boolean, of each row or, if alike, of one; None when a row is one
            document, where it is the past.
        sparse: whether the indexer narrows the choice: some query may see more than its top-k.
    """

    part: slice
    first: int
    blocks: list[int]
    keys: Tensor
    packed_BtS: Tensor | None
    sparse: bool

    @property
    def allowed_BtS(self) -> Tensor:
        """Who may see whom, boolean [B or 1, t, S]."""
        if self.packed_BtS is not None:
            return self.packed_BtS
        there = self.in_row(self.part)
        index_t = torch.arange(there.start, there.stop, device=self.keys.device)
        return (index_t[:, None] >= self.keys)[None]

    def of(self, pieces: Sequence[Tensor], dim: int) -> Tensor:
        """What `pieces`, a tensor cut into blocks along `dim`, has of these keys.

        Pieces of one `split` get their gradients by one copy, unlike slices.
        """
        mine = [pieces[number] for number in self.blocks]
        return mine[0] if len(mine) == 1 else torch.cat(mine, dim)

    def in_row(self, few: slice) -> slice:
        """Where the queries `few` are in the row."""
        shift = self.first - self.part.start
        return slice(few.start + shift, few.stop + shift)

    def hide(self, scores_tS: Tensor, b: int, few: slice) -> Tensor:
        """Scores of the queries `few` of row b, -inf in place where a key may not be seen."""
        if self.packed_BtS is not None:
            mine = slice(few.start - self.part.start, few.stop - self.part.start)
            row = b if len(self.packed_BtS) > 1 else 0
            return scores_tS.masked_fill_(~self.packed_BtS[row, mine], -torch.inf)
        there = self.in_row(few)
        later_tS = scores_tS[:, there.start :]
        index_t, index_S = self.keys[there], self.keys[there.start : scores_tS.shape[-1]]
        later_tS.masked_fill_(index_t[:, None] < index_S, -torch.inf)
        return scores_tS


@dataclass
class Visibility:
    """What may be seen: built once a forward pass and shared by all layers.

    Attributes:
        cos, sin: RoPE tables [B, T, P].
        chunks: all queries in order, a block at a time; None when plain causal and dense (one document a row).
        block: positions per block of keys.
        sparse: whether any query of the rows, wherever it is computed, is sparse.
        indexer_loss: "off", "dense" (KL over all allowed keys) or "sparse" (KL over the selected set).
        valid_BT: boolean, False on padding.
        context: where the other positions of the rows are, when the T here are not all.
    """

    cos: Tensor
    sin: Tensor
    chunks: list[Chunk] | None = None
    block: int = BLOCK
    sparse: bool = False
    indexer_loss: str = "off"
    valid_BT: Tensor | None = None
    context: Context = WHOLE


def block_size(doc_ids: Tensor | None) -> int:
    """Positions per block of keys: small where rows are packed, so that other documents are passed over."""
    return LONG_BLOCK if doc_ids is None else BLOCK


def visible_chunks(
    length: int,
    doc_ids: Tensor | None,
    parent_ids: Tensor | None,
    topk: int | None,
    device: torch.device,
    near: tuple[Tensor, int] | None = None,
    runs: Sequence[tuple[int, int]] | None = None,
) -> list[Chunk]:
    """The queries of rows of `length` in chunks, each with the blocks of keys it needs; of `runs` only, if given.

    A packed row is a band of small documents, so most blocks are invisible to most queries and are never touched;
    and no [T, T] tensor of scores exists, whatever T. `topk` None: never sparse. `near`: positions within their
    documents [B, T], and how many keys up to its own a query may see.
    """
    block = block_size(doc_ids)
    index_T = torch.arange(length, device=device)
    places = index_T.split(block)
    pieces_of = (index_T[start:stop].split(block) for start, stop in runs or [(0, length)])
    chunks, done = [], 0
    for queries in (piece for pieces in pieces_of for piece in pieces):
        there = slice(int(queries[0]), int(queries[-1]) + 1)
        part = slice(done, done + len(queries))
        done, ends = part.stop, -(-there.stop // block)
        if doc_ids is None and near is None:
            blocks, packed, most = list(range(ends)), None, there.stop
        else:
            past = slice(min(ends * block, length))
            allowed = (queries[:, None] >= index_T[past])[None]
            if doc_ids is not None:
                same = doc_ids[:, there, None] == doc_ids[:, None, past]
                if parent_ids is not None:
                    parent = parent_ids[:, there, None]
                    same |= (parent == doc_ids[:, None, past]) & (parent > 0)
                allowed = same & allowed
            if near is not None:
                places_BT, window = near
                allowed = allowed & (places_BT[:, there, None] - places_BT[:, None, past] < window)
            pieces = allowed.split(block, -1)
            blocks = [other for other, piece in enumerate(pieces) if piece.any()]
            packed, most = torch.cat([pieces[other] for other in blocks], -1), int(allowed.sum(-1).max())
        keys = torch.cat([places[other] for other in blocks])
        chunks.append(Chunk(part, there.start, blocks, keys, packed, topk is not None and most > topk))
    return chunks


def look(
    config: ModelConfig,
    shape: torch.Size,
    device: torch.device,
    doc_ids: Tensor | None,
    parent_ids: Tensor | None,
    indexer_loss: str = "off",
    window: int = 0,
    context: Context = WHOLE,
) -> Visibility:
    """What may be seen in rows of `shape` [B, T]; see `GlmMoeDsa.trunk` for the documents and the indexer's loss.

    Args:
        window: keys up to its own that a query may see at most; 0 = all.
        context: which of the positions are computed here.
    """
    if indexer_loss not in ("off", "dense", "sparse"):
        raise ValueError(f"indexer_loss must be 'off', 'dense' or 'sparse', got {indexer_loss!r}")
    length, own = shape[1], context.own
    positions_BT = places(shape, device, doc_ids, parent_ids)
    cos, sin = rope_tables(own(positions_BT), config.qk_rope_head_dim, config.rope_theta)
    topk = None if indexer_loss == "dense" else config.index_topk
    near = (positions_BT[: 1 if doc_ids is None else None], window) if 0 < window < length else None
    plain = doc_ids is None and indexer_loss == "off" and length <= config.index_topk and near is None
    if plain and not context.divided:
        return Visibility(cos, sin)
    chunks = visible_chunks(length, doc_ids, parent_ids, topk, device, near, context.runs(length))
    sparse = bool(context.total(torch.tensor(sum(chunk.sparse for chunk in chunks))))
    valid_BT = None if doc_ids is None else own(doc_ids > 0)
    return Visibility(cos, sin, chunks, block_size(doc_ids), sparse, indexer_loss, valid_BT, context)


def places(
    shape: torch.Size, device: torch.device, doc_ids: Tensor | None, parent_ids: Tensor | None
) -> Tensor:
    """Each token's position within its document, counted on from the end of the prefix that it continues [B, T]."""
    index_T = torch.arange(shape[1], device=device)
    if doc_ids is None:
        return index_T.expand(shape)
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    positions_BT = index_T - torch.where(starts, index_T, 0).cummax(1).values
    if parent_ids is None:
        return positions_BT
    sizes = torch.zeros(len(doc_ids), int(doc_ids.max()) + 1, dtype=torch.long, device=device)
    sizes.scatter_add_(1, doc_ids, torch.ones_like(doc_ids))
    return positions_BT + torch.where(parent_ids > 0, sizes.gather(1, parent_ids), 0)
