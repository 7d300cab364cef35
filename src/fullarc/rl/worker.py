"""`python -m fullarc.rl.worker`: the process that samples batches. No torch here.

Reads JSON lines on stdin: first the `WorkerJob`, then one order a batch, {"batch", "weights", "version"}. For
each it makes the engine load those weights, runs the episodes, writes the batch file and says so on stdout,
in JSON lines: {"event": "progress" | "batch" | "error", …}. One order at a time, so a batch is sampled by one
version.

Invariants: a batch file is whole and holds what its order determines, or it is not there: if the engine
failed any episode, the batch is given up rather than recorded with holes. The process ends when its parent
does (stdin closes).
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fullarc.agent import ShellTool
from fullarc.chat import Tokenizer
from fullarc.config.errors import FullarcError
from fullarc.rl.prompts import prompts
from fullarc.rl.rollouts import batch_path
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.episodes import Judge, Limits, agent_episode, single_turn
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.ledger import Ledger
from fullarc.rollout.orchestrator import Job, read_batch, run_batch, write_batch
from fullarc.rollout.replicas import Replicas
from fullarc.rollout.trajectory import EpisodeKey, Trajectory
from fullarc.sandbox import Limits as SandboxLimits
from fullarc.sandbox import Sandbox
from fullarc.tasks import Instance, Outcome, get

ENGINE_TIMEOUT_S = 600.0
ENGINE_FAILURES = ("engine_", "gateway_0", "gateway_5")


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What a worker does until it ends. Paths as strings; see `config.stages` for the settings' meaning.

    Attributes:
        stage: name of the stage, part of every seed.
        seed: the run's.
        families: weight of each task family.
        tokenizer: folder.
        ledger: SQLite file.
        sandbox: fields of `SandboxSettings`.
        engine_urls, out: filled in by `ProcessRollouts`: the engines, and the folder of the batch files.
    """

    stage: str
    seed: int
    families: dict[str, float]
    prompts: int
    group_size: int
    temperature: float
    max_new_tokens: int
    max_len: int
    max_turns: int
    concurrency: int
    stall_s: float
    tokenizer: str
    ledger: str
    sandbox: dict[str, Any]
    engine_urls: list[str] = field(default_factory=list)
    out: str = ""

    def message(self) -> dict[str, Any]:
        """As the first line on the worker's stdin."""
        return asdict(self)


class Sampler:
    """Runs the episodes of a batch against one engine."""

    def __init__(self, job: WorkerJob, engine: EngineClient, tok: Tokenizer) -> None:
        self.job, self.engine, self.tok = job, engine, tok
        self.limits = Limits(job.max_new_tokens, job.max_len, job.max_turns)
        self.gateway = Gateway(engine, tok, max_len=job.max_len)

    def jobs(self, instances: Sequence[Instance]) -> list[Job]:
        """One job per group of replies to a prompt, one per agent episode."""
        out = []
        for group, instance in enumerate(instances):
            places = [(group, sample) for sample in range(self.job.group_size)]
            run, meta = partial(self._run, instance), {"kind": instance.kind}
            for together in [[place] for place in places] if instance.tools else [places]:
                out.append(Job(together, instance.family, instance.seed, run, meta))
        return out

    async def _run(self, instance: Instance, keys: list[EpisodeKey]) -> list[Trajectory]:
        job, judge = self.job, _judge(instance)
        if not instance.tools:
            return await single_turn(
                self.engine, self.tok, instance, keys, judge, job.seed, self.limits, job.temperature
            )
        record = await agent_episode(
            self.gateway.app,
            instance,
            keys[0],
            judge,
            job.seed,
            self.limits,
            self._sandbox,
            (ShellTool(job.sandbox["output_chars"]),),
            job.temperature,
        )
        return [record]

    def _sandbox(self, files: Mapping[str, Any]) -> Sandbox:
        s = self.job.sandbox
        limits = SandboxLimits(wall_s=s["timeout_s"], memory_mb=s["memory_mb"])
        return Sandbox.create(files, limits, s["backend"])

    async def batch(self, order: Mapping[str, Any], ledger: Ledger | None) -> dict[str, Any]:
        """Sample one batch and write its file. FullarcError if the engine failed in it."""
        job, number = self.job, int(order["batch"])
        path = batch_path(Path(job.out), number)
        if read_batch(path, ledger) is not None:
            return {"event": "batch", "batch": number}
        began = time.monotonic()
        await self.engine.update_weights(order["weights"], int(order["version"]))
        instances = await asyncio.to_thread(prompts, job.families, job.prompts, job.seed, job.stage, number)
        trajectories = await run_batch(
            self.jobs(instances),
            job.stage,
            number,
            ledger,
            job.concurrency,
            wall_limit_s=job.stall_s,
            progress=lambda done, total: say(
                {"event": "progress", "batch": number, "done": done, "total": total}
            ),
        )
        for t in trajectories:
            if t.outcome.kind == "env_error" and t.outcome.reason.startswith(ENGINE_FAILURES):
                raise FullarcError(f"batch {number}: the engine failed an episode ({t.outcome.reason})")
        write_batch(path, trajectories, ledger)
        return {"event": "batch", "batch": number, "seconds": time.monotonic() - began}


def _judge(instance: Instance) -> Judge:
    """The task's own grader, in a thread: it may start a sandbox."""

    async def judge(answer: str, files: Mapping[str, bytes] | None) -> Outcome:
        return await asyncio.to_thread(get(instance.family).grade, instance, answer, files)

    return judge


def say(message: Mapping[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def serve(job: WorkerJob, orders: "asyncio.Queue[dict[str, Any]]") -> None:
    """Work through orders until cancelled."""
    tok = Tokenizer.load(job.tokenizer)
    with Ledger(job.ledger) as ledger:
        for path in sorted(Path(job.out).glob("step-*.jsonl")):
            read_batch(path, ledger)
        ledger.reclaim(job.stage)
        async with Replicas(job.engine_urls, timeout_s=ENGINE_TIMEOUT_S) as engine:
            sampler = Sampler(job, engine, tok)
            while True:
                say(await sampler.batch(await orders.get(), ledger))


def main() -> int:
    """Read the job, then serve orders; 1 after a failure, which has been reported on stdout."""
    job = WorkerJob(**json.loads(sys.stdin.readline()))

    async def run() -> None:
        loop, orders = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()

        def read() -> None:
            for line in sys.stdin:
                loop.call_soon_threadsafe(orders.put_nowait, json.loads(line))
            os._exit(0)  # the trainer is gone; sandboxes die with this process

        threading.Thread(target=read, daemon=True).start()
        await serve(job, orders)

    try:
        asyncio.run(run())
    except* FullarcError as group:
        say({"event": "error", "message": str(group.exceptions[0])})
    return 1


if __name__ == "__main__":
    sys.exit(main())
