"""What happened in one episode, token by token: the record that training, reports and other tools read.

A `Trajectory` is a list of model turns. Each turn holds the exact prompt ids the engine was given and the exact ids
it sampled, with log-probs and weight versions; nothing is ever re-tokenised. On disk it is one ATIF v1.8 JSON object
per line (Harbor's interchange format); what ATIF has no field for lies in `extra`. `Trajectory.samples` is the flat
training view.

Invariant: over all samples of a trajectory every sampled token has loss 1 exactly once, one of a guided turn never.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_write, read_jsonl

SCHEMA = "ATIF-v1.8"
OutcomeKind = Literal["reward", "env_error", "truncated", "invalid"]


@dataclass(frozen=True, order=True)
class EpisodeKey:
    """Which episode: sample `sample` of group `group` in batch `batch` of `stage`; `attempt` counts re-issues."""

    stage: str
    batch: int
    group: int
    sample: int
    attempt: int = 0


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. Only kind "reward" has a meaningful `value`; an environment failure is never a zero."""

    kind: OutcomeKind
    value: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def env_error(cls, reason: str) -> "Outcome":
        """The environment, not the policy, failed; `reason` is a short machine-readable kind."""
        return cls("env_error", reason=reason)


@dataclass(frozen=True)
class Turn:
    """One engine call.

    `parent` is the index of the turn this one continues (-1 = a fresh prompt); `new_messages` are the OpenAI messages
    since the parent's reply (the whole history for a fresh prompt). `prompt_ids` starts with the parent's
    `prompt_ids + completion_ids`. `logprobs` and `versions` (weight version) run along `completion_ids`.
    `fork` says why a fresh prompt was needed although the session already had one. `guided`: the reply had to follow a
    form, so it was not drawn from the distribution that `logprobs` tells of.
    """

    parent: int
    new_messages: list[dict[str, Any]]
    message: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str
    format_errors: list[str] = field(default_factory=list)
    fork: str = ""
    cached_tokens: int = 0
    guided: bool = False


@dataclass(frozen=True)
class Sample:
    """One row of training data; the four lists are aligned.

    `loss_mask` 1 = sampled by the engine (not guided) and trained here; elsewhere `logprobs` is 0.0 and `versions` -1.
    """

    ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    versions: list[int]
    key: EpisodeKey
    task: str
    instance_seed: int
    outcome: Outcome
    format_errors: int
    turns: int

    @property
    def group(self) -> int:
        """Index of the group (one task instance) in its batch."""
        return self.key.group


@dataclass(frozen=True)
class Trajectory:
    """One episode: identity, turns, outcome. `meta` is free JSON (family, stop reason, timings)."""

    key: EpisodeKey
    task: str
    instance_seed: int
    outcome: Outcome
    turns: list[Turn] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    session_id: str = ""
    model: str = "fullarc"
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def format_errors(self) -> list[str]:
        """Every format error of every turn."""
        return [error for turn in self.turns for error in turn.format_errors]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that ends with the last turn."""
        return [m for turn in self._path(len(self.turns) - 1) for m in (*turn.new_messages, turn.message)]

    @property
    def sampled_tokens(self) -> int:
        """Tokens the engine sampled."""
        return sum(len(turn.completion_ids) for turn in self.turns)

    def _path(self, index: int) -> list[Turn]:
        path = []
        while index >= 0:
            path.append(self.turns[index])
            index = self.turns[index].parent
        return path[::-1]

    def samples(self) -> list[Sample]:
        """Root-to-leaf token rows; a turn that several share is trained in the first only, a guided one nowhere."""
        parents = {turn.parent for turn in self.turns}
        done: set[int] = set()
        rows = []
        for leaf in range(len(self.turns)):
            if leaf in parents:
                continue
            turns = self._path(leaf)
            ids = turns[-1].prompt_ids + turns[-1].completion_ids
            mask, logprobs, versions = [0] * len(ids), [0.0] * len(ids), [-1] * len(ids)
            for turn in turns:
                if id(turn) in done:
                    continue
                done.add(id(turn))
                start, end = len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.completion_ids)
                assert ids[:end] == turn.prompt_ids + turn.completion_ids, (
                    "a turn must extend its parent's tokens"
                )
                if turn.guided:
                    continue
                mask[start:end] = [1] * (end - start)
                logprobs[start:end] = turn.logprobs
                versions[start:end] = turn.versions
            if any(mask):
                errors = sum(len(turn.format_errors) for turn in turns)
                rows.append(
                    Sample(
                        ids,
                        mask,
                        logprobs,
                        versions,
                        self.key,
                        self.task,
                        self.instance_seed,
                        self.outcome,
                        errors,
                        len(turns),
                    )
                )
        return rows

    def to_atif(self) -> dict[str, Any]:
        """The ATIF v1.8 object, ready for `json.dumps`."""
        steps: list[dict[str, Any]] = []
        for index, turn in enumerate(self.turns):
            steps += _context_steps(turn, steps)
            steps.append(_agent_step(index, turn))
        if not steps:  # ATIF wants at least one step: an episode that broke before its first turn
            steps.append(
                {"source": "system", "message": f"no turn: {self.outcome.kind} {self.outcome.reason}".strip()}
            )
        for number, step in enumerate(steps, 1):
            step["step_id"] = number
        ours = {
            "key": asdict(self.key),
            "task": self.task,
            "instance_seed": self.instance_seed,
            "outcome": asdict(self.outcome),
            "meta": self.meta,
        }
        agent: dict[str, Any] = {"name": "fullarc", "version": "1", "model_name": self.model}
        if self.tools is not None:
            agent["tool_definitions"] = self.tools
        return {
            "schema_version": SCHEMA,
            "session_id": self.session_id,
            "agent": agent,
            "steps": steps,
            "final_metrics": {"total_steps": len(steps), "total_completion_tokens": self.sampled_tokens},
            "extra": ours,
        }

    @classmethod
    def from_atif(cls, record: dict[str, Any]) -> "Trajectory":
        """Inverse of `to_atif`; FullarcError if the record is not one of ours."""
        try:
            ours = record["extra"]
            turns = [_turn(step) for step in record["steps"] if "turn" in (step.get("extra") or {})]
            return cls(
                key=EpisodeKey(**ours["key"]),
                task=ours["task"],
                instance_seed=ours["instance_seed"],
                outcome=Outcome(**ours["outcome"]),
                turns=turns,
                tools=record["agent"].get("tool_definitions"),
                session_id=record.get("session_id") or "",
                model=record["agent"].get("model_name") or "",
                meta=ours["meta"],
            )
        except (KeyError, TypeError) as error:
            raise FullarcError(f"Not a fullarc trajectory: {error!r} is missing or wrong.") from None


def _context_steps(turn: Turn, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ATIF steps for the messages before a turn; tool results go into the observation of the calling step."""
    calling = next(
        (s for s in steps if turn.parent >= 0 and s.get("extra", {}).get("turn") == turn.parent), None
    )
    call_ids = {call["tool_call_id"] for call in calling.get("tool_calls", [])} if calling else set()
    out: list[dict[str, Any]] = []
    for message in turn.new_messages:
        text = message.get("content") or ""
        if message["role"] == "tool" and calling is not None:
            result = {"content": text}
            if message.get("tool_call_id") in call_ids:
                result["source_call_id"] = message["tool_call_id"]
            calling.setdefault("observation", {"results": []})["results"].append(result)
            continue
        source = {"assistant": "agent", "system": "system"}.get(message["role"], "user")
        step: dict[str, Any] = {"source": source, "message": text}
        if source == "agent":
            step |= _assistant_fields(message)
        if turn.fork or source == "agent":
            step["is_copied_context"] = True
        out.append(step)
    return out


