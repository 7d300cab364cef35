"""Claims from synthetic run folders: each can hold and each can fail."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fullarc.config.errors import FullarcError, UsageError
from fullarc.config.files import append_jsonl, atomic_write
from fullarc.evals import bench, bench_arc
from fullarc.evals.scores import Score, Scores

MACHINE = {"cpu": "abacus", "cores": 2, "memory_gb": 6.0, "torch": "2.13.0"}
ARC = ("pretrain", "midtrain", "dsa", "sft", "reasoning_rl", "agentic_rl", "distil")
GOOD: dict[str, tuple[float, ...]] = {
    "bpb_seen": (2.0, 1.95, 1.96, 2.1, 2.1, 2.1, 2.1),
    "needle_512": (0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9),
    "needle_1024": (0.0, 0.8, 0.78, 0.8, 0.8, 0.8, 0.79),
    "reasoning_seen": (0.0, 0.0, 0.0, 0.4, 0.65, 0.62, 0.65),
    "agent_seen": (0.0, 0.0, 0.0, 0.4, 0.41, 0.7, 0.69),
    "format_errors": (1.0, 1.0, 1.0, 0.01, 0.01, 0.0, 0.0),
}


def make_run(
    folder: Path, seed: int = 0, minutes: float = 10.0, peak: int = 4 * 10**9, **changes: Any
) -> Path:
    """A run folder whose scores are GOOD, changed by key=(…)."""
    stages = "".join(f'[stages.{name}]\ntype = "{name}"\n' for name in ARC)
    atomic_write(folder / "recipe.resolved.toml", f"seed = {seed}\narc = {json.dumps(ARC)}\n{stages}")
    append_jsonl(folder / "events.jsonl", {"kind": "run_start", "time": 1000.0, "machine": MACHINE})
    append_jsonl(folder / "metrics.jsonl", {"stage": "data", "step": 1, "time": 1005.0, "documents": 5})
    append_jsonl(folder / "metrics.jsonl", {"stage": "pretrain", "step": 1, "time": 1030.0, "loss": 7.0})
    append_jsonl(folder / "events.jsonl", {"kind": "run_end", "time": 1000.0 + 60 * minutes})
    atomic_write(folder / "bench.json", json.dumps({"peak_bytes": peak}))
    for index, name in enumerate(ARC):
        table = {**GOOD, **changes}
        scores = Scores(name, {key: Score(values[index], 0.02, 96) for key, values in table.items()})
        scores.references["bpb_uniform"] = 3.2
        scores.save(folder / "stages" / name / "eval" / "scores.json")
    return folder


def claims_of(*folders: Path) -> dict[str, dict[str, Any]]:
    return {claim["name"]: claim for claim in bench_arc.judge([bench_arc.read_run(f) for f in folders])}


def test_a_good_run_keeps_every_promise(tmp_path: Path) -> None:
    claims = claims_of(make_run(tmp_path / "a"))
    assert {name: claim["ok"] for name, claim in claims.items()} == {c.name: True for c in bench_arc.CLAIMS}
    assert claims["the demo's wall time"]["value"] == 10.0
    assert claims["time until the first curve"]["value"] == 30.0
    assert claims["peak memory of the process tree"]["value"] == 4.0
    needle = claims["needle recall at the new length after mid-training"]
    assert (needle["value"], needle["baseline"], needle["seeds"]) == (80.0, 0.0, [0])
    assert claims["agent success after agentic RL"]["baseline"] == pytest.approx(41.0)
    assert claims["reasoning pass@1 after reasoning RL"]["baseline"] == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("the demo's wall time", {"minutes": 15.5}),
        ("peak memory of the process tree", {"peak": 7 * 10**9}),
        ("held-out text after pre-training", {"bpb_seen": (2.5, 2, 2, 2, 2, 2, 2)}),
        ("needle recall at the new length after mid-training", {"needle_1024": (0.7, *[0.8] * 6)}),
        ("held-out text, sparse attention", {"bpb_seen": (2.0, 1.95, 2.01, 2, 2, 2, 2)}),
        ("needle recall, sparse attention", {"needle_1024": (0.0, 0.8, 0.7, *[0.7] * 4)}),
        ("format errors after SFT", {"format_errors": (1, 1, 1, 0.02, 0, 0, 0)}),
        ("reasoning pass@1 after reasoning RL", {"reasoning_seen": (0, 0, 0, 0.4, 0.59, 0.6, 0.6)}),
        ("agent success after agentic RL", {"agent_seen": (0, 0, 0, 0.4, 0.55, 0.7, 0.7)}),
        ("agent success after agentic RL, absolute", {"agent_seen": (0, 0, 0, 0.3, 0.3, 0.59, 0.59)}),
        (
            "distilled model below the best stage, worst share column",
            {"needle_512": (0.5, 0.9, *[0.9] * 4, 0.8)},
        ),
    ],
)
def test_each_promise_can_be_broken(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    claims = claims_of(make_run(tmp_path / "a", **change))
    assert claims[name]["ok"] is False


def test_the_worst_seed_decides_and_the_spread_is_shown(tmp_path: Path) -> None:
    bad = make_run(tmp_path / "b", seed=1, agent_seen=(0, 0, 0, 0.3, 0.3, 0.4, 0.4))
    claims = claims_of(make_run(tmp_path / "a", seed=0), bad)
    agent = claims["agent success after agentic RL, absolute"]
    assert agent["ok"] is False and agent["seeds"] == [0, 1]
    assert agent["spread"] == {"mean": 55.0, "min": 40.0, "max": 70.0, "n": 2}
    assert claims["distilled model below the best stage, worst share column"]["detail"]


def test_what_was_not_measured_is_neither_kept_nor_broken(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "bench.json").unlink()
    (folder / "stages/agentic_rl/eval/scores.json").unlink()
    append_jsonl(folder / "events.jsonl", {"kind": "run_resume", "time": 1.0})
    claims = claims_of(folder)
    for name in ("peak memory of the process tree", "agent success after agentic RL", "the demo's wall time"):
        assert claims[name]["ok"] is None and claims[name]["value"] is None
    assert claims["format errors after SFT"]["ok"] is True
    for name in ARC[:-1]:
        (folder / "stages" / name / "eval/scores.json").unlink(missing_ok=True)
    alone = claims_of(folder)["distilled model below the best stage, worst share column"]
    assert alone["ok"] is None, "one stage is no comparison"


def test_the_command_reads_runs_prints_and_keeps_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    good, slow = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=3, minutes=20)
    assert bench.main(["arc", "--from-runs", str(good), "--save"]) == 0
    assert "ok  " in capsys.readouterr().out
    assert bench.main(["arc", "--json", "--from-runs", str(slow)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["machine"] == MACHINE, "the machine that ran, not the one that reads"
    wall = next(claim for claim in result["claims"] if claim["name"] == "the demo's wall time")
    assert (wall["value"], wall["baseline"], wall["ok"], wall["seeds"]) == (20.0, 10.0, False, [3])
    for claim in result["claims"]:
        assert {"name", "value", "unit", "baseline", "target", "seeds", "ok"} <= set(claim)
    assert bench.main([]) == 0 and "arc" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no bench"):
        bench.run("nothing")
    with pytest.raises(UsageError, match="--seeds"):
        bench.main(["arc", "--seeds", "a"])


def test_memory_of_a_process_tree_includes_grandchildren() -> None:
    child = "import time; x = bytearray(80 * 2**20); print(1, flush=True); time.sleep(30)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout and process.stdout.readline()
        assert 80 * 2**20 < bench_arc.tree_bytes(process.pid) < 400 * 2**20
    finally:
        import os
        import signal

        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_failed_run_says_where_its_log_is(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(FullarcError, match="ended with code 3"):
        bench_arc.run_recipe(0, tmp_path, tmp_path / "absent.toml")
    assert "absent.toml" in next(tmp_path.glob("*.log")).read_text() and time.monotonic() - began < 60


@pytest.mark.parametrize(
    "value, baseline, kept", [(60.0, 64.0, True), (58.0, 64.0, False), (0.0, 0.0, False)]
)
def test_recall_is_kept_only_where_there_was_some(value, baseline, kept):
    claim = next(c for c in bench_arc.CLAIMS if c.name == "needle recall, sparse attention")
    assert claim.holds(value, baseline) is kept


def test_the_bench_asks_again_with_more_questions_and_its_answers_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    make_run(folder)
    recipe = 'size = "nano"\nseed = 0\nname = "a"\narc = ["pretrain", "sft"]\n'
    atomic_write(folder / "recipe.resolved.toml", recipe)
    asked = {}

    def evaluate(job: Any, out: Path) -> None:
        asked[job.stage] = job
        Scores(job.stage, {"format_errors": Score(0.5, 0.01, 900)}).save(out / "scores.json")

    monkeypatch.setattr("fullarc.evals.stage.evaluate", evaluate)
    for name in ("pretrain", "sft"):
        atomic_write(folder / "stages" / name / "checkpoint/manifest.json", "the first weights")
    bench.run("arc", ["--from-runs", str(folder)])
    assert not asked, "reading a run asks nothing"
    again = bench.run("arc", ["--from-runs", str(folder), "--thorough"])
    claims = {claim["name"]: claim for claim in again["claims"]}
    assert list(asked) == ["pretrain", "sft"]
    assert asked["sft"].settings.problems == bench_arc.THOROUGH["problems"]
    assert asked["sft"].chats and not asked["pretrain"].chats
    assert claims["format errors after SFT"]["value"] == 50.0
    asked.clear()
    assert bench_arc.read_run(folder).scores["sft"]["format_errors"].n == 900
    bench_arc.examine(folder)
    assert not asked, "what was asked is not asked again"
    atomic_write(folder / "stages/sft/checkpoint/manifest.json", "other weights")
    assert bench_arc.read_run(folder).scores["sft"]["format_errors"].n == 96, "scores of other weights"
    bench_arc.examine(folder)
    assert list(asked) == ["sft"]
