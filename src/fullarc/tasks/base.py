"""Instances, outcomes and the `Task` base.

Invariant: an evaluation instance never has the prompt of a training instance, of any family and whatever the seeds.
The lowest bit of a seed names its split, and a draw is repeated until the lowest bit of the SHA-256 of its prompt
is the same, so the prompts themselves are divided into two disjoint sets.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fullarc.config.errors import FullarcError
from fullarc.config.seeds import derive

Split = Literal["train", "eval"]
MAX_DRAWS = 200  # a draw misses its split half of the time


@dataclass(frozen=True)
class Reward:
    """A judgement to learn from: `value` in [0, 1] and the parts that it was made of."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EnvError:
    """The environment failed, not the agent: leave the episode out, or run it again if `retryable`."""

    kind: str
    retryable: bool = True


@dataclass(frozen=True)
class Truncated:
    """The episode was cut off (`length`, `turns`, `wall`) before there was anything to judge."""

    reason: str = "length"


@dataclass(frozen=True)
class Invalid:
    """The record itself is unusable (for example a conversation that does not parse back)."""

    reason: str = ""


Outcome = Reward | EnvError | Truncated | Invalid
_KINDS: dict[str, type] = {
    "reward": Reward,
    "env_error": EnvError,
    "truncated": Truncated,
    "invalid": Invalid,
}


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """JSON form: {"type": "reward", "value": …}."""
    name = next(name for name, kind in _KINDS.items() if type(outcome) is kind)
    return {"type": name, **asdict(outcome)}


def outcome_from_dict(data: Mapping[str, Any]) -> Outcome:
    """Inverse of `outcome_to_dict`. FullarcError for anything else."""
    fields = dict(data)
    kind = _KINDS.get(fields.pop("type", ""))
    if kind is None:
        raise FullarcError(
            f"This is not an outcome: {data!r}.", f"Its type must be one of {', '.join(_KINDS)}."
        )
    outcome: Outcome = kind(**fields)
    return outcome


@dataclass(frozen=True)
class Step:
    """One turn of an oracle: a short thought, then a shell command, or the final answer if `command` is None.

    `mistake` marks a turn that is shown but must not be learnt (GLM-5 3.1: erroneous spans are kept but masked).
    """

    thought: str
    command: str | None = None
    answer: str = ""
    mistake: bool = False


@dataclass(frozen=True)
class Instance:
    """One thing to do.

    Attributes:
        messages: the conversation to start from, in OpenAI's form.
        tools: OpenAI tool schemas; empty if the answer is the first reply.
        files: initial files of the sandbox (path below /work -> content); empty if there is no sandbox.
        solution: the oracle's turns.
        alternative: the turns of another way that is right as well; empty if there is none.
        meta: JSON-able facts for the grader and for reports (`level`, `answer`, …); never shown to the model.
        tests: hidden files that are uploaded to /tests when the episode is over.
    """

    family: str
    kind: str
    seed: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    solution: list[Step] = field(default_factory=list)
    alternative: list[Step] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Text of the last user message."""
        return str(self.messages[-1]["content"])


def instance_seed(split: Split, family: str, i: int) -> int:
    """Seed of instance number `i`; even for training, odd for evaluation."""
    if split not in ("train", "eval"):
        raise FullarcError(f'There is no split "{split}".', 'Use "train" or "eval".')
    return derive(0, "instance", split, family, i) // 2 * 2 + (split == "eval")


def split_of(seed: int) -> Split:
    """The split that a seed belongs to."""
    return "eval" if seed & 1 else "train"


def prompt_bit(prompt: str) -> int:
    """0 for prompts that may be trained on, 1 for those kept for evaluation."""
    return hashlib.sha256(" ".join(prompt.split()).encode()).digest()[-1] & 1


class Task(ABC):
    """A family of instances. Subclasses implement `draw` and `grade`.

    Attributes:
        family: unique name.
        kind: "reasoning", "terminal" or "general".
        held_out: True if no instance of the family may ever be trained on.
    """

    family: str
    kind: str
    held_out: bool = False

    @abstractmethod
    def draw(self, rng: random.Random, seed: int) -> Instance:
        """One instance from `rng`; `seed` is only recorded."""

    @abstractmethod
    def grade(self, instance: Instance, answer: str, files: Mapping[str, bytes] | None = None) -> Outcome:
        """Judge an episode.

        Args:
            answer: the final text behind </think>.
            files: `Sandbox.snapshot()` taken when the episode ended, for tasks with a sandbox.
        """

    def sample(self, seed: int) -> Instance:
        """The instance of `seed`, a pure function of family and seed."""
        for attempt in range(MAX_DRAWS):
            rng = random.Random(derive(seed, self.family, attempt))
            instance = self.draw(rng, seed)
            if prompt_bit(instance.prompt) == seed & 1:
                return instance
        raise FullarcError(
            f"{self.family} has too few different prompts to keep training and evaluation apart."
        )
