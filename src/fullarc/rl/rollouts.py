"""The rollout side as seen from the trainer: engine servers and a rollout worker, child processes all of them.

Orders go to the worker as JSON lines, finished batches come back as files. Whatever goes wrong (a process
dies, the worker reports an error, nothing finishes for too long) has one answer: all are killed, started
again, and given the orders that are not on disk yet; a batch depends on its order only, so it comes out the
same. After `max_restarts` the stage fails with the reason.

Invariants: every wait has a bound; the children die with this process, however it dies (the worker sees its
stdin close, the engines watch their parent).
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fullarc.config.errors import FullarcError
from fullarc.rollout.trajectory import Trajectory, read_trajectories

START_S = 120.0
WORKER = (sys.executable, "-m", "fullarc.rl.worker")


class ChildFailed(Exception):
    """A child process died, reported an error or stopped answering; internal to this room."""


def batch_path(folder: Path, batch: int) -> Path:
    """File of one batch of trajectories."""
    return folder / f"step-{batch:06d}.jsonl"


class Child:
    """A process that speaks JSON lines on stdout and logs to a file on stderr; in a session of its own."""

    def __init__(self, name: str, args: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=env,
                start_new_session=True,
            )  # fmt: skip
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id, also of its process group."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # a library's print
            if isinstance(message, dict):
                self._messages.put(message)
        self._messages.put(None)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to its stdin. ChildFailed if it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None after `timeout_s`. ChildFailed if it is gone."""
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._messages.put(None)
            raise self._died()
        return message

    def _died(self) -> ChildFailed:
        with suppress(subprocess.TimeoutExpired):  # it closed its pipe; give it a moment to be gone
            self._process.wait(timeout=5.0)
        return ChildFailed(f"the {self.name} died (exit code {self._process.returncode}, see {self.log})")

    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and everything in its group, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=START_S)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # unsent bytes of a dead pipe
                pipe.close()  # type: ignore[union-attr]


@dataclass
class ProcessRollouts:
    """`loop.Rollouts` over real processes; use as a context manager.

    Attributes:
        job: what the worker needs to know (see `rl.worker.Job`), without `engine_urls` and `out`.
        trajectories: folder of the batch files.
        logs: folder of the children's stderr.
        engine: command of our own engine server, which prints {"port": …} when ready; empty with one
            elsewhere.
        engine_url: that one's address.
        engines: how many of our own share the work.
        worker: command of the worker.
        max_restarts, stall_s: see `RLStage`.
        event: told about starts and restarts.
    """

    job: dict[str, Any]
    trajectories: Path
    logs: Path
    engine: Sequence[str] = ()
    engine_url: str = ""
    engines: int = 1
    worker: Sequence[str] = WORKER
    max_restarts: int = 3
    stall_s: float = 300.0
    event: Callable[..., None] = lambda *_, **__: None
    restarts: int = 0
    _orders: dict[int, dict[str, Any]] = field(default_factory=dict)
    _children: dict[str, Child] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.trajectories.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def order(self, batch: int, weights: Path, version: int) -> None:
        """See `loop.Rollouts`."""
        if batch in self._orders or batch_path(self.trajectories, batch).exists():
            return
        self._orders[batch] = {"batch": batch, "weights": str(weights.absolute()), "version": version}
        if self._children:
            self._attempt(lambda: self._children["worker"].send(self._orders[batch]))
        else:
            self._attempt(self._start)

    def collect(self, batch: int) -> list[Trajectory]:
        """See `loop.Rollouts`. FullarcError when the rollout side failed more than `max_restarts` times."""
        path = batch_path(self.trajectories, batch)
        while not path.exists():
            self._attempt(lambda: self._wait(path))
        self._orders.pop(batch, None)
        return read_trajectories(path)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do `action`; on a failure of a child start both again with the open orders, a bounded number of times."""
        while True:
            try:
                return action()
            except ChildFailed as failure:
                self._stop()
                self.restarts += 1
                if self.restarts > self.max_restarts:
                    raise FullarcError(
                        f"The rollout side failed {self.restarts} times, last: {failure}.",
                        f"Look at the logs in {self.logs}.",
                    ) from None
                self.event("rollout_restart", reason=str(failure), restarts=self.restarts)
                action = self._start

    def _start(self) -> None:
        urls = [self.engine_url]
        if self.engine:
            for name in (f"engine-{number}" for number in range(self.engines)):
                self._children[name] = Child(name, self.engine, self.logs / f"{name}.log")
            urls = [self._url(engine) for engine in self._children.values()]
        worker = self._children["worker"] = Child("worker", self.worker, self.logs / "worker.log")
        worker.send(self.job | {"engine_urls": urls, "out": str(self.trajectories.absolute())})
        for batch in sorted(self._orders):
            if not batch_path(self.trajectories, batch).exists():
                worker.send(self._orders[batch])
        self.event("rollout_start", pids={name: child.pid for name, child in self._children.items()})

    def _url(self, engine: Child) -> str:
        """Where a started engine answers."""
        ready = engine.receive(START_S)
        if ready is None or "port" not in ready:
            raise ChildFailed(f"the {engine.name} was not ready within {START_S:.0f} s")
        return f"http://127.0.0.1:{ready['port']}"

    def _wait(self, path: Path) -> None:
        """Until `path` exists. ChildFailed when a child is gone, reports an error, or nothing moves for stall_s."""
        quiet_until = time.monotonic() + self.stall_s
        while not path.exists():
            message = self._children["worker"].receive(0.2)
            if message is not None:
                quiet_until = time.monotonic() + self.stall_s
                if message.get("event") == "error":
                    raise ChildFailed(message.get("message", "the worker failed"))
            elif dead := [c for c in self._children.values() if c.name != "worker" and not c.alive()]:
                raise ChildFailed(f"the {dead[0].name} died (see {dead[0].log})")
            elif time.monotonic() > quiet_until:
                raise ChildFailed(f"no episode finished within {self.stall_s:.0f} s")

    def _stop(self) -> None:
        for child in self._children.values():
            child.kill()
        self._children.clear()
