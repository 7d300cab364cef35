"""The engine's bench measures the same work on both sides."""

import argparse

import pytest
import torch

from fullarc.engine.backend import forward_pass, prepare
from fullarc.engine.core import Chunk
from fullarc.evals import bench_engine, bench_engine_peers, bench_engine_vllm
from fullarc.evals.bench_engine_peers import LLAMA, TRANSFORMERS, Case, Ours, Theirs, prompts
from fullarc.model import GlmMoeDsa, load_model, save_model


def made(path, seed=0):
    small = bench_engine_peers.TINY.model_copy(
        update={"num_hidden_layers": 2, "max_position_embeddings": 2048}
    )
    save_model(GlmMoeDsa(small).init_weights(seed), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("bench") / "model")


def test_both_sides_decode_the_same_tokens(folder):
    ids = prompts(2, 40, 4096)
    ours, theirs, tokens = Ours(folder, 2, 40), Theirs(folder), []
    ours.start(ids)
    theirs.start(ids)
    tokens.append(theirs.next)
    forward = theirs.model.forward
    for _ in range(bench_engine_peers.STEPS):
        with torch.inference_mode():
            out = forward(theirs.next, past_key_values=theirs.cache, use_cache=True)
        theirs.next = out.logits[:, -1:].argmax(-1)
        tokens.append(theirs.next)
    ours.decode()
    assert [request.output for request in ours.requests] == torch.cat(tokens, 1).tolist()


def test_a_part_can_be_named():
    parser = argparse.ArgumentParser()
    bench_engine.options(parser)
    assert parser.parse_args(["--part", "long"]).part == ["long"]


def test_a_side_that_computes_something_else_does_not_agree(folder, tmp_path):
    told = bench_engine_peers._agreement("tiny", TRANSFORMERS, folder, Theirs(folder))
    assert told["ok"] and told["value"] < 100 and told["detail"] == ["32 of 32 next tokens alike; fp32"]
    assert not bench_engine_peers._agreement("tiny", TRANSFORMERS, folder, Theirs(made(tmp_path / "x", 1)))[
        "ok"
    ]


def test_every_case_is_claimed_against_every_side(folder, monkeypatch):
    monkeypatch.setattr(bench_engine_peers, "REPEATS", 1)
    targets = {TRANSFORMERS: 1e-9, LLAMA: 2.0}
    monkeypatch.setattr(
        bench_engine_peers, "CASES", (Case(2, 32, targets, None), Case(1, 300, None, targets))
    )
    claims = list(bench_engine_peers.against("tiny", folder, None))[1:]
    assert [(one["name"], one["ok"]) for one in claims] == [
        ("tiny: decode, batch 2, context 32: against transformers", True),
        ("tiny: decode, batch 2, context 32: against llama.cpp", None),
        ("tiny: prefill 300: against transformers", True),
        ("tiny: prefill 300: against llama.cpp", None),
    ]
    assert claims[1]["detail"] == ["needs --peers"]


def test_a_side_that_does_not_agree_is_not_timed(folder, tmp_path, monkeypatch):
    class Wrong(Theirs):
        def __init__(self, _):
            super().__init__(made(tmp_path / "wrong", 1))

        def prefill(self, batch):
            raise AssertionError("it must not be timed")

        start = decode = prefill

    monkeypatch.setattr(bench_engine_peers, "Theirs", Wrong)
    targets = {TRANSFORMERS: 1e-9, LLAMA: 2.0}
    monkeypatch.setattr(bench_engine_peers, "CASES", (Case(2, 32, targets, targets),))
    agreed, *claims = bench_engine_peers.against("tiny", folder, None)
    assert agreed["ok"] is False
    for against_transformers, against_llama in (claims[:2], claims[2:]):
        assert (against_transformers["ok"], against_transformers["value"]) == (False, None)
        assert against_transformers["detail"] == ["not timed: it does not compute what ours does"]
        assert against_llama["ok"] is None


def test_a_side_that_measures_itself_is_believed():
    calls = []
    taken = bench_engine.in_turn([lambda: calls.append(0), lambda: 7.0], 3, warm=False)
    assert taken[1] == 7.0 and taken[0] < 1 and len(calls) == 3


def test_where_the_choice_is_everything_sparse_is_dense(folder):
    """What `long` compares: one model with its own top-k and with one that sees all, on the same cache."""
    model = load_model(folder)
    config = model.config
    core = forward_pass(prepare(model), 1, 600)
    model.config = config.model_copy(update={"index_topk": 4096})
    dense = forward_pass(prepare(model), 1, 600)
    width = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim
    kept = torch.randn(2, 512, width, generator=torch.Generator().manual_seed(0))
    for one in (core, dense):
        one.cache.write(0, 0, kept)
    for position, same in ((200, True), (500, False)):
        a, b = (one.forward([Chunk(0, position, [1])])[0] for one in (core, dense))
        assert torch.allclose(a, b, atol=1e-4) == same


@pytest.mark.slow
def test_every_way_of_sampling_is_measured(folder):
    told = bench_engine.sampling(folder, streams=2, new=4)
    assert [claim["target"] for claim in told] == [">= 0.75", ">= 0.75", "> 1"]
    assert told[2]["value"] > 0 and told[2]["ok"] == (told[2]["value"] > 1)


def test_vllm_runs_a_model_of_the_size_and_is_asked_for_by_name():
    ours = bench_engine_peers.TINY.parameter_count() / 1e6
    shape = bench_engine_vllm.GLM4_MOE
    d, layers, heads, head = (
        shape[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    )
    attention = d * head * (2 * heads + 2 * shape["num_key_value_heads"])
    experts = 3 * d * shape["moe_intermediate_size"] * (shape["n_routed_experts"] + 1)
    theirs = (
        2 * shape["vocab_size"] * d
        + layers * attention
        + (layers - 1) * experts
        + 3 * d * shape["intermediate_size"]
    )
    assert theirs / 1e6 == pytest.approx(ours, rel=0.03)
    assert bench_engine.ASKED == ("vllm", "overlap") and "vllm" not in bench_engine.PARTS
    [told] = bench_engine_vllm.claims(None, None)
    assert told["ok"] is None and told["detail"] == ["needs --peers"]
