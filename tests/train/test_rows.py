"""The loader's order, position and target alignment, against loops written out."""

import numpy as np
import pytest
import torch

from fullarc.config.errors import FullarcError
from fullarc.train import Batch, Rows


def ids(batch):
    return batch.ids_BT.tolist()


def test_an_epoch_visits_every_row_once_and_epochs_differ(make_rows):
    rows = Rows(make_rows(n=12), batch=4, seed=3)
    first = [row for _ in range(3) for row in ids(rows.next())]
    second = [row for _ in range(3) for row in ids(rows.next())]
    everything = sorted(ids(rows.at(list(range(12)))))
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_a_batch_may_span_epochs_and_exceed_the_folder(make_rows):
    rows = Rows(make_rows(n=5), batch=12, seed=0)
    assert rows.next().ids_BT.shape[0] == 12
    assert (rows.epoch, rows.cursor) == (2, 2)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 11])
def test_the_position_resumes_exactly(make_rows, steps):
    folder = make_rows(n=10)
    straight, before = Rows(folder, 4, 7), Rows(folder, 4, 7)
    for _ in range(steps):
        straight.next(), before.next()
    after = Rows(folder, 4, 7)
    after.load_state(before.state())
    for _ in range(6):
        assert ids(after.next()) == ids(straight.next())


def test_another_seed_is_another_order(make_rows):
    folder = make_rows(n=10)
    assert ids(Rows(folder, 10, 1).next()) != ids(Rows(folder, 10, 2).next())


def test_held_rows_are_never_in_the_stream(make_rows):
    rows = Rows(make_rows(n=10), batch=8, seed=0, held=2)
    held = ids(rows.held_rows())
    seen = [row for _ in range(4) for row in ids(rows.next())]
    assert len(held) == 2 and not [row for row in held if row in seen]


def test_held_rows_lie_apart_as_the_longest_documents_come_first(make_rows):
    rows = Rows(make_rows(n=10), batch=8, seed=0, held=3)
    assert ids(rows.held_rows()) == ids(rows.at([0, 3, 6]))
    assert len(rows) == 7


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("shift", [1, 2, 4, 40])
def test_targets_equal_the_loop(make_rows, isolate, shift):
    batch = Rows(make_rows(isolate=isolate), 6, 0).next()
    targets, mask = batch.targets(shift)
    n, length = batch.ids_BT.shape
    for row in range(n):
        for t in range(length):
            s = t + shift
            docs, trained = batch.docs_BT[row].tolist(), batch.loss_BT[row].tolist()
            expected = s < length and docs[t] > 0 and trained[s]
            if isolate or shift > 1:
                expected = expected and docs[t] == docs[s]
            assert bool(mask[row, t]) == bool(expected)
            if expected:
                assert targets[row, t] == batch.ids_BT[row, s]


def test_documents_are_hidden_from_attention_only_when_isolated(make_rows):
    assert Rows(make_rows("a", isolate=True), 2, 0).next().structure["doc_ids"] is not None
    assert Rows(make_rows("b", isolate=False), 2, 0).next().structure["doc_ids"] is None


def test_bad_folders_are_named(make_rows, tmp_path):
    with pytest.raises(FullarcError, match=r"token id \d+ \(row \d+, position \d+\) is outside .* 40"):
        Rows(make_rows("big"), 2, 0, vocab_size=40)
    with pytest.raises(FullarcError, match="token id 63 .* vocabulary of 63"):
        Rows(make_rows("big"), 2, 0, vocab_size=63)
    Rows(make_rows("big"), 2, 0, vocab_size=64)
    with pytest.raises(FullarcError, match="holds no rows"):
        empty = np.zeros((0, 8), np.uint16)
        Rows(make_rows("empty", ids=empty, loss=empty, docs=empty), 2, 0)
    with pytest.raises(FullarcError, match="no token is a training target"):
        Rows(make_rows("masked", n=4, loss=np.zeros((4, 32), np.uint8)), 2, 0)
    with pytest.raises(FullarcError, match="one shape"):
        Rows(make_rows("uneven", n=4, docs=np.ones((4, 31), np.uint16)), 2, 0)
    with pytest.raises(FullarcError, match="nothere is not a readable folder"):
        Rows(tmp_path / "nothere", 2, 0)
    with pytest.raises(FullarcError, match="data changed"):
        Rows(make_rows("other", n=6), 2, 0).load_state({"epoch": 0, "cursor": 0, "rows": 7, "length": 32})


def test_micro_batches_are_the_batch_in_order():
    t = torch.arange(12).view(6, 2)
    parts = Batch(t, t > 0, t + 1, t * 0, True).split(4)
    assert [len(p.ids_BT) for p in parts] == [4, 2]
    assert torch.equal(torch.cat([p.docs_BT for p in parts]), t + 1)
