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


def families(kind: str, split: str = "trained") -> list[str]:
    """Names of the families of `kind`: "trained" (seen in training), "held_out" (never seen) or "all", in order."""
    if split not in ("trained", "held_out", "all"):
        raise FullarcError(f'There is no group of families "{split}".', 'Use "trained", "held_out" or "all".')
    return [
        name
        for name, task in _tasks(kind).items()
        if split == "all" or task.held_out == (split == "held_out")
    ]


def trained(kind: str, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """The families of `kind` that a run trains on: `chosen[kind]`, or all that may be trained on.

    Raises FullarcError for a kind that does not exist, and for a family that is unknown, held out or named twice.
    """
    for name in chosen:
        _tasks(name)
    possible = families(kind, "trained")
    picked = list(chosen.get(kind, possible))
    for family in picked:
        if family not in possible or picked.count(family) > 1:
            reason = "named twice" if family in possible else f"not a {kind} family to train on"
            raise FullarcError(f'tasks.families: "{family}" is {reason}.', f"Known: {', '.join(possible)}.")
    return picked


def get(family: str) -> Task:
    """The task named `family`. FullarcError with the known names if there is none."""
    for kind in _KINDS:
        if family in _tasks(kind):
            return _tasks(kind)[family]
    known = [name for kind in _KINDS for name in _tasks(kind)]
    raise FullarcError(f'There is no task family "{family}".', f"Families: {', '.join(known)}.")
