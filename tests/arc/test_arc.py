"""The arc's promises, with stages that only count: order, resume, changed settings, damage, locks, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_stages import CALLS, FUNCTIONS

from fullarc import arc
from fullarc.config.errors import FullarcError, Interrupted
from fullarc.config.files import is_complete, read_jsonl
from fullarc.config.recipe import load_recipe
from fullarc.config.runfolder import RunFolder

STAGES = ["pretrain", "sft", "reasoning_rl"]
IN_ORDER = [("data", "data")] + [
    (stage, call) for stage in STAGES for call in (["demos"] if stage == "sft" else []) + ["train", "eval"]
]


def go(tmp_path: Path, *overrides: str, **options: Any) -> Path:
    fixed = ["size=nano", "eval.after=each", f"arc={STAGES}", f'runs_dir="{tmp_path}"', "name=r"]
    return arc.run(load_recipe(None, [*fixed, *overrides]), functions=FUNCTIONS, **options)


def calls(folder: Path) -> list[tuple[str, str]]:
    return [(record["stage"], record["call"]) for record in read_jsonl(folder / CALLS)]


def kinds(folder: Path) -> list[str]:
    return [record["kind"] for record in read_jsonl(folder / "events.jsonl")]


def spawn(tmp_path: Path, trip: str, *overrides: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_arc, pathlib; "
    code += f"test_arc.go(pathlib.Path({str(tmp_path)!r}), *{list(overrides)!r})"
    env = os.environ | {"FAKE_TRIP": trip, "PYTHONPATH": str(Path(arc.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stderr=subprocess.PIPE)


def test_stages_run_once_in_order_each_from_the_one_before(tmp_path: Path) -> None:
    folder = go(tmp_path)
    assert calls(folder) == IN_ORDER
    done = json.loads((folder / "stages/reasoning_rl/eval/done.json").read_text())
    assert done["metrics"]["weights"] == STAGES
    assert json.loads((folder / "stages/sft/done.json").read_text())["metrics"] == {"demos": 3, "loss": 1.0}
    assert (folder / "report.html").read_text() == "12"
    assert kinds(folder)[0] == "run_start" and kinds(folder)[-1] == "run_end"
    go(tmp_path)
    assert calls(folder) == IN_ORDER


@pytest.mark.parametrize("trip", ["pretrain:2:SIGKILL", "sft:0:SIGKILL", "reasoning_rl:3:SIGKILL"])
def test_a_killed_run_goes_on_and_repeats_nothing_that_was_finished(tmp_path: Path, trip: str) -> None:
    process = spawn(tmp_path, trip)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    folder = go(tmp_path)
    stage, step, _ = trip.split(":")
    expected = Counter(IN_ORDER) + Counter(
        [(stage, "train")]
    )  # only the function that was killed starts again
    assert Counter(calls(folder)) == expected
    steps = Counter((r["stage"], r["step"]) for r in read_jsonl(folder / "metrics.jsonl"))
    assert set(steps) == {(name, at) for name in STAGES for at in range(4)} and set(steps.values()) == {1}
    assert "stage_resume" in kinds(folder)
    assert json.loads((folder / f"stages/{stage}/done.json").read_text())["attempts"] == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_with_a_sentence_and_the_run_is_resumable(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRIP", f"sft:2:{name}")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"Stopped by {name}.*same command") as error:
        go(tmp_path)
    assert error.value.exit_code == 4 and signal.getsignal(signal.SIGTERM) is before
    folder = go(tmp_path)
    assert Counter(calls(folder)) == Counter(IN_ORDER) + Counter([("sft", "train")])
    assert "interrupted" in kinds(folder) and "run_resume" in kinds(folder)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRIP", "sft:1:full")
    with pytest.raises(FullarcError, match="disk is full .*sft/x.* Free some space"):
        go(tmp_path)
    assert calls(go(tmp_path))[-1] == ("reasoning_rl", "eval")


def test_changed_settings_are_refused_and_from_redoes_them(tmp_path: Path) -> None:
    folder = go(tmp_path)
    for override in ("stages.sft.steps=5", "sandbox.timeout_s=3"):
        with pytest.raises(
            FullarcError, match="'sft' was already run with other settings.*--name.*--from sft"
        ):
            go(tmp_path, override)
    for override in ("seed=5", 'tasks.families={general=["json"]}'):
        with pytest.raises(FullarcError, match="'data' was already run"):
            go(tmp_path, override)
    with pytest.raises(FullarcError, match="'reasoning_rl' was already run with other settings"):
        go(tmp_path, "engine.dtype=fp8")
    assert calls(folder) == IN_ORDER
    go(
        tmp_path, "stages.sft.threads=2", "stages.sft.save_every=1", "engine.threads=2"
    )  # speed is not a result
    assert calls(folder) == IN_ORDER
    go(tmp_path, "stages.sft.steps=5", restart_from="sft")
    assert calls(folder)[len(IN_ORDER) :] == IN_ORDER[3:]
    assert (folder / "aside/001/stages/sft/done.json").exists() and (
        folder / "aside/001/data/rows/sft"
    ).exists()
    old = read_jsonl(folder / "aside/001/metrics.jsonl")
    assert {record["stage"] for record in old} == {"sft", "reasoning_rl"}
    assert len(read_jsonl(folder / "metrics.jsonl")) == 12


def test_a_stage_that_only_started_does_not_change_settings_either(tmp_path: Path) -> None:
    spawn(tmp_path, "sft:2:SIGKILL").communicate(timeout=60)
    with pytest.raises(FullarcError, match="'sft' was already run with other settings"):
        go(tmp_path, "stages.sft.lr=0.5")
    go(tmp_path, "stages.reasoning_rl.lr=0.5")  # not begun yet: free to change


def test_changed_evaluation_is_done_again_without_training(tmp_path: Path) -> None:
    folder = go(tmp_path)
    go(tmp_path, "eval.problems=2")
    assert calls(folder)[len(IN_ORDER) :] == [(stage, "eval") for stage in STAGES]


@pytest.mark.parametrize("damage", ["flip", "delete", "manifest"])
def test_a_damaged_checkpoint_is_named_before_it_is_used(tmp_path: Path, damage: str) -> None:
    spawn(tmp_path, "sft:2:SIGKILL").communicate(timeout=60)
    checkpoint = tmp_path / "r/stages/pretrain/checkpoint"
    if damage == "flip":
        (checkpoint / "weights.json").write_text('["pretraim"]')
    else:
        (checkpoint / ("weights.json" if damage == "delete" else "manifest.json")).unlink()
    with pytest.raises(FullarcError, match="sft needs the checkpoint of 'pretrain', but .*--from pretrain"):
        go(tmp_path)
    assert is_complete(go(tmp_path, restart_from="pretrain") / "stages/reasoning_rl/checkpoint")


def test_two_processes_cannot_share_a_run_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    holder = spawn(tmp_path, "sft:1:SIGSTOP")
    deadline = time.monotonic() + 30
    while not (tmp_path / "r/tripped").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(FullarcError, match=f"in use by process {holder.pid}.*--name"):
        go(tmp_path)
    holder.kill()
    holder.communicate(timeout=30)
    assert calls(go(tmp_path))[-1] == ("reasoning_rl", "eval")


def test_one_stage_alone(tmp_path: Path) -> None:
    folder = go(tmp_path, only="pretrain")
    assert calls(folder) == [("pretrain", "train")]
    with pytest.raises(FullarcError, match="reasoning_rl needs the checkpoint of 'sft'"):
        go(tmp_path, only="reasoning_rl")
    go(tmp_path, only="reasoning_rl", model_in=folder / "stages/pretrain/checkpoint")
    weights = json.loads((folder / "stages/reasoning_rl/checkpoint/weights.json").read_text())
    assert weights == ["pretrain", "reasoning_rl"]
    with pytest.raises(FullarcError, match="no stage 'nope'"):
        go(tmp_path, only="nope")


def test_teachers_are_checked_like_the_model_itself() -> None:
    steps = {step.name: step for step in arc.plan(load_recipe(None).recipe)}
    assert steps["distil"].models == ("general_rl", "reasoning_rl", "agentic_rl", "general_rl")
    assert steps["pretrain"].models == () and steps["sft/eval"].models == ("sft",)


def test_every_stage_type_has_its_functions() -> None:
    assert {step.kind for step in arc.plan(load_recipe(None).recipe)} | {"report"} == set(arc.FUNCTIONS)


def test_a_damaged_bookkeeping_file_counts_as_not_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write("sft", "done.json", {"a": 1})
    assert folder.is_done("sft")
    (folder.step("sft") / "done.json").write_text('{"a"')
    assert not folder.is_done("sft")
