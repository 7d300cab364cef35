"""The supervisor with children that misbehave on purpose: small scripts in place of the engine and the worker."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fullarc.config.errors import FullarcError
from fullarc.rl.rollouts import ProcessRollouts, batch_path
from fullarc.rollout.trajectory import EpisodeKey, Outcome, Trajectory

WORKER = """
import json, os, sys, time
from pathlib import Path
job = json.loads(sys.stdin.readline())
tries = Path(job["tries"]); n = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (n + 1))
plan = job["plan"][n] if n < len(job["plan"]) else "work"
for line in sys.stdin:
    order = json.loads(line)
    if plan == "die": os._exit(3)
    if plan == "error": print(json.dumps({"event": "error", "message": "the engine failed"}), flush=True); plan = "hang"
    if plan == "hang": time.sleep(600)
    for i in range(3):
        time.sleep(job.get("slow", 0)); print(json.dumps({"event": "progress"}), flush=True)
    print("noise of a library")
    path = Path(job["out"]) / f"step-{order['batch']:06d}.jsonl"
    temp = path.with_suffix(".tmp"); temp.write_text(job["record"] + "\\n"); os.replace(temp, path)
    print(json.dumps({"event": "batch", "batch": order["batch"]}), flush=True)
"""
ENGINE = "import json, sys, time; print(json.dumps({'port': 1}), flush=True); time.sleep(600)"
RECORD = json.dumps(Trajectory(EpisodeKey("s", 0, 0, 0), "t", 0, Outcome("reward", 1.0)).to_atif())


def rollouts(tmp_path, plan=(), engine=ENGINE, **options):
    events = []
    job = {"plan": list(plan), "tries": str(tmp_path / "tries"), "record": RECORD} | options.pop("job", {})
    made = ProcessRollouts(
        job, tmp_path / "trajectories", tmp_path / "logs", [sys.executable, "-c", engine],
        worker=[sys.executable, "-c", WORKER], event=lambda kind, **f: events.append((kind, f)), **options,
    )  # fmt: skip
    made.events = events
    return made


def kinds(made):
    return [kind for kind, _ in made.events]


def test_orders_come_back_as_files_and_files_are_not_ordered_again(tmp_path):
    with rollouts(tmp_path) as made:
        for batch in (0, 1, 1):
            made.order(batch, tmp_path, batch)
        assert [len(made.collect(batch)) for batch in (1, 0)] == [1, 1]
        made.order(0, tmp_path, 0)
        assert made._orders == {}
    assert kinds(made) == ["rollout_start"]
    with rollouts(tmp_path) as again:
        again.order(1, tmp_path, 1)
        again.collect(1)
    assert again.events == [], "nothing is started for batches that are on disk"


@pytest.mark.parametrize(
    "plan, reason", [("die", "exit code 3"), ("error", "the engine failed"), ("hang", "no episode")]
)
def test_every_failure_is_a_restart_with_the_open_orders(tmp_path, plan, reason):
    with rollouts(tmp_path, [plan, plan], stall_s=0.5) as made:
        made.order(0, tmp_path, 0)
        made.order(1, tmp_path, 0)
        assert len(made.collect(0)) == 1 and len(made.collect(1)) == 1
    restarts = [fields for kind, fields in made.events if kind == "rollout_restart"]
    assert [r["restarts"] for r in restarts] == [1, 2] and all(reason in r["reason"] for r in restarts)


def test_restarts_are_bounded(tmp_path):
    with (
        rollouts(tmp_path, ["die"] * 9, max_restarts=2) as made,
        pytest.raises(FullarcError, match="failed 3 times"),
    ):
        made.order(0, tmp_path, 0)
        made.collect(0)
    assert kinds(made) == ["rollout_start", "rollout_restart"] * 2 + ["rollout_start"]


def test_a_dead_engine_is_noticed_while_the_worker_waits(tmp_path):
    with rollouts(tmp_path, ["hang"], stall_s=60, engines=2) as made:
        made.order(0, tmp_path, 0)
        os.kill(made._children["engine-1"].pid, signal.SIGKILL)
        assert len(made.collect(0)) == 1
    assert "the engine-1 died" in made.events[1][1]["reason"]


def test_an_engine_that_never_starts_is_an_error_for_people(tmp_path):
    made = rollouts(tmp_path, engine="import sys; sys.exit('no such model')", max_restarts=1)
    with made, pytest.raises(FullarcError, match="the engine-0 died"):
        made.order(0, tmp_path, 0)
    assert "no such model" in (tmp_path / "logs" / "engine-0.log").read_text()


def test_slow_progress_is_progress(tmp_path):
    with rollouts(tmp_path, job={"slow": 0.4}, stall_s=1.0) as made:
        made.order(0, tmp_path, 0)
        made.collect(0)
    assert "rollout_restart" not in kinds(made)


def test_children_are_gone_afterwards_and_when_the_parent_is_killed(tmp_path):
    with rollouts(tmp_path) as made:
        made.order(0, tmp_path, 0)
        made.collect(0)
        pids = [child.pid for child in made._children.values()]
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)
    worker = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    code = f"""
import sys, time
from pathlib import Path
from fullarc.rl.rollouts import ProcessRollouts
made = ProcessRollouts({{}}, Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), engine_url="http://x", worker={worker!r},
                       event=lambda kind, **f: print(f["pids"]["worker"], flush=True))
made.order(7, Path("w"), 0); time.sleep(600)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_batch_files_sort(tmp_path):
    assert batch_path(tmp_path, 12).name == "step-000012.jsonl"
