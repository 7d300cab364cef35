"""`Puzzle`: question, short thinking and answer in one function, graded by `verify.same`."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from fullarc.tasks.base import Instance, Outcome, Reward, Step, Task
from fullarc.tasks.reasoning.verify import same

LEVELS = (1, 2, 3)
Made = tuple[str, str, str]  # question, thought, answer
Maker = Callable[[random.Random, int], Made]


def build(family: str, seed: int, level: int, question: str, thought: str, answer: str) -> Instance:
    """An instance whose whole conversation is one question; its two ways are to lead in to thought and answer, or not.

    Behind a lead-in, what is copied from the question stands behind a space, as it does there: of a word, and more so
    of a number, a BPE has other tokens at the start of a text. Bare words teach that both are the same.
    """
    meta: dict[str, Any] = {"level": level, "answer": answer}
    messages = [{"role": "user", "content": question}]
    lead_in = [Step(f"Steps: {thought}", answer=f"Answer: {answer}")]
    bare = [Step(thought, answer=answer)]
    return Instance(family, "reasoning", seed, messages, solution=lead_in, alternative=bare, meta=meta)


def grade_answer(instance: Instance, answer: str) -> Outcome:
    """Reward 1 for the right answer, else 0."""
    return Reward(float(same(answer, str(instance.meta["answer"]))))


class Puzzle(Task):
    """A family made by `make(rng, level) -> (question, thought, answer)`; the level is drawn from 1, 2, 3."""

    kind = "reasoning"

    def __init__(self, family: str, make: Maker, held_out: bool = False) -> None:
        self.family, self._make, self.held_out = family, make, held_out

    def draw(self, rng: random.Random, seed: int) -> Instance:
        """See `Task.draw`."""
        level = rng.choice(LEVELS)
        return build(self.family, seed, level, *self._make(rng, level))

    def grade(self, instance: Instance, answer: str, files: Mapping[str, bytes] | None = None) -> Outcome:
        """See `Task.grade`."""
        return grade_answer(instance, answer)
