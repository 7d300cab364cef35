"""The table on disk, and what counts as what when episodes are scored."""

import json
import math
from pathlib import Path

import pytest

from fullarc.config.errors import FullarcError
from fullarc.config.stages import EvalSettings
from fullarc.evals.scores import COLUMNS, Score, Scores, column, order
from fullarc.evals.stage import BASE_SHARE, add_episodes, heldout_of, questions
from fullarc.rollout.trajectory import EpisodeKey, Outcome, Trajectory, Turn
from fullarc.tasks import families


def test_a_table_survives_the_disk_and_describes_its_columns(tmp_path: Path) -> None:
    scores = Scores("sft", {"needle_1024": Score(0.5, 0.1, 24), "bpb_seen": Score(2.0, math.nan, 1)})
    scores.families = {"reasoning": {"add": Score(1.0, 0.05, 16)}}
    scores.skipped, scores.seconds, scores.references = (
        {"mtp_accept": "none"},
        {"mtp": 1.0},
        {"bpb_uniform": 3.0},
    )
    scores.save(tmp_path / "scores.json")
    data = json.loads((tmp_path / "scores.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [c["key"] for c in data["columns"]] == ["bpb_seen", "needle_1024"]
    assert data["columns"][1]["title"] == "Needle 1,024"
    again = Scores.load(tmp_path / "scores.json")
    assert again.scores["needle_1024"] == scores.scores["needle_1024"] and math.isnan(again["bpb_seen"].se)
    assert (again.families, again.skipped, again.references) == (
        scores.families,
        scores.skipped,
        scores.references,
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"stage": "x", "scores": {"a": 1}, "families": {}}'])
def test_a_foreign_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(FullarcError, match="not a table of scores"):
        Scores.load(tmp_path / "scores.json")


def test_rows_have_one_order() -> None:
    keys = ["needle_1024", "agent_seen", "needle_256", "bpb_unseen", "bpb_seen"]
    assert sorted(keys, key=order) == ["bpb_seen", "bpb_unseen", "needle_256", "needle_1024", "agent_seen"]
    assert all(column(c.key) == c for c in COLUMNS)


def _episode(family: str, outcome: Outcome, errors: int = 0, finish: str = "stop") -> Trajectory:
    turn = Turn(
        -1, [], {"role": "assistant", "content": ""}, [1], [2, 3], [0.0, 0.0], [0, 0], finish, ["x"] * errors
    )
    return Trajectory(EpisodeKey("eval", 0, 0, 0), family, 1, outcome, [turn])


def test_a_broken_environment_is_no_zero_and_a_cut_off_episode_is() -> None:
    seen, unseen = families("terminal", "trained")[0], families("terminal", "held_out")[0]
    general = families("general", "trained")[0]
    scores = Scores("x")
    add_episodes(scores, [
        _episode(seen, Outcome("reward", 1.0)), _episode(seen, Outcome.env_error("sandbox")),
        _episode(seen, Outcome("truncated", reason="length"), finish="length"), _episode(seen, Outcome("invalid")),
        _episode(unseen, Outcome("reward", 0.5), errors=2), _episode(general, Outcome("reward", 0.5)),
    ])  # fmt: skip
    assert (scores["agent_seen"].value, scores["agent_seen"].n) == (pytest.approx(1 / 3), 3)
    assert scores["agent_unseen"].value == 0.0, "a partial reward is no success"
    assert scores["general"].value == 0.5
    assert (scores["format_errors"].value, scores["format_errors"].n) == (pytest.approx(2 / 5), 5)
    assert scores["response_tokens"].value == 2.0
    assert scores.families["agent"][seen].n == 3
    assert "1 of 6" in scores.skipped["environment"]
    assert "reasoning_seen" not in scores.scores


def test_a_base_model_is_asked_a_part_of_the_same_questions() -> None:
    settings = EvalSettings(problems=8, episodes=4)
    everything, fewer = questions(settings, chats=True), questions(settings, chats=False)
    assert set(fewer) < set(everything) and len(everything) == BASE_SHARE * len(fewer)
    asked = {question.family for question in everything}
    assert asked == {f for kind in ("reasoning", "general", "terminal") for f in families(kind, "all")}


def test_families_that_a_run_left_out_are_neither_asked_nor_counted() -> None:
    chosen = {"terminal": ["search"], "reasoning": ["count"], "general": ["json"]}
    asked = {question.family for question in questions(EvalSettings(), True, chosen)}
    unseen = {family for kind in chosen for family in families(kind, "held_out")}
    assert asked == {"search", "count", "json"} | unseen
    scores = Scores("x")
    won, lost = Outcome("reward", 1.0), Outcome("reward", 0.0)
    episodes = [
        _episode("search", won),
        _episode("rename", lost),
        _episode("json", won),
        _episode("upper", lost),
    ]
    add_episodes(scores, episodes, chosen)
    assert (scores["agent_seen"].value, scores["agent_seen"].n) == (1.0, 1)
    assert (scores["general"].value, scores["general"].n) == (1.0, 1)


def test_the_run_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/stages/sft/checkpoint"
    assert heldout_of(checkpoint) is None
    (tmp_path / "run/data/heldout").mkdir(parents=True)
    assert heldout_of(checkpoint) == tmp_path / "run/data/heldout"