def _assistant_fields(message: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if message.get("reasoning_content"):
        fields["reasoning_content"] = message["reasoning_content"]
    if message.get("tool_calls"):
        fields["tool_calls"] = [
            {
                "tool_call_id": call.get("id", ""),
                "function_name": call["function"]["name"],
                "arguments": json.loads(call["function"]["arguments"]),
            }
            for call in message["tool_calls"]
        ]
    return fields


def _agent_step(index: int, turn: Turn) -> dict[str, Any]:
    extra = {
        "turn": index,
        "parent": turn.parent,
        "new_messages": turn.new_messages,
        "message": turn.message,
        "weight_versions": turn.versions,
        "finish_reason": turn.finish,
        "format_errors": turn.format_errors,
        "fork": turn.fork,
        "guided": turn.guided,
    }
    metrics = {
        "prompt_tokens": len(turn.prompt_ids),
        "completion_tokens": len(turn.completion_ids),
        "cached_tokens": turn.cached_tokens,
        "prompt_token_ids": turn.prompt_ids,
        "completion_token_ids": turn.completion_ids,
        "logprobs": turn.logprobs,
    }
    message = turn.message.get("content") or ""
    return {
        "source": "agent",
        "message": message,
        "llm_call_count": 1,
        "metrics": metrics,
        "extra": extra,
        **_assistant_fields(turn.message),
    }


def _turn(step: dict[str, Any]) -> Turn:
    extra, metrics = step["extra"], step["metrics"]
    return Turn(
        parent=extra["parent"],
        new_messages=extra["new_messages"],
        message=extra["message"],
        prompt_ids=metrics["prompt_token_ids"],
        completion_ids=metrics["completion_token_ids"],
        logprobs=metrics["logprobs"],
        versions=extra["weight_versions"],
        finish=extra["finish_reason"],
        format_errors=extra["format_errors"],
        fork=extra["fork"],
        cached_tokens=metrics["cached_tokens"],
        guided=extra.get("guided", False),
    )


def training_view(trajectories: Iterable[Trajectory]) -> list[Sample]:
    """The samples of all trajectories, in order."""
    return [sample for trajectory in trajectories for sample in trajectory.samples()]


def write_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """Write one ATIF object per line, atomically: the file is whole or absent."""
    lines = [json.dumps(t.to_atif(), ensure_ascii=False, separators=(",", ":")) + "\n" for t in trajectories]
    atomic_write(Path(path), "".join(lines))


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read what `write_trajectories` wrote; FullarcError names the file if a record is foreign."""
    try:
        return [Trajectory.from_atif(record) for record in read_jsonl(Path(path))]
    except FullarcError as error:
        raise FullarcError(f"{path}: {error.message}", "It was not written by fullarc.") from None
