"""The top-k that makes training and decoding agree (docs/topk.md)."""

import re
from pathlib import Path

import pytest
import torch

from fullarc.engine import Engine
from fullarc.evals import bench, bench_topk
from fullarc.model import save_model
from fullarc.model.indexer import select

PAGE = Path(__file__).parents[2] / "docs/topk.md"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_and_decoding_agree_with_a_rule_for_ties_and_not_without(seed: int) -> None:
    model, ids = bench_topk.example(seed)
    apart, agree = bench_topk.compare(model, ids, select)
    assert apart <= bench_topk.CLOSE and agree == 1
    apart, agree = bench_topk.compare(model, ids, bench_topk.by_torch)
    assert apart > 0.1 and agree < 0.5


@pytest.mark.slow
def test_both_are_the_trainer_and_the_engine(tmp_path: Path) -> None:
    """The page's two ways against the code that trains and the code that serves."""
    model, ids = bench_topk.example()
    with torch.no_grad():
        trained = model(ids[None]).logits[0]
    assert torch.allclose(bench_topk.logits(model, ids, len(ids), select), trained, atol=bench_topk.CLOSE)
    save_model(model, tmp_path / "model")
    served = Engine(tmp_path / "model", max_batch=1, max_len=512, chunk_tokens=16).score([ids.tolist()])[0]
    steps = bench_topk.logits(model, ids, 1, select).log_softmax(-1)
    assert served[1:] == pytest.approx(steps[:-1].gather(1, ids[1:, None])[:, 0].tolist(), abs=1e-4)


def test_the_choice_of_torch_is_the_same_but_for_ties() -> None:
    scores = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(4, 50, dtype=torch.bool)
    allowed[2, 10:] = False
    for k in (8, 60):
        assert torch.equal(bench_topk.by_torch(scores, allowed, k), select(scores, allowed, k))


@pytest.mark.slow
def test_the_page_says_what_the_bench_finds() -> None:
    found = bench.run("topk")["claims"]
    assert [claim["ok"] for claim in found] == [True, True, None, None]
    agree = re.search(r"torch\.topk.*\| (\d+) % \|", PAGE.read_text())
    assert agree and abs(float(agree[1]) - found[3]["value"]) < 5
