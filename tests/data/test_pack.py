"""Packing: nothing lost, nothing mixed, rows full."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullarc.config.errors import FullarcError
from fullarc.data.pack import (
    best_fit,
    own_tokens,
    pack_best_fit,
    pack_concat,
    pack_sharing,
    read_rows,
    write_rows,
)


def docs_of(sizes):
    """Documents whose tokens name their document and place, with alternating loss."""
    start = 1
    docs = []
    for size in sizes:
        ids = list(range(start, start + size))
        docs.append((ids, [i % 2 for i in ids]))
        start += size
    return docs


sizes = st.lists(st.integers(0, 70), min_size=1, max_size=40).filter(any)


@settings(deadline=None)
@given(sizes, st.integers(1, 33))
def test_best_fit_keeps_every_token_once_and_documents_apart(lengths, T):
    packed = pack_best_fit(docs_of(lengths), T)
    assert packed.isolate and packed.ids.shape == packed.loss.shape == packed.docs.shape
    real = packed.docs > 0
    assert sorted(packed.ids[real].tolist()) == list(range(1, sum(lengths) + 1))
    assert (packed.loss[real] == packed.ids[real] % 2).all()
    assert not packed.ids[~real].any() and not packed.loss[~real].any()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for ids, docs in zip(packed.ids, packed.docs, strict=True):
        used = docs[docs > 0]
        assert (docs[: len(used)] > 0).all()  # padding only at the end
        assert (np.diff(used.astype(int)) >= 0).all() and set(used) == set(range(1, used.max() + 1))
        for number in set(used):
            piece = ids[docs == number].astype(int)
            assert (np.diff(piece) == 1).all() and len(set(owner[piece - 1])) == 1
    # a document that fits is never cut
    for start, size in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        if 0 < size <= T:
            rows, _ = np.where((packed.ids > start) & (packed.ids <= start + size))
            assert len(set(rows)) == 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=30))
def test_best_fit_is_best_fit(lengths):
    """Against the plain definition: into the fullest bin with room, else a new one."""
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -max(lengths[i], 5)):
        fitting = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= 20]
        if fitting:
            max(fitting, key=lambda b: sum(lengths[j] for j in b)).append(i)
        else:
            bins.append([i])
    ours = best_fit(lengths, 20)  # up to 5, a quarter of it, in the order they come in
    assert sorted(sum(lengths[i] for i in b) for b in ours) == sorted(
        sum(lengths[i] for i in b) for b in bins
    )


def test_rows_of_small_documents_mix_them():
    """Two kinds of different length, alternating: no row has one kind only."""
    rows = best_fit([30, 60] * 300, 512)
    assert all({index % 2 for index in row} == {0, 1} for row in rows[:-1])


def test_rows_are_full_on_documents_like_real_ones():
    lengths = np.random.default_rng(0).lognormal(6.5, 1.2, 3000).astype(int) + 1
    packed = pack_best_fit([([1] * n, [1] * n) for n in lengths], 4096)
    assert packed.tokens == lengths.sum()
    assert packed.fill >= 0.99


@settings(deadline=None)
@given(sizes, st.integers(1, 33))
def test_concat_is_the_concatenation(lengths, T):
    total = sum(lengths)
    if total < T:
        with pytest.raises(FullarcError, match="too few for one row"):
            pack_concat(docs_of(lengths), T)
        return
    packed = pack_concat(docs_of(lengths), T)
    assert packed.ids.ravel().tolist() == list(range(1, total // T * T + 1))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for ids, docs in zip(packed.ids, packed.docs, strict=True):
        assert docs[0] == 1
        changes = np.diff(owner[ids - 1]) > 0
        assert ((np.diff(docs.astype(int)) > 0) == changes).all()
    assert not packed.isolate


def test_rows_folder_is_what_a_trainer_reads(tmp_path):
    packed = pack_best_fit(docs_of([5, 3, 9]), 8)
    meta = write_rows(tmp_path / "rows", packed, 300, {"mix": 1})
    again, read = read_rows(tmp_path / "rows")
    assert (again.ids == packed.ids).all() and again.ids.dtype == np.uint16 and again.loss.dtype == np.uint8
    assert read == meta and read["T"] == 8 and read["n_tokens"] == 17 and read["isolate"] is True
    write_rows(tmp_path / "wide", packed, 100_000)
    assert read_rows(tmp_path / "wide")[0].ids.dtype == np.uint32
    # the trainer's own loader takes the folder
    rows = pytest.importorskip("fullarc.train.rows").Rows(tmp_path / "rows", 2, 0, vocab_size=300)
    assert len(rows) == len(packed.ids)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_rows(tmp_path / name, pack_best_fit(docs_of([5, 3, 9]), 8), 300)
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    assert set(json.loads((tmp_path / "a/manifest.json").read_text())["files"]) == {
        "ids.npy", "loss.npy", "docs.npy", "parents.npy", "meta.json",
    }  # fmt: skip


def test_nothing_to_pack_is_an_error():
    with pytest.raises(FullarcError, match="nothing to pack"):
        pack_best_fit([([], [])], 8)


def test_documents_that_begin_alike_share_their_prefix() -> None:
    """Rebuilding every document from prefix + continuation gives back what was packed, targets included."""
    prefix = list(range(100, 150))
    docs = [([*prefix, *range(n, n + 20)], [0] * 50 + [1] * 20) for n in range(7)]
    alone = [([7, 8, 9], [1, 1, 1])]
    packed = pack_sharing([*docs, *alone], 256)
    assert packed.tokens < sum(len(ids) for ids, _ in docs) / 2
    found = []
    for ids, loss, numbers, parents in zip(packed.ids, packed.loss, packed.docs, packed.parents, strict=True):
        for number in range(1, numbers.max() + 1):
            own = numbers == number
            parent = int(parents[own][0])
            stem = numbers == parent if parent else np.zeros_like(own)
            if not parent and (parents == number).any():
                continue  # a stem is a document only with its continuations
            found.append(([*ids[stem], *ids[own]], [*loss[stem], *loss[own]]))
    assert sorted((list(map(int, i)), list(map(int, m))) for i, m in found) == sorted([*docs, *alone])
    assert own_tokens([*docs, *alone], 256) == [20] * 7 + [3]


def test_a_prefix_without_room_is_refused() -> None:
    with pytest.raises(FullarcError, match="leaves no room"):
        pack_best_fit([(list(range(40)), [1] * 40)] * 2, 32, shared=32)
