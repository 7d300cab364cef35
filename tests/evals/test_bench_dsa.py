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
def test_every_length_is_measured_both_ways():
    found = bench_dsa.claims((64, 256), 16, 1)
    assert [claim["unit"] for claim in found] == ["x", "x", "x", "x", "tokens"] * 2
    assert [claim["ok"] is None for claim in found] == [True, False, False, False, False] * 2
    assert all(claim["value"] > 0 for claim in found if claim["unit"] == "x")
    text = bench.table({"area": "dsa", "machine": {"cpu": "c", "cores": 2, "memory_gb": 1, "torch": "t"},
                        "claims": found})  # fmt: skip
    assert "by arithmetic" in text and "peak memory" in text
