"""The engine's bench measures the same work on both sides."""

import argparse

import pytest
import torch

from fullarc.evals import bench_engine
from fullarc.evals.bench_engine import Ours, Theirs, prompts
from fullarc.model import GlmMoeDsa, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = bench_engine.TINY.model_copy(update={"num_hidden_layers": 2, "max_position_embeddings": 2048})
    path = tmp_path_factory.mktemp("bench") / "model"
    save_model(GlmMoeDsa(small).init_weights(0), path)
    return path


def test_both_sides_decode_the_same_tokens(folder):
    ids = prompts(2, 40, 4096)
    ours, theirs, tokens = Ours(folder, 2, 40), Theirs(folder), []
    ours.start(ids)
    theirs.start(ids)
    tokens.append(theirs.next)
    forward = theirs.model.forward
    for _ in range(bench_engine.STEPS):
        with torch.inference_mode():
            out = forward(theirs.next, past_key_values=theirs.cache, use_cache=True)
        theirs.next = out.logits[:, -1:].argmax(-1)
        tokens.append(theirs.next)
    ours.decode()
    assert [request.output for request in ours.requests] == torch.cat(tokens, 1).tolist()


def test_without_a_checkpoint_the_claims_about_drafts_are_left_open():
    assert {c["ok"] for c in bench_engine.drafts(None)} == {None}
    parser = argparse.ArgumentParser()
    bench_engine.options(parser)
    assert parser.parse_args(["--part", "long"]).part == ["long"]
