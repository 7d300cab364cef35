"""Demonstrations: real, repeatable, only trained families, mistakes masked."""

import json
from types import SimpleNamespace

import pytest

from fullarc.chat import Message
from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.runfolder import CONVERSATIONS, LANGUAGE
from fullarc.config.stages import SFT, SandboxSettings, TaskSettings
from fullarc.tasks import Reward, demos, families, get, split_of
from fullarc.tasks.demos import run_stage, write_language


def calls(conversation) -> list[str]:
    found = []
    for message in conversation["messages"]:
        found += [call["function"]["arguments"]["command"] for call in message.get("tool_calls", [])]
    return found


def test_terminal_demonstrations_are_real_and_repeatable():
    made = demos("terminal", 24, seed=3, check_every=4)
    assert made == demos("terminal", 24, seed=3, check_every=0)
    assert {conversation["family"] for conversation in made} == set(families("terminal"))
    for conversation in made:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles[:2] == ["system", "user"] and roles[-1] == "assistant"
        assert roles.count("tool") == len(calls(conversation)) >= 1
        assert split_of(conversation["seed"]) == "train" and conversation["tools"]
    search = next(c for c in made if c["family"] == "search")
    assert search["messages"][3]["content"] in calls(search)[1]  # the observation is what is written down
    fix = next(c for c in made if c["family"] == "fix_python")
    assert "is not defined" in fix["messages"][3]["content"] or "want" in fix["messages"][3]["content"]
    assert fix["messages"][-2]["content"] == "ok"


def test_mistakes_are_kept_masked_and_repaired():
    made = demos("terminal", 60, seed=1, check_every=0)
    flawed = [c for c in made if any(m.get("loss") == 0 for m in c["messages"])]
    assert 3 <= len(flawed) <= 18
    for conversation in flawed:
        masked = [i for i, m in enumerate(conversation["messages"]) if m.get("loss") == 0]
        assert masked == [2]
        assert (
            "o such file" in conversation["messages"][3]["content"]
            or "annot" in conversation["messages"][3]["content"]
        )
        assert calls(conversation)[1] == "ls"
        own = get(conversation["family"]).sample(conversation["seed"]).files
        listed = set(conversation["messages"][5]["content"].split())
        assert listed - {"answer.txt"} == {name.split("/")[0] for name in own}  # and nobody else's files


def test_every_message_is_one_the_chat_understands():
    for kind in ("reasoning", "terminal", "general"):
        for conversation in demos(kind, 12, seed=5, check_every=0):
            for message in conversation["messages"]:
                again = Message.from_openai(json.loads(json.dumps(message)))
                assert again.content == message["content"] and again.loss == message.get("loss")
                assert again.reasoning == message.get("reasoning_content", "")


def test_single_turn_demonstrations_are_right():
    for kind in ("reasoning", "general"):
        for conversation in demos(kind, 40, seed=2):
            task = get(conversation["family"])
            outcome = task.grade(task.sample(conversation["seed"]), conversation["messages"][-1]["content"])
            assert isinstance(outcome, Reward) and outcome.value == 1
            assert conversation["messages"][-1]["reasoning_content"]


def test_a_task_with_two_ways_is_shown_in_both():
    """How often is the caller's choice; which instance is shown how depends on its seed alone."""

    def ways(share: float, *families: str) -> dict[int, int]:
        made = demos("terminal", 24 * len(families), 4, families, check_every=5, alternatives=share)
        return {c["seed"]: len(calls(c)) for c in made if c["family"] == families[0]}

    never, half, always = (ways(share, "search") for share in (0.0, 0.5, 1.0))
    assert never.keys() == half.keys() == always.keys() and len(half) == 24
    assert all(always[seed] < never[seed] for seed in never)  # one command instead of two
    taken = [seed for seed in half if half[seed] == always[seed]]
    assert 6 <= len(taken) <= 18
    assert ways(0.5, "search", "rename") == half
    assert ways(0.0, "rename") == ways(1.0, "rename")  # it has one way
    for share, led_in in ((0.0, {True}), (0.5, {True, False}), (1.0, {False})):
        answers = [c["messages"][-1] for c in demos("reasoning", 40, 4, ["count"], alternatives=share)]
        assert {m["content"].startswith("Answer: ") for m in answers} == led_in
        assert {m["reasoning_content"].startswith("Steps: ") for m in answers} == led_in


def test_seeds_give_different_demonstrations_and_held_out_families_none():
    assert demos("reasoning", 10, seed=1) != demos("reasoning", 10, seed=2)
    assert {c["family"] for c in demos("reasoning", 10, 1, ["add", "count"])} == {"add", "count"}
    for family in families("terminal", "held_out"):
        with pytest.raises(FullarcError, match="may be trained on"):
            demos("terminal", 1, 1, [family])


def context(out, seed=1, families=None, alternatives=0.5):
    stage = SFT.model_construct(
        demos=20, mix={"reasoning": 2, "terminal": 1, "general": 1}, alternatives=alternatives
    )
    recipe = SimpleNamespace(sandbox=SandboxSettings(), tasks=TaskSettings(families=families or {}))
    return StageContext(recipe, stage, "sft", out, out / "sft", None, seed)


def test_the_stage_writes_once_and_mixes(tmp_path):
    assert run_stage(context(tmp_path)) == {"demos": 20}
    file = tmp_path / "sft" / CONVERSATIONS
    first = file.read_bytes()
    kinds = [json.loads(line)["kind"] for line in first.splitlines()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"reasoning": 10, "terminal": 5, "general": 5}
    assert kinds != sorted(kinds)
    before = file.stat().st_mtime_ns
    run_stage(context(tmp_path))
    assert file.stat().st_mtime_ns == before
    file.unlink()
    run_stage(context(tmp_path))
    assert file.read_bytes() == first
    few = context(
        tmp_path / "few", families={"terminal": ["rename"], "reasoning": ["count"], "general": ["json"]}
    )
    run_stage(few)
    lines = (few.out / CONVERSATIONS).read_text().splitlines()
    assert {json.loads(line)["family"] for line in lines} == {"rename", "count", "json"}
    chosen = {"terminal": ["search"], "reasoning": ["count"], "general": ["json"]}
    for share, seen in ((0.0, {False}), (1.0, {True})):  # the stage's setting arrives
        ctx = context(tmp_path / f"share{share}", families=chosen, alternatives=share)
        run_stage(ctx)
        shown = [json.loads(line) for line in (ctx.out / CONVERSATIONS).read_text().splitlines()]
        at_once = {"grep -l" in calls(c)[-1] for c in shown if c["kind"] == "terminal"}
        assert at_once == seen


def test_the_tokenizer_hears_what_the_chosen_families_say(tmp_path):
    chosen = {"terminal": ["rename"], "reasoning": ["rotate"], "general": ["json"]}
    texts = []
    for name, names in (("a", chosen), ("b", chosen), ("c", None)):
        ctx = context(tmp_path / name, families=names)
        ctx.out.mkdir(parents=True)
        write_language(ctx)
        texts.append((ctx.out / LANGUAGE).read_text())
    assert texts[0] == texts[1]
    for words, heard in (
        ("mv ", True),
        ("go last", True),
        ("JSON", True),
        ("grep -c", False),
        ("awk", False),
    ):
        assert (words in texts[0]) is heard, words
        assert words in texts[2], "all families speak where none are chosen"
