"""Real processes, real sandboxes, SIGKILL: the trainer, the engine or the worker dies, and the bits do not change."""

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rl_support import digest

from fullarc.rollout.ledger import Ledger
from fullarc.rollout.trajectory import read_trajectories

ENV = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


class Stage:
    """A run of run_stage.py with its messages."""

    def __init__(self, folder, name, engines=1):
        script = str(Path(__file__).with_name("run_stage.py"))
        command = [sys.executable, script, str(folder), name, str(engines)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENV)
        self.messages = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.messages.put(json.loads(line))

    def next(self, timeout):
        """The next message; None when there is none in time."""
        try:
            return self.messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def ended(self):
        return self.process.poll() is not None and self.messages.empty()


def run_to_end(folder, name):
    stage = Stage(folder, name)
    messages = []
    while not stage.ended():
        message = stage.next(0.5)
        if message:
            messages.append(message)
    assert stage.process.wait() == 0
    return messages


def tokens(folder, name):
    """What was trained on, without the attempt numbers that a restart changes."""
    out = {}
    for path in sorted((folder / "stages" / name / "trajectories").glob("*.jsonl")):
        out[path.name] = [
            (t.key.group, t.key.sample, t.outcome.kind, t.outcome.value, [s.ids for s in t.samples()])
            for t in read_trajectories(path)
        ]
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name, engines", [("distil", 2), ("agentic_rl", 1)])
def test_sigkill_of_any_process_at_any_moment_changes_no_bit(tmp_path, name, engines):
    """Nor does the number of engines: the run that is left alone has one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    messages = run_to_end(whole, name)
    steps = [m for m in messages if m["kind"] == "step"]
    assert [m["step"] for m in steps] == list(range(1, 9)) and steps[0]["parity_max"] < 1e-4
    rng, victims = random.Random(name), []
    pids = {}
    stage = Stage(killed, name, engines)
    due = time.monotonic() + 8
    while True:
        message = stage.next(0.05)
        if message and message["kind"] == "rollout_start":
            pids = message["pids"]
            due = time.monotonic() + rng.choice([0.05, 0.4, 2.0])
        if message and message["kind"] == "step" and rng.random() < 0.5:
            due = time.monotonic()  # right after a step: in the middle of the next one, or of a checkpoint
        if stage.ended():
            if stage.process.returncode == 0:
                break
            stage, pids = Stage(killed, name, engines), {}
            due = time.monotonic() + 8
        elif pids and time.monotonic() > due and len(victims) < 9:
            victim = [f"engine-{engines - 1}", "worker", "trainer"][len(victims) % 3]
            os.kill(stage.process.pid if victim == "trainer" else pids[victim], signal.SIGKILL)
            victims.append(victim)
            pids = {}
            if victim == "trainer":
                stage.process.wait()
    assert {"trainer", f"engine-{engines - 1}", "worker"} <= set(victims), (
        "every kind of death must have happened"
    )
    assert tokens(whole, name) == tokens(killed, name)
    checkpoint = Path("stages") / name / "checkpoint"
    assert digest(whole / checkpoint) == digest(killed / checkpoint) != digest(whole / "start")
    with Ledger(killed / "ledger.sqlite") as ledger:
        assert ledger.in_flight() == []
