"""The bench of sparse attention at lengths that take seconds."""

import pytest

from fullarc.evals import bench, bench_dsa
from fullarc.model import GlmMoeDsa
from fullarc.train.parallel import ALONE


def test_arithmetic_by_hand():
    # dense 16 heads x (64 + 64) = 2,048 a pair, indexer 8 x 32 = 256, chosen 512 x 16 x (256 + 16)
    assert bench_dsa.arithmetic(32768, 512) == pytest.approx(16384 * 2048 / (16384 * 256 + 512 * 16 * 272))
    assert bench_dsa.arithmetic(10**9, 512) == pytest.approx(8, rel=1e-3), "what is left is the indexer"
    # pairs x (2,048 - 256) = 512 x 16 x 272
    assert bench_dsa.crossover(512) == pytest.approx(2 * 512 * 16 * 272 / 1792, abs=64)


@pytest.mark.slow
def test_every_length_is_measured_both_ways(monkeypatch):
    monkeypatch.setattr(bench_dsa, "LENGTHS", (64, 256))
    found = list(bench_dsa.claims((64, 256), topk=16, repeats=1))
    # prefill; frozen, with the KL and the warm-up in turn at both lengths, then each one's memory and crossover
    units = ["x"] * 4 + ["tokens"] + ["x"] * 6 + ["x", "x", "tokens"] * 2 + ["x", "x"]
    told = [True, *[False] * 4, *[True] * 3, False, False, True, *[False] * 6, True, False]
    assert [claim["unit"] for claim in found] == units
    assert [claim["ok"] is None for claim in found] == told
    assert all(claim["value"] > 0 for claim in found if claim["unit"] == "x")
    text = bench.table({"area": "dsa", "machine": {"cpu": "c", "cores": 2, "memory_gb": 1, "torch": "t"},
                        "claims": found})  # fmt: skip
    assert "by arithmetic" in text and "peak memory" in text


@pytest.mark.parametrize("part", bench_dsa.PARTS)
def test_what_learns_in_a_pass_is_what_its_side_says(part, monkeypatch):
    """By watching the gradients of one pass: none in prefill, the indexer's only where its KL is taken."""
    models = []

    class Kept(GlmMoeDsa):
        def __init__(self, config):
            super().__init__(config)
            models.append(self)

    monkeypatch.setattr(bench_dsa, "GlmMoeDsa", Kept)
    for side in bench_dsa.SIDES[part]:
        seconds, mb = bench_dsa.one_pass(ALONE, 96, 16, side, 1)
        assert seconds > 0 and mb > 0
        net = models.pop()
        assert net.config.index_topk == (16 if side.sparse else 96)
        moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any(".indexer." in name for name in moved) == side.indexer
        assert any(".indexer." not in name for name in moved) == side.model
    names = [side.name for side in bench_dsa.SIDES[part]]
    learning = [(side.sparse, side.model, side.indexer) for side in bench_dsa.SIDES[part]]
    if part == bench_dsa.TRAINING:
        assert names == ["dense", bench_dsa.FROZEN, bench_dsa.ADAPTATION, bench_dsa.WARM_UP]
        assert learning == [
            (False, True, False),
            (True, True, False),
            (True, True, True),
            (False, False, True),
        ]


def test_a_part_is_measured_alone_and_judged_at_the_longest_row_only(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def measured(length, topk, part, repeats):
        asked.append((length, part))
        one = bench_dsa.Measured(length, (3.0, 1.0 if length > 4096 else 4.0), (100.0, 50.0))
        return dict.fromkeys(bench_dsa.SIDES[part][1:], one)

    monkeypatch.setattr(bench_dsa, "_measured", measured)
    assert (
        bench.main(["dsa", "--part", "training step", "--length", "8192", "--length", "4096", "--save"]) == 0
    )
    assert asked == [(4096, "training step"), (8192, "training step")]
    told = capsys.readouterr().err
    assert (
        told.index("training step at 4,096") < told.index("training step at 8,192")
        and "longest row" not in told
    )
    whole = bench.run("dsa")["claims"]
    by_name = {one["name"]: one for one in whole}
    assert len(whole) == 4 * 7 - 1 and len(bench.stored("dsa")["claims"]) == 3 * 3
    assert by_name["prefill: the longest row that dense attention is faster on"]["value"] == 4096
    judged = [one["name"] for one in whole if one["unit"] == "x" and one["target"] == ">= 2"]
    sparse = (bench_dsa.PREFILL, bench_dsa.FROZEN, bench_dsa.ADAPTATION)
    assert judged == [f"{name} at 32,768: sparse against dense attention" for name in sparse]
