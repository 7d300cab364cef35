"""`Job`: what a terminal family draws; `Shell`: the task made of such jobs.

The oracle's commands, the expected files and the instruction come from one draw, so they cannot disagree; that the
oracle passes, that doing nothing fails and that cheating fails is tested by running them.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fullarc.agent.tools import SHELL_TOOL, SYSTEM_PROMPT
from fullarc.tasks.base import Instance, Invalid, Outcome, Step, Task
from fullarc.tasks.terminal.verify import hidden_tests, verify
from fullarc.tasks.words import COLORS, NATURE, THINGS

ANSWER = "answer.txt"
DONE = Step("Finished.", answer="Done.")  # it thinks, as every turn of a rollout does


@dataclass
class Job:
    """One draw of a terminal family.

    Attributes:
        after: files that must have this content in the end; None for a path that must be gone, "" with a
            path that ends in "/" for a folder that must exist. Files not named here may be anything.
        steps: the oracle's commands, without the closing answer.
        other_steps: another way to do the same, if there is one.
        run: a script that runs the agent's code on hidden inputs, and what it must print.
    """

    instruction: str
    files: dict[str, str]
    after: Mapping[str, str | None]
    steps: list[Step]
    other_steps: list[Step] = field(default_factory=list)
    run: tuple[str, str] | None = None
    level: int = 1
    facts: dict[str, str] = field(default_factory=dict)


class Shell(Task):
    """A family made by `make(rng) -> Job`."""

    kind = "terminal"

    def __init__(self, family: str, make: Callable[[random.Random], Job], held_out: bool = False) -> None:
        self.family, self._make, self.held_out = family, make, held_out

    def draw(self, rng: random.Random, seed: int) -> Instance:
        """See `Task.draw`."""
        job = self._make(rng)
        return Instance(
            self.family,
            self.kind,
            seed,
            messages=[
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": job.instruction},
            ],
            tools=[SHELL_TOOL],
            files=job.files,
            solution=[*job.steps, DONE],
            alternative=[*job.other_steps, DONE] if job.other_steps else [],
            meta={"level": job.level, **job.facts},
            tests=hidden_tests(job.after, job.run),
        )

    def grade(self, instance: Instance, answer: str, files: Mapping[str, bytes] | None = None) -> Outcome:
        """See `Task.grade`. What the agent says does not count, only its files do."""
        if files is None:
            return Invalid("a terminal episode was graded without its files")
        return verify(files, instance.tests)


def names(rng: random.Random, n: int, suffix: str = ".txt") -> list[str]:
    """`n` different file names."""
    return [f"{word}{suffix}" for word in rng.sample(THINGS + NATURE, n)]


def lines(rng: random.Random, pool: list[str], n: int, width: int = 2) -> list[str]:
    """`n` lines of `width` different words of `pool`."""
    return [" ".join(rng.sample(pool, width)) for _ in range(n)]


def text(rows: list[str]) -> str:
    """Rows as the content of a file."""
    return "".join(f"{row}\n" for row in rows)


def distractors(rng: random.Random, taken: list[str], n: int) -> dict[str, str]:
    """`n` more files with a little text, under names that are not taken."""
    free = [name for name in names(rng, n + len(taken)) if name not in taken][:n]
    return {name: text(lines(rng, COLORS, rng.randint(1, 2))) for name in free}
