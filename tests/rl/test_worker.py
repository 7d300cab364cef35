"""Prompts of a batch, and the worker's batches against a scripted engine."""

from collections import Counter
from types import SimpleNamespace

import httpx
import pytest
from rl_support import nano, save_model, settings, tokenizer

from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.stages import SandboxSettings, TaskSettings
from fullarc.rl.prompts import family_weights, prompts
from fullarc.rl.rollouts import batch_path
from fullarc.rl.stages import run_reasoning
from fullarc.rl.worker import Sampler, WorkerJob
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.ledger import Ledger
from fullarc.rollout.trajectory import read_trajectories
from fullarc.tasks import families, get, split_of

TOK = tokenizer()


def test_weights_of_kinds_are_shared_by_their_trained_families():
    weights = family_weights({"general": 0.75, "reasoning": 0.25}, ["terminal"])
    general = families("general", "trained")
    assert weights[general[0]] == pytest.approx(0.75 / len(general)) and sum(
        weights.values()
    ) == pytest.approx(1)
    assert list(family_weights({}, ["terminal"])) == families("terminal", "trained")
    chosen = {"general": ["json", "upper"]}
    assert family_weights({"general": 1.0}, [], chosen) == {"json": 0.5, "upper": 0.5}
    with pytest.raises(FullarcError, match="bullets"):
        family_weights({"bullets": 1.0}, [], chosen)
    held_out = families("reasoning", "held_out")[0]
    for mix in ({"nonsense": 1.0}, {held_out: 1.0}, {"general": -1.0}, {"general": 0.0}):
        with pytest.raises(FullarcError):
            family_weights(mix, [])


def test_a_stage_asks_the_families_of_its_run_only(tmp_path):
    save_model(nano(), tmp_path / "model")
    recipe = SimpleNamespace(tasks=TaskSettings(families={"reasoning": ["count"]}))
    stage = settings(mix={"rotate": 1.0})
    with pytest.raises(FullarcError, match='"rotate" in the mix is not'):
        run_reasoning(StageContext(recipe, stage, "rl", tmp_path, tmp_path / "rl", tmp_path / "model", 0))


def test_prompts_are_a_function_of_the_seed_and_keep_the_shares():
    weights = {"add": 0.5, "count": 0.3, "json": 0.2}
    chosen = prompts(weights, 20, 1, "rl", 3)
    assert chosen == prompts(weights, 20, 1, "rl", 3)
    assert chosen != prompts(weights, 20, 1, "rl", 4) and chosen != prompts(weights, 20, 2, "rl", 3)
    for batch in range(10):
        counts = Counter(instance.family for instance in prompts(weights, 20, 1, "rl", batch))
        assert all(abs(counts[family] - 20 * weight) <= 1 for family, weight in weights.items())
    assert all(
        split_of(instance.seed) == "train" and get(instance.family).held_out is False for instance in chosen
    )
    few = Counter(instance.family for batch in range(200) for instance in prompts(weights, 1, 1, "rl", batch))
    assert few["add"] > few["count"] > few["json"] > 10


def job(tmp_path, **changes):
    values = {
        "stage": "rl", "seed": 0, "families": {"add": 1.0}, "prompts": 2, "group_size": 3, "temperature": 1.0,
        "max_new_tokens": 30, "max_len": 400, "max_turns": 3, "concurrency": 8, "stall_s": 30.0,
        "tokenizer": "", "ledger": "", "sandbox": SandboxSettings().model_dump(), "out": str(tmp_path / "out"),
    } | changes  # fmt: skip
    return WorkerJob(**values)


def engine(reply=None):
    """Says `reply`, or "<think>…</think>" and a number that depends on the seed."""

    def script(prompt, params):
        text = reply or f"</think>{params['sampling_seed'] % 9}"
        ids = []
        for i, part in enumerate(text.split("</think>")):
            ids += ([TOK.id("</think>")] if i else []) + TOK.encode(part)
        return [*ids, TOK.id("<|user|>")]

    return FakeEngine(script, TOK.stop_ids)


async def sample(job, fake, order, ledger=None):
    async with EngineClient("http://engine", transport=httpx.ASGITransport(fake.app), retries=0) as client:
        return await Sampler(job, client, TOK).batch(order, ledger)


async def test_a_batch_is_sampled_by_its_version_and_settled(tmp_path):
    fake, this = engine(), job(tmp_path)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        said = await sample(this, fake, {"batch": 4, "weights": "w", "version": 3}, ledger)
        ledger.check("rl", 4, 2, 3)
    assert said["event"] == "batch" and fake.version == 3
    records = read_trajectories(batch_path(tmp_path / "out", 4))
    assert [(t.key.group, t.key.sample) for t in records] == [(g, s) for g in range(2) for s in range(3)]
    assert all(set(t.turns[0].versions) == {3} and t.meta["kind"] == "reasoning" for t in records)
    assert {t.outcome.kind for t in records} == {"reward"}
    before = len(fake.prompts)
    await sample(this, fake, {"batch": 4, "weights": "w", "version": 3})
    assert len(fake.prompts) == before, "a batch on disk is not sampled again"


async def test_the_same_order_gives_the_same_tokens(tmp_path):
    order = {"batch": 1, "weights": "w", "version": 0}
    tokens = []
    for name in ("a", "b"):
        await sample(job(tmp_path, out=str(tmp_path / name)), engine(), order)
        records = read_trajectories(batch_path(tmp_path / name, 1))
        tokens.append([(t.instance_seed, t.turns[0].prompt_ids, t.turns[0].completion_ids) for t in records])
    assert tokens[0] == tokens[1] and len({str(t[2]) for t in tokens[0]}) > 1


async def test_a_failing_engine_leaves_no_file(tmp_path):
    fake = engine()
    fake.fail = [500] * 50
    with pytest.raises(FullarcError, match="engine"):
        await sample(job(tmp_path), fake, {"batch": 0, "weights": "w", "version": 0})
    assert not batch_path(tmp_path / "out", 0).exists()


async def test_kinds_mix_in_one_batch_and_agents_get_a_sandbox(tmp_path):
    mixed = job(tmp_path, families={"count_lines": 0.5, "add": 0.5}, group_size=2)
    await sample(mixed, engine("</think>Done."), {"batch": 0, "weights": "w", "version": 0})
    records = read_trajectories(batch_path(tmp_path / "out", 0))
    assert Counter((t.meta["kind"], t.outcome.kind) for t in records) == {
        ("terminal", "reward"): 2,
        ("reasoning", "reward"): 2,
    }
    assert all(t.tools for t in records if t.meta["kind"] == "terminal")
