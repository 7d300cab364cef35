"""The bench of sparse attention at lengths that take seconds."""

import pytest

from fullarc.evals import bench, bench_dsa


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
    assert [claim["unit"] for claim in found] == ["x", "x", "x", "x", "tokens"] * 2
    assert [claim["ok"] is None for claim in found] == [True, False, False, False, False] * 2
    assert all(claim["value"] > 0 for claim in found if claim["unit"] == "x")
    text = bench.table({"area": "dsa", "machine": {"cpu": "c", "cores": 2, "memory_gb": 1, "torch": "t"},
                        "claims": found})  # fmt: skip
    assert "by arithmetic" in text and "peak memory" in text


def test_a_part_is_measured_alone_and_judged_at_the_longest_row_only(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def measured(length, topk, training, repeats):
        asked.append((length, training))
        return bench_dsa.Measured(length, (3.0, 1.0 if length > 4096 else 4.0), (100.0, 50.0))

    monkeypatch.setattr(bench_dsa, "_measured", measured)
    assert (
        bench.main(["dsa", "--part", "training step", "--length", "8192", "--length", "4096", "--save"]) == 0
    )
    assert asked == [(4096, True), (8192, True)]
    told = capsys.readouterr().err
    assert (
        told.index("training step at 4,096") < told.index("training step at 8,192")
        and "longest row" not in told
    )
    whole = bench.run("dsa")["claims"]
    by_name = {one["name"]: one for one in whole}
    assert len(whole) == 14 and len(bench.stored("dsa")["claims"]) == 3
    assert by_name["prefill: the longest row that dense attention is faster on"]["value"] == 4096
    judged = [one["name"] for one in whole if one["unit"] == "x" and one["target"] == ">= 2"]
    assert judged == [f"{part} at 32,768: sparse against dense attention" for part in bench_dsa.PARTS]
