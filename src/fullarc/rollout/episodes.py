"""The two sorts of episode: one reply to a prompt, and an agent at work in a sandbox.

Tasks are a floor above, so they come in as duck-typed objects: `TaskInstance` and `Judge` say what is used of them.
Both functions return trajectories whose tokens are what the engine sampled, and leave failures of the environment
as exceptions for the orchestrator.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from starlette.types import ASGIApp

from fullarc.agent.client import ChatClient
from fullarc.agent.loop import AgentResult, ReActAgent
from fullarc.agent.tools import ShellTool, Tool
from fullarc.chat import Message, Tokenizer
from fullarc.rollout.engine_client import EngineClient, Sampling
from fullarc.rollout.gateway import ChatRenderer
from fullarc.rollout.orchestrator import turn_seed
from fullarc.rollout.sessions import Incoming, Session
from fullarc.rollout.trajectory import EpisodeKey, Outcome, Trajectory
from fullarc.rollout.wire import read_completion
from fullarc.sandbox import Sandbox


class TaskInstance(Protocol):
    """What is used of a task's instance."""

    @property
    def family(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def messages(self) -> list[dict[str, Any]]: ...
    @property
    def files(self) -> Mapping[str, Any]: ...


Verdict = Any
"""A task's outcome (`fullarc.tasks`: Reward, EnvError, Truncated, Invalid) or ours, maybe awaitable."""
Judge = Callable[[str, Mapping[str, bytes] | None], Verdict]
"""(final answer, files left in the sandbox or None) -> verdict."""


@dataclass(frozen=True)
class Limits:
    """Bounds of an episode: tokens per reply, tokens per episode with its prompt, replies."""

    max_new_tokens: int = 256
    max_len: int = 1024
    max_turns: int = 8


async def single_turn(
    engine: EngineClient,
    tok: Tokenizer,
    instance: TaskInstance,
    keys: Sequence[EpisodeKey],
    judge: Judge,
    seed: int,
    limits: Limits,
    temperature: float = 1.0,
    top_p: float = 1.0,
    thinking: bool = True,
) -> list[Trajectory]:
    """One reply per key to the instance's prompt, all in one engine request, each graded.

    A reply cut off by a limit is Truncated and not graded; a prompt that leaves no room for a reply is Invalid.
    """
    base = Trajectory(
        keys[0], instance.family, instance.seed, Outcome("invalid"), meta=_meta(instance, "answered")
    )
    incoming = [Incoming(Message.from_openai(message)) for message in instance.messages]
    plan = Session(ChatRenderer(tok)).plan(incoming, None, thinking)
    room = min(limits.max_new_tokens, limits.max_len - len(plan.prompt_ids))
    if room < 1:
        outcome = Outcome("invalid", reason="prompt_too_long")
        return [replace(base, key=key, outcome=outcome) for key in keys]
    samplings = [Sampling(room, temperature, top_p, tok.stop_ids, turn_seed(seed, key, 0)) for key in keys]
    completions = await engine.generate_batch([plan.prompt_ids] * len(keys), samplings)
    completions = await asyncio.gather(
        *(engine.finish(plan.prompt_ids, s, c) for s, c in zip(samplings, completions, strict=True))
    )
    out = []
    for key, completion in zip(keys, completions, strict=True):
        reply = read_completion(tok, completion, thinking, None, "call")
        session = Session(ChatRenderer(tok))
        session.record(session.open(plan), completion, reply.message, reply.finish, reply.format_errors)
        if reply.finish == "length":
            outcome = Outcome("truncated", reason="length")
        else:
            outcome = await _verdict(judge, reply.message.content, None)
        meta = _meta(instance, "length" if reply.finish == "length" else "answered")
        out.append(replace(base, key=key, outcome=outcome, turns=session.turns(), meta=meta))
    return out


async def agent_episode(
    gateway: ASGIApp | str,
    instance: TaskInstance,
    key: EpisodeKey,
    judge: Judge,
    seed: int,
    limits: Limits,
    make_sandbox: Callable[[Mapping[str, Any]], Sandbox],
    tools: Sequence[Tool] = (ShellTool(),),
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Trajectory:
    """An agent works on the instance in its own sandbox, then what it answered and left behind is graded.

    A malformed tool call ends it with reward 0 (GLM-4.5 3.3); a limit ends it as Truncated, not graded.

    Args:
        gateway: an ASGI application (called in-process) or a URL; its `max_len` is the bound on an episode's tokens.
        make_sandbox: called in a thread with the instance's files; the sandbox is closed here.
    """
    name = f"{key.stage}-{key.batch}-{key.group}-{key.sample}-{key.attempt}"
    app, url = (None, gateway) if isinstance(gateway, str) else (gateway, "http://localhost")
    async with ChatClient(url, app, session=name) as client:
        await client.forget()
        sandbox = await asyncio.to_thread(make_sandbox, instance.files)
        try:
            agent = ReActAgent(
                client,
                sandbox,
                tools,
                max_turns=limits.max_turns,
                max_tokens=limits.max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=lambda turn: turn_seed(seed, key, turn),
            )
            result = await agent.run(instance.messages)
            outcome = await _agent_outcome(result, sandbox, judge)
            record = Trajectory.from_atif(await client.trajectory())
        finally:
            await asyncio.shield(asyncio.gather(sandbox.aclose(), client.forget(), return_exceptions=True))
    meta = _meta(instance, result.stop) | record.meta
    return replace(
        record,
        key=key,
        task=instance.family,
        instance_seed=instance.seed,
        outcome=outcome,
        session_id=name,
        meta=meta,
    )


async def _agent_outcome(result: AgentResult, sandbox: Sandbox, judge: Judge) -> Outcome:
    if result.stop == "format_error":
        return Outcome("reward", 0.0, {"format": 0.0}, "format_error")
    if result.truncated:
        return Outcome("truncated", reason=result.stop)
    files = await asyncio.to_thread(sandbox.snapshot)
    return await _verdict(judge, result.answer, files)


async def _verdict(judge: Judge, answer: str, files: Mapping[str, bytes] | None) -> Outcome:
    verdict = judge(answer, files)
    if inspect.isawaitable(verdict):
        verdict = await verdict
    return outcome_of(verdict)


def outcome_of(verdict: Verdict) -> Outcome:
    """A task's verdict as our record: Reward(value, parts), EnvError(kind), Truncated(reason), Invalid(reason)."""
    if isinstance(verdict, Outcome):
        return verdict
    kind = type(verdict).__name__
    if kind == "Reward":
        return Outcome("reward", float(verdict.value), dict(verdict.parts))
    if kind == "EnvError":
        return Outcome.env_error(verdict.kind)
    if kind == "Truncated":
        return Outcome("truncated", reason=verdict.reason)
    if kind == "Invalid":
        return Outcome("invalid", reason=verdict.reason)
    raise TypeError(f"{kind} is not an outcome")


def _meta(instance: TaskInstance, stop: str) -> dict[str, Any]:
    return {"kind": instance.kind, "stop": stop}
