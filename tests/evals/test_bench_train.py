"""The bench of a training step, at a size that takes seconds: its parts against counts made by hand."""

import pytest
import torch

from fullarc.config.model import preset
from fullarc.evals import bench, bench_train


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_train, "ROWS", 2)
    monkeypatch.setattr(bench_train, "LARGE_BATCH", 2)
    monkeypatch.setattr(bench_train, "LENGTH", 16)


@pytest.mark.slow
def test_every_claim_is_measured_for_every_size():
    found = list(bench_train.claims(("nano",), repeats=1))
    assert [claim["unit"] for claim in found] == ["x", "%", "x", "%"]
    assert "x if it were products alone" in found[0]["detail"][0]
    assert all(claim["value"] > 0 and isinstance(claim["ok"], bool) for claim in found)
    share = found[1]
    assert share["value"] < 100, "the products are a part of the step"
    text = bench.table({"area": "train", "machine": {"cpu": "c", "cores": 2, "memory_gb": 1, "torch": "t"},
                        "claims": found})  # fmt: skip
    assert "tokens/s against" in text


def test_a_part_of_a_size_is_all_that_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_train, "SIZES", ("nano", "2m"))
    asked = ["train", "--size", "nano", "--part", "optimizer", "--part", "products", "--save"]
    bench.main(asked)
    kept = [one["name"] for one in bench.stored("train")["claims"]]
    assert kept == [
        "training step, nano: share of the time that its products take alone",
        "optimizer's share of a step of 32 tokens, nano",
    ]
    assert all(name in capsys.readouterr().err for name in kept[:1])
    with pytest.raises(SystemExit):
        bench.main(["train", "--size", "5m"])


def test_without_a_size_those_of_the_claim_are_measured_and_others_kept(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    measured = []

    def claimed(sizes, parts):
        measured.extend(sizes)
        return iter([bench.claim(f"step, {size}", 1.0, "x", "", None) for size in sizes])

    monkeypatch.setattr(bench_train, "claims", claimed)
    bench.main(["train", "--size", "2m", "--save"])
    bench.main(["train", "--save"])
    assert measured == ["2m", "1m", "5m", "20m"]
    assert [one["name"] for one in bench.stored("train")["claims"]] == [f"step, {size}" for size in measured]


def test_products_are_counted_with_their_layout():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    with bench_train.Products() as products:
        torch.mm(a, b.T)
        torch.mm(a, b.T)
        torch.relu(a)
        torch.bmm(a[None], b.T[None])
        torch.zeros(3, 5).addmm_(a, b.T)
    counts = {key[0].overloadpacket.__name__: count for key, count in products.seen.items()}
    assert counts == {"mm": 2, "bmm": 1, "addmm_": 1}
    (_, (_, right), _) = next(key for key in products.seen if key[0].overloadpacket.__name__ == "mm")
    assert bench_train._made(right).stride() == (1, 4) and bench_train._made(right).shape == (4, 5)
    assert products.seconds_alone(1) > 0


@pytest.mark.slow
def test_both_sides_train_the_same_number_of_weights():
    ours = bench_train.Ours(preset("nano"), 2, 1).trainer.model
    theirs = bench_train.Theirs(preset("nano"), 2, 1).model
    count = sum(p.numel() for n, p in ours.named_parameters() if not n.startswith("mtp_layer"))
    assert count == sum(p.numel() for p in theirs.parameters())
