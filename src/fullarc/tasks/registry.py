"""All task families by name; kinds are imported when they are first asked for."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module

from fullarc.config.errors import FullarcError
from fullarc.tasks.base import Task

_KINDS = ("reasoning", "terminal", "general")


def kinds() -> tuple[str, ...]:
    """The kinds of tasks: reasoning, terminal, general."""
    return _KINDS


@cache
def _tasks(kind: str) -> dict[str, Task]:
    if kind not in _KINDS:
        raise FullarcError(f'There is no kind of task "{kind}".', f"Kinds are {', '.join(_KINDS)}.")
    tasks: list[Task] = import_module(f"fullarc.tasks.{kind}").TASKS
    return {task.family: task for task in tasks}


def families(
    kind: str, split: str = "trained", chosen: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Names of the families of `kind`: "trained" (seen in training), "held_out" (never seen) or "all" of them.

    Args:
        chosen: a recipe's `tasks.families`: per kind, the only ones that are trained; a kind not named has all.

    Raises:
        FullarcError: no such kind or group, or `chosen` names what may not be trained on, twice, or nothing.
    """
    if split not in ("trained", "held_out", "all"):
        raise FullarcError(f'There is no group of families "{split}".', 'Use "trained", "held_out" or "all".')
    for name in chosen or {}:
        _tasks(name)
    held_out = [name for name, task in _tasks(kind).items() if task.held_out]
    possible = [name for name in _tasks(kind) if name not in held_out]
    trained = list((chosen or {}).get(kind, possible))
    wrong = {
        "not a family of its kind that may be trained on": [n for n in trained if n not in possible],
        "named twice": [n for n in trained if trained.count(n) > 1],
    }
    for reason, names in wrong.items():
        if names:
            raise FullarcError(
                f'tasks.families.{kind}: "{names[0]}" is {reason}.', f"Known: {', '.join(possible)}."
            )
    if not trained:
        raise FullarcError(
            f"tasks.families.{kind} is empty.", "To leave a kind out, take it out of the stages' mix."
        )
    return {"trained": trained, "held_out": held_out, "all": [*trained, *held_out]}[split]


def get(family: str) -> Task:
    """The task named `family`. FullarcError with the known names if there is none."""
    for kind in _KINDS:
        if family in _tasks(kind):
            return _tasks(kind)[family]
    known = [name for kind in _KINDS for name in _tasks(kind)]
    raise FullarcError(f'There is no task family "{family}".', f"Families: {', '.join(known)}.")
