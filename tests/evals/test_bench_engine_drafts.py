"""Drafts are asked about what a run was not trained on, and timed on the same answers."""

import pytest

from fullarc.chat import Message, Tokenizer, render
from fullarc.config.recipe import load_recipe
from fullarc.config.runfolder import RESOLVED
from fullarc.config.show import to_toml
from fullarc.engine import mtp_accept_length
from fullarc.evals import bench_engine_drafts as bench
from fullarc.evals import bench_engine_peers
from fullarc.model import GlmMoeDsa, save_model
from fullarc.tasks import families, get, instance_seed

FAMILIES = {"reasoning": ["extreme", "lookup"], "terminal": ["count_lines"], "general": ["upper"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    resolved = load_recipe(None, [f"tasks.families.{kind}={names!r}" for kind, names in FAMILIES.items()])
    (run / RESOLVED).write_text(to_toml(resolved))
    path = run / "stages" / "sft" / "checkpoint"
    path.mkdir(parents=True)
    tok = Tokenizer.train(["Count the lines of a file. What is the largest of these numbers? " * 3], 400)
    config = bench_engine_peers.TINY.model_copy(
        update={"vocab_size": tok.vocab_size, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    )
    save_model(GlmMoeDsa(config).init_weights(1), path)
    tok.save(path)
    return path


def test_each_family_is_asked_what_training_never_shows(checkpoint, monkeypatch):
    monkeypatch.setattr(bench, "QUESTIONS", 3)
    asked, tok = bench.questions(checkpoint), Tokenizer.load(checkpoint)
    assert {kind: len(ids) for kind, ids in asked.items()} == {"reasoning": 4, "terminal": 3, "general": 3}
    for kind, names in FAMILIES.items():
        assert set(names) <= set(families(kind, "trained"))
        assert instance_seed("eval", names[0], 2) & 1  # odd seeds are never trained on
        one = get(names[-1]).sample(instance_seed("eval", names[-1], 1))
        messages = [Message.from_openai(message) for message in one.messages]
        expected = render(tok, messages, tools=one.tools or None, add_generation_prompt=True).ids
        assert list(expected) in asked[kind]


@pytest.mark.slow
def test_accept_length_and_time_are_of_the_same_answers(checkpoint, monkeypatch):
    monkeypatch.setattr(bench, "QUESTIONS", 2)
    monkeypatch.setattr(bench, "NEW_TOKENS", 12)
    monkeypatch.setattr(bench, "REPEATS", 1)
    length, speed = bench.claims(checkpoint)
    prompts = [ids for kind in bench.questions(checkpoint).values() for ids in kind]
    # another loop, without stop ids, which a model with random weights does not meet here
    expected = mtp_accept_length(checkpoint, prompts, bench.DRAFTS, bench.NEW_TOKENS).mean
    assert length["value"] == pytest.approx(expected, abs=1e-3) and length["ok"] is (expected >= 2.76)
    assert length["detail"][0].count("reasoning") == 1 and speed["value"] > 0
    assert "the same tokens" in speed["detail"][0]

    decode = bench.Side.decode

    def other(side, prompts):
        taken = decode(side, prompts)
        side.answers = [[*ids, side.engine.scheduler.drafter is None] for ids in side.answers]
        return taken

    monkeypatch.setattr(bench.Side, "decode", other)
    _, speed = bench.claims(checkpoint)
    assert speed["ok"] is False and "OTHER TOKENS" in speed["detail"][0]


def test_without_a_checkpoint_the_claims_are_left_open():
    assert {claim["ok"] for claim in bench.claims(None)} == {None}
