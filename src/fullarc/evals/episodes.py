"""Asking a checkpoint: single answers and agents in sandboxes, through the same code as in training.

Everything runs in one process: `LocalEngine` steps the engine's scheduler between the events of asyncio, the gateway
is called as an ASGI application, sandboxes are child processes. Instances and sampling seeds depend on (family, i)
alone, so that every stage and every run is asked exactly the same.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fullarc.agent import ShellTool
from fullarc.chat import Tokenizer
from fullarc.config.stages import SandboxSettings
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.request import Request
from fullarc.rollout.engine_client import Completion, EngineClient, EngineError, Sampling
from fullarc.rollout.episodes import Limits, agent_episode, single_turn
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.orchestrator import Job, run_batch
from fullarc.rollout.trajectory import EpisodeKey, Trajectory
from fullarc.sandbox import Sandbox
from fullarc.sandbox.base import Limits as SandboxLimits
from fullarc.tasks import Instance, get, instance_seed

SEED = 0
SETTLE = 24
"""Turns given to other coroutines after a reply, so that its follow-up joins the next batch."""


@dataclass(frozen=True)
class Question:
    """Instance number `index` of a task family's evaluation split."""

    family: str
    index: int


class LocalEngine(EngineClient):
    """The engine behind the gateway without a socket."""

    def __init__(self, engine: Engine) -> None:
        super().__init__("http://local")
        self._scheduler = engine.scheduler
        self._driver: asyncio.Task[None] | None = None
        self._count = 0

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, session: str | None = None, n: int = 1
    ) -> list[Completion]:
        """See `EngineClient.generate`; n is 1."""
        return [await self._one(ids, sampling)]

    async def generate_batch(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], session: str | None = None
    ) -> list[Completion]:
        """See `EngineClient.generate_batch`."""
        return list(await asyncio.gather(*map(self._one, prompts, samplings)))

    async def health(self) -> bool:
        """Always: it lives in this process."""
        return True

    async def _one(self, ids: Sequence[int], sampling: Sampling) -> Completion:
        if sampling.whole:
            raise EngineError("rejected", "An evaluation follows no forms and no stop strings.")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        try:
            params = SamplingParams(
                max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                stop_ids=frozenset(sampling.stop_ids), seed=sampling.seed or 0,
            )  # fmt: skip
            request = Request(f"eval-{self._count}", list(ids), params, on_finish=lambda _: _settle(done))
            self._scheduler.check(request)
        except ValueError as error:
            raise EngineError("rejected", str(error)) from None
        self._scheduler.submit(request)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        await asyncio.wait((done, self._driver), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            await self._driver  # raises what stopped it
        tokens = request.output
        return Completion(
            tokens, list(request.logprobs), [0] * len(tokens), request.finish, len(ids), request.cached_tokens
        )

    async def _drive(self) -> None:
        while not self._scheduler.idle:
            before = len(self._scheduler.running)
            self._scheduler.step()
            for _ in range(1 if len(self._scheduler.running) == before else SETTLE):
                await asyncio.sleep(0)


def _settle(done: "asyncio.Future[None]") -> None:
    if not done.done():  # its caller may have given up
        done.set_result(None)


def ask_all(
    engine: Engine,
    tok: Tokenizer,
    questions: Sequence[Question],
    limits: Limits,
    temperature: float,
    sandbox: SandboxSettings,
) -> list[Trajectory]:
    """Answer and grade every question; the i-th trajectory belongs to the i-th question."""
    local = LocalEngine(engine)
    gateway = Gateway(local, tok, max_len=limits.max_len)
    start = partial(
        _sandbox,
        limits=SandboxLimits(wall_s=sandbox.timeout_s, memory_mb=sandbox.memory_mb),
        backend=sandbox.backend,
    )
    tools = (ShellTool(sandbox.output_chars),)

    def job(question: Question) -> Job:
        task, seed = get(question.family), instance_seed("eval", question.family, question.index)
        instance: Instance = task.sample(seed)
        judge = partial(task.grade, instance)

        async def run(keys: list[EpisodeKey]) -> list[Trajectory]:
            if not instance.tools:
                return await single_turn(local, tok, instance, keys, judge, SEED, limits, temperature)
            episode = agent_episode(
                gateway.app, instance, keys[0], judge, SEED, limits, start, tools, temperature=temperature
            )
            return [await episode]

        # the seed of the instance is the group: sampling must not depend on what else is asked
        return Job([(seed, 0)], question.family, seed, run, {"kind": instance.kind})

    async def everything() -> list[Trajectory]:
        async with local:
            return await run_batch([job(question) for question in questions], "eval", 0)

    return asyncio.run(everything())


def _sandbox(files: Mapping[str, Any], limits: SandboxLimits, backend: str) -> Sandbox:
    return Sandbox.create(files, limits, backend)
