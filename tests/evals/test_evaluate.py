"""Every bench on a tiny untrained model, and against models and engines whose answers are known."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from fullarc.chat import Message, Tokenizer, render
from fullarc.chat.grammar import json_grammar
from fullarc.config.files import atomic_dir
from fullarc.config.recipe import load_recipe
from fullarc.config.stages import EvalSettings, SandboxSettings
from fullarc.data import longctx
from fullarc.engine import Engine, Output
from fullarc.evals import episodes, language, stage
from fullarc.evals.cli import main
from fullarc.evals.scores import Scores
from fullarc.model import GlmMoeDsa, load_model, save_model
from fullarc.rollout.engine_client import EngineError, Sampling
from fullarc.rollout.episodes import Limits
from fullarc.rollout.trajectory import Outcome, Trajectory, read_trajectories
from fullarc.tasks import get, instance_seed

TEXTS = [
    f"The ledger number {i} lists {i * 7} red apples and {i} blue boxes. " * (2 + i % 3) for i in range(30)
]
SMALL = EvalSettings(
    heldout_tokens=500, problems=1, episodes=1, needle_lengths=[160, 64], needles=1, max_new_tokens=6
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/x/stages/pretrain/checkpoint of an untrained nano model with held-out documents beside it."""
    run = tmp_path_factory.mktemp("runs") / "x"
    config = load_recipe(None, ["size=nano"]).recipe.model
    tokenizer = Tokenizer.train(TEXTS, config.vocab_size)
    tokenizer.save(run / "data" / "tokenizer")
    with atomic_dir(run / "data" / "heldout") as temp:
        rows = [{"source": "s", "split": f"{s}_source", "text": t} for s in ("seen", "unseen") for t in TEXTS]
        (temp / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run / "stages" / "pretrain" / "checkpoint"
    save_model(GlmMoeDsa(config).init_weights(0), folder, run / "data" / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tok(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine(checkpoint, max_len=512)


def test_bits_per_byte_against_the_model_itself(checkpoint: Path, tok: Tokenizer, engine: Engine) -> None:
    text = "The ledger lists 12 red apples. " * 40
    score, uniform = language.bits_per_byte(engine, tok, [text], 10_000)
    ids = [tok.id("<|endoftext|>"), *tok.encode(text)]
    model, nats = load_model(checkpoint), 0.0
    for start in range(0, len(ids) - 1, language.WINDOW):
        window = torch.tensor([ids[start : start + language.WINDOW + 1]])
        logits = model(window).logits[0, :-1].detach()
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    assert len(ids) > language.WINDOW + 2, "more than one window"
    assert score.value == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert uniform == pytest.approx((len(ids) - 1) * math.log2(tok.vocab_size) / len(text.encode()))


def test_an_evaluation_computes_in_the_precision_that_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for dtype in ("fp32", "fp8"):
        asked = SMALL.model_copy(update={"dtype": dtype, "needle_lengths": [], "episodes": 0, "problems": 0})
        job = stage.Job(
            dtype, checkpoint, asked, SandboxSettings(), stage.heldout_of(checkpoint), chats=False
        )
        found[dtype] = stage.evaluate(job, tmp_path / dtype).scores
    assert found["fp32"]["bpb_seen"].value != found["fp8"]["bpb_seen"].value
    assert found["fp32"]["mtp_accept"] == found["fp8"]["mtp_accept"]


def test_bits_per_byte_counts_only_the_bytes_it_read(tok: Tokenizer, engine: Engine) -> None:
    """Cutting a document must cut its bytes too, also inside a character of several bytes."""
    text = "数据 and 苹果 " * 30
    ids = tok.encode(text)[:20]
    score, uniform = language.bits_per_byte(engine, tok, [text], 20)
    size = sum(len(tok.token_bytes(i)) for i in ids)
    assert uniform == pytest.approx(20 * math.log2(tok.vocab_size) / size)
    assert score.n == 1 and language.bits_per_byte(engine, tok, [], 20)[0].n == 0


class Oracle:
    """An engine that knows the answers of some cases; `mistake` changes their last token."""

    def __init__(self, cases: list[longctx.Case], mistake: bool = False) -> None:
        self.answers = {tuple(c.prompt_ids): [*c.answer_ids[:-1], c.answer_ids[-1] + mistake] for c in cases}

    def generate(self, prompts: list[list[int]], max_new_tokens: int, **_: object) -> list[Output]:
        return [
            Output([*self.answers[tuple(p)], 9][:max_new_tokens], [], "length", "0", 0, []) for p in prompts
        ]


def test_needles_an_oracle_finds_all_a_near_miss_and_a_random_model_none(
    tok: Tokenizer, engine: Engine
) -> None:
    cases = longctx.cases(tok, longctx.Filler(tok, TEXTS), [200, 256], 6, 1, stage.SORTS)
    assert language.find_needles(Oracle(cases), cases) == [1.0] * 12  # type: ignore[arg-type]
    assert language.find_needles(Oracle(cases, mistake=True), cases) == [0.0] * 12  # type: ignore[arg-type]
    assert language.find_needles(engine, cases) == [0.0] * 12


def test_accept_length_of_an_untrained_model_is_at_least_one(checkpoint: Path, tok: Tokenizer) -> None:
    score = language.accept_length(checkpoint, [tok.encode(text * 5) for text in TEXTS[:3]])
    assert score is not None and 1.0 <= score.value <= 5.0 and score.n == 3
    assert language.accept_length(checkpoint, [[1, 2, 3]]) is None


def test_the_oracle_of_a_family_scores_one_and_silence_zero(
    tok: Tokenizer, engine: Engine, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """Script what the engine says: the grading, the seeds and the parsing of the real path must agree with the task."""
    question = episodes.Question("add", 3)
    instance = get("add").sample(instance_seed("eval", "add", 3))
    seen: list[int | None] = []

    async def say(self: episodes.LocalEngine, ids, sampling):  # type: ignore[no-untyped-def]
        seen.append(sampling.seed)
        prompt = [Message.from_openai(message) for message in instance.messages]
        assert list(ids) == render(tok, prompt, add_generation_prompt=True).ids
        said = [*tok.encode("so"), tok.id("</think>"), *tok.encode(answer), tok.id("<|user|>")]
        return episodes.Completion(said, [0.0] * len(said), [0] * len(said), "stop", len(ids))

    monkeypatch.setattr(episodes.LocalEngine, "_one", say)
    for answer, reward in ((str(instance.meta["answer"]), 1.0), ("no", 0.0)):  # noqa: B007
        [episode] = episodes.ask_all(engine, tok, [question], Limits(32, 256, 1), 1.0, SandboxSettings())
        assert (episode.outcome.kind, episode.outcome.value) == ("reward", reward)
        assert not episode.format_errors and episode.instance_seed % 2 == 1
    assert seen[0] == seen[1], "every checkpoint is asked with the same seed"


async def test_what_would_not_be_followed_is_refused(engine: Engine) -> None:
    for sampling in (Sampling(3, form=json_grammar({}, "response_format")), Sampling(3, stop=("a",))):
        with pytest.raises(EngineError, match="no forms and no stop strings"):
            await episodes.LocalEngine(engine).generate([1, 2], sampling)


def sampled(found: list[Trajectory]) -> list[tuple[list[int], list[float], Outcome]]:
    """What must repeat to the bit; how much of a prompt was cached may depend on timing."""
    return [
        (turn.completion_ids, turn.logprobs, episode.outcome) for episode in found for turn in episode.turns
    ]


def test_answers_do_not_depend_on_what_else_is_asked(tok: Tokenizer, engine: Engine) -> None:
    wanted = episodes.Question("count", 1)
    crowd = [episodes.Question("add", i) for i in range(6)] + [episodes.Question("count", 1)]
    limits = Limits(12, 256, 1)
    [alone] = episodes.ask_all(engine, tok, [wanted], limits, 1.0, SandboxSettings())
    together = episodes.ask_all(engine, tok, crowd, limits, 1.0, SandboxSettings())
    assert sampled(together[-1:]) == sampled([alone]) and len(alone.turns[0].completion_ids) > 0
    assert [e.task for e in together] == ["add"] * 6 + ["count"]


def test_a_whole_evaluation_writes_its_files_and_repeats_itself(checkpoint: Path, tmp_path: Path) -> None:
    job = stage.Job(
        "pretrain", checkpoint, SMALL, SandboxSettings(), stage.heldout_of(checkpoint), chats=False
    )
    threads = torch.get_num_threads()
    scores = stage.evaluate(job, tmp_path / "a")
    again = stage.evaluate(job, tmp_path / "b")
    assert scores.scores == again.scores and scores.families == again.families
    first, second = (read_trajectories(tmp_path / name / "trajectories.jsonl") for name in "ab")
    assert sampled(first) == sampled(second) and len(first) > 20
    assert torch.get_num_threads() == threads
    assert set(scores.scores) == {
        "bpb_seen", "bpb_unseen", "needle_160", "reasoning_seen", "reasoning_unseen", "agent_seen", "agent_unseen",
        "general", "format_errors", "mtp_accept", "response_tokens",
    }  # fmt: skip
    assert scores["bpb_seen"].value == pytest.approx(scores.references["bpb_uniform"], rel=0.1)
    assert scores["format_errors"].value > 0.9 and scores["reasoning_seen"].value == 0.0
    assert "needle_64 multi_key" in scores.skipped and "needle_64" not in scores.scores
    assert Scores.load(tmp_path / "a/scores.json").scores == scores.scores


def test_the_families_and_settings_are_those_of_the_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families = '{terminal = ["rename"], reasoning = ["count"], general = ["json"]}'
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parents[2], run)
    sizes = [f"{k} = {json.dumps(v)}" for k, v in SMALL.model_dump().items()]
    text = f'size = "nano"\n[tasks]\nfamilies = {families}\n[eval]\n' + "\n".join(sizes) + "\n"
    (run / "recipe.resolved.toml").write_text(text)
    assert (
        main([str(run / checkpoint.relative_to(checkpoint.parents[2])), "--base", "--out", str(tmp_path)])
        == 0
    )
    asked = Scores.load(tmp_path / "scores.json").families
    assert "rename" in asked["agent"] and "search" not in asked["agent"]
    assert "count" in asked["reasoning"] and "extreme" not in asked["reasoning"]


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"eval.{k}={v}" for k, v in SMALL.model_dump().items() if k not in ("after", "temperature")]
    assert main([str(checkpoint), "size=nano", *small, "--base", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Held-out text" in out and "bits/byte" in out and (tmp_path / "scores.json").exists()
