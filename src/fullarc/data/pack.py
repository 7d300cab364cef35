"""Documents to rows of T tokens, and the folder of rows that a trainer reads.

Two ways (spec 1.3): `pack_concat` is pre-training's plain concatenation, cut wherever a row ends; `pack_best_fit` is
best-fit decreasing (arXiv 2404.10830), from mid-training on: documents stay whole, longer ones are cut at T, no
token is lost, and a row's documents are isolated from each other by their numbers. Documents that begin with the
same long prefix (the tools block of agent trajectories) may share it: a row stores it once, as a document that the
others continue, which a model computes exactly as if each carried its own copy.

Invariants: a row's document numbers start at 1 and 0 is padding at its end; best-fit keeps every token once, in
order within its document; same input, same bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, sha256, verify_manifest

Doc = tuple[Sequence[int], Sequence[int]]
"""Token ids and, aligned, 1 where the token is a training target."""

ARRAYS = ("ids", "loss", "docs", "parents")
MIN_SHARED = 32
"""A shorter common prefix is not worth a document of its own."""
SMALL = 4
"""Documents of at most 1 / SMALL of a row are packed in the order they come in, longer ones before them."""


@dataclass(frozen=True)
class Packed:
    """Rows of tokens: ids, loss (1 = target), docs (0 = padding) and parents (document continued, 0 = none), [N, T]."""

    ids: NDArray[np.uint32]
    loss: NDArray[np.uint8]
    docs: NDArray[np.uint16]
    parents: NDArray[np.uint16]
    packing: str
    isolate: bool

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.docs > 0).sum())

    @property
    def fill(self) -> float:
        """Share of the rows that is not padding."""
        return self.tokens / max(1, self.docs.size)


def pack_concat(docs: Iterable[Doc], length: int) -> Packed:
    """Concatenate documents and cut every `length` tokens; what does not fill a last row is left out.

    Raises:
        FullarcError: there is not one row of tokens.
    """
    pieces = [(np.asarray(ids, np.uint32), np.asarray(loss, np.uint8)) for ids, loss in docs if len(ids)]
    sizes = np.array([len(ids) for ids, _ in pieces], dtype=np.int64)
    rows = int(sizes.sum()) // length
    if not rows:
        raise FullarcError(
            f"The corpus has {int(sizes.sum())} tokens: too few for one row of {length}.",
            "Add text to data.sources, or use a smaller seq_len.",
        )
    shape = (rows, length)
    total = rows * length
    numbers = np.repeat(np.arange(len(pieces)), sizes)[:total].reshape(shape)
    return Packed(
        np.concatenate([ids for ids, _ in pieces])[:total].reshape(shape),
        np.concatenate([loss for _, loss in pieces])[:total].reshape(shape),
        (numbers - numbers[:, :1] + 1).astype(np.uint16),
        np.zeros(shape, np.uint16),
        "concat",
        False,
    )


def pack_best_fit(docs: Iterable[Doc], length: int, shared: int = 0) -> Packed:
    """Fill rows best-fit decreasing: the longest document first, each into the fullest row that still has room.

    Args:
        shared: tokens that all documents begin with and that a row stores once; 0 = documents are separate.
            The last of them is repeated in every document, whose first own token it predicts.

    Raises:
        FullarcError: there is no token at all, or no room beside the shared prefix.
    """
    whole = [(ids, loss) for ids, loss in docs if len(ids)]
    if not whole:
        raise FullarcError("There is nothing to pack: no document has a token.")
    stem = max(shared - 1, 0)
    if stem and length - stem < 2:
        raise FullarcError(
            f"A shared prefix of {shared} tokens leaves no room in rows of {length}.", "Use a larger seq_len."
        )
    prefix_ids, prefix_loss = whole[0][0][:stem], whole[0][1][:stem]
    pieces = [piece for doc in whole for piece in _cut(_without_stem(doc, stem), length - stem)]
    bins = best_fit([len(ids) for ids, _ in pieces], length - stem)
    ids = np.zeros((len(bins), length), np.uint32)
    loss = np.zeros((len(bins), length), np.uint8)
    numbers = np.zeros((len(bins), length), np.uint16)
    parents = np.zeros((len(bins), length), np.uint16)
    first = 2 if stem else 1
    ids[:, :stem], loss[:, :stem], numbers[:, :stem] = prefix_ids, prefix_loss, 1
    for row, members in enumerate(bins):
        at = stem
        for number, member in enumerate(members, start=first):
            piece, mask = pieces[member]
            end = at + len(piece)
            ids[row, at:end], loss[row, at:end], numbers[row, at:end] = piece, mask, number
            parents[row, at:end] = 1 if stem else 0
            at = end
    return Packed(ids, loss, numbers, parents, "best_fit", True)


def pack_sharing(docs: Iterable[Doc], length: int) -> Packed:
    """Best-fit rows in which documents that begin alike store their common prefix once a row."""
    parts = [
        pack_best_fit(group, length, _shared(group, length))
        for group in _alike(docs)
        if any(len(ids) for ids, _ in group)
    ]
    if not parts:
        raise FullarcError("There is nothing to pack: no document has a token.")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    return Packed(**joined, packing="best_fit", isolate=True)


def own_tokens(docs: Sequence[Doc], length: int) -> list[int]:
    """Tokens that each document adds to the rows of `pack_sharing`, the shared prefix left out."""
    stems: dict[int, int] = {}
    for group in _alike(docs):
        stem = _shared(group, length)
        stems |= {id(ids): stem for ids, _ in group}
    return [len(ids) - stems[id(ids)] for ids, _ in docs]


def _alike(docs: Iterable[Doc]) -> list[list[Doc]]:
    """Groups of documents with the same first MIN_SHARED tokens; those alike to no other form the last group."""
    groups: dict[tuple[int, ...], list[Doc]] = {}
    for doc in docs:
        groups.setdefault(tuple(doc[0][:MIN_SHARED]), []).append(doc)
    several = [group for group in groups.values() if _shared(group, 1 << 30)]
    single = [doc for group in groups.values() if not _shared(group, 1 << 30) for doc in group]
    return [*several, single] if single else several


def _shared(docs: Sequence[Doc], length: int) -> int:
    """Length of the documents' common prefix, or 0 if it is short or would fill half a row."""
    if len(docs) < 2:
        return 0
    low, high = min(list(ids) for ids, _ in docs), max(list(ids) for ids, _ in docs)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return common if MIN_SHARED <= common <= length // 2 else 0


