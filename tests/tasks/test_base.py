"""Seeds, splits, outcomes and the registry."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullarc.config.errors import FullarcError
from fullarc.tasks import (
    EnvError,
    Invalid,
    Reward,
    Truncated,
    families,
    get,
    instance_seed,
    kinds,
    outcome_from_dict,
    outcome_to_dict,
    split_of,
)
from fullarc.tasks.base import Task, prompt_bit

ALL = [family for kind in kinds() for family in families(kind, "all")]


def test_there_are_enough_families_and_names_are_unique():
    assert len(ALL) == len(set(ALL))
    for kind in kinds():
        trained, held_out = families(kind), families(kind, "held_out")
        assert len(trained) >= 6 and len(held_out) >= 2 and not set(trained) & set(held_out)
        assert sorted(trained + held_out) == sorted(families(kind, "all"))
        assert all(get(family).kind == kind for family in trained)


def test_a_run_chooses_its_families():
    chosen, held_out = {"terminal": ["search", "rename"]}, families("terminal", "held_out")
    assert families("terminal", "trained", chosen) == ["search", "rename"]
    assert families("terminal", "held_out", chosen) == held_out
    assert families("terminal", "all", chosen) == ["search", "rename", *held_out]
    assert families("reasoning", "trained", chosen) == families("reasoning")
    for wrong in ([held_out[0]], ["serch"], ["search", "search"], []):
        with pytest.raises(FullarcError, match="tasks.families.terminal"):
            families("terminal", "trained", {"terminal": wrong})
    with pytest.raises(FullarcError, match='no kind of task "shell"'):
        families("terminal", "trained", {"shell": ["search"]})


@pytest.mark.parametrize("family", families("terminal", "all"))
def test_every_turn_of_a_demonstration_thinks(family):
    """A rollout's prompt opens a thought in every turn, so a turn without one could never be sampled."""
    assert all(step.thought for step in get(family).sample(instance_seed("train", family, 0)).solution)


def test_unknown_names_are_said_with_the_known_ones():
    with pytest.raises(FullarcError, match="extreme"):
        get("nothing")
    for call in (
        lambda: families("x"),
        lambda: families("general", "x"),
        lambda: instance_seed("test", "add", 0),
    ):
        with pytest.raises(FullarcError, match="There is no"):
            call()


@given(st.sampled_from(ALL), st.integers(0, 10**9))
def test_a_seed_tells_its_split(family, i):
    assert split_of(instance_seed("train", family, i)) == "train"
    assert split_of(instance_seed("eval", family, i)) == "eval"


def test_no_evaluation_prompt_is_a_training_prompt():
    prompts: dict[str, set[str]] = {"train": set(), "eval": set()}
    for split, found in prompts.items():
        for family in ALL:
            found |= {get(family).sample(instance_seed(split, family, i)).prompt for i in range(60)}
    assert not prompts["train"] & prompts["eval"]
    assert {prompt_bit(prompt) for prompt in prompts["train"]} == {0}
    assert {prompt_bit(prompt) for prompt in prompts["eval"]} == {1}


@pytest.mark.parametrize("family", ALL)
def test_an_instance_is_a_function_of_its_seed_and_prompts_are_short(family):
    task = get(family)
    for i in range(30):
        seed = instance_seed("train", family, i)
        instance = task.sample(seed)
        assert instance == task.sample(seed) and instance.seed == seed and instance.family == family
        words = sum(len(w) if w.isdigit() else 1 + w.count(".") for w in instance.prompt.split())
        assert words <= 32  # words, digits and file endings: fewer than 45 tokens of a small BPE
        assert all(len(step.thought.split()) <= 30 for step in instance.solution)
    assert len({task.sample(instance_seed("train", family, i)).prompt for i in range(30)}) >= 15


def test_a_family_with_too_few_prompts_is_refused():
    class One(Task):
        family, kind, grade = "one", "reasoning", None

        def draw(self, rng, seed):
            return get("add").draw(__import__("random").Random(0), seed)

    One.__abstractmethods__ = frozenset()
    with pytest.raises(FullarcError, match="too few"):
        for seed in (2, 3):
            One().sample(seed)


@pytest.mark.parametrize(
    "outcome", [Reward(0.5, {"a": 1.0}), EnvError("sandbox"), Truncated("turns"), Invalid("torn")], ids=str
)
def test_outcomes_survive_json(outcome):
    assert outcome_from_dict(outcome_to_dict(outcome)) == outcome


def test_what_is_not_an_outcome_is_refused():
    with pytest.raises(FullarcError, match="not an outcome"):
        outcome_from_dict({"type": "zero"})


def test_the_import_is_light():
    code = "import sys, fullarc.tasks; print(sorted({'torch', 'transformers', 'reasoning_gym'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"}, capture_output=True
    )
    assert done.stdout.strip() == b"[]"