def _without_stem(doc: Doc, stem: int) -> Doc:
    """What a document stores of its own: all after the stem; the repeated first token is not a target again."""
    ids, loss = doc
    return (ids[stem:], [0, *loss[stem + 1 :]]) if stem else doc


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `sizes` (each in 1..room) grouped into bins of at most `room`, best-fit decreasing.

    Small ones stay in the order they come in: they fill bins well in any order, and sorted they would stand beside
    their like, which makes rows, and batches of few rows, one-sided. O(n) steps on a bit set of the free rooms: bit r
    is set while some bin has exactly r left.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    free = 0
    for index in sorted(range(len(sizes)), key=lambda i: -max(sizes[i], room // SMALL)):
        size = sizes[index]
        fitting = free >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            number = with_room[left].pop()
            if not with_room[left]:
                free &= ~(1 << left)
        else:
            left, number = room, len(bins)
            bins.append([])
        bins[number].append(index)
        left -= size
        if left:
            with_room[left].append(number)
            free |= 1 << left
    return bins


def _cut(doc: Doc, length: int) -> Iterator[Doc]:
    ids, loss = doc
    for start in range(0, len(ids), length):
        yield ids[start : start + length], loss[start : start + length]


def write_rows(
    out: Path, packed: Packed, vocab_size: int, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a rows folder (ids, loss, docs and parents .npy, meta.json) atomically; returns meta.json's content."""
    with atomic_dir(out) as temp:
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        np.save(temp / "ids.npy", packed.ids.astype(dtype))
        np.save(temp / "loss.npy", packed.loss)
        np.save(temp / "docs.npy", packed.docs)
        np.save(temp / "parents.npy", packed.parents)
        meta = {
            "T": packed.ids.shape[1],
            "n_rows": len(packed.ids),
            "n_tokens": packed.tokens,
            "n_targets": int(packed.loss.sum()),
            "fill": round(packed.fill, 6),
            "packing": packed.packing,
            "isolate": packed.isolate,
            "vocab_size": vocab_size,
            "sha256": {name: sha256(temp / f"{name}.npy") for name in ARRAYS},
            **(facts or {}),
        }
        (temp / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def read_rows(folder: Path) -> tuple[Packed, dict[str, Any]]:
    """The rows of a folder, memory-mapped, and its meta.json. FullarcError if it is not whole."""
    verify_manifest(folder)
    meta = json.loads((folder / "meta.json").read_text())
    ids, loss, docs, parents = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
    return Packed(ids, loss, docs, parents, meta["packing"], meta["isolate"]), meta
