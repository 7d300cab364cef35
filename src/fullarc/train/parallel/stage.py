"""A training stage in several processes of this machine, for whoever calls it an ordinary function.

Invariant: with `processes = 1` nothing here runs and no process is started. Otherwise this process trains nothing:
it waits, and passes on what the first rank reports.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from fullarc.config.context import StageContext, silent
from fullarc.train.parallel.launch import launch
from fullarc.train.parallel.ranks import ALONE, Ranks

Stage = Callable[[StageContext, Ranks], dict[str, float]]


def in_processes(stage: Stage) -> Callable[..., dict[str, float]]:
    """Make `stage(ctx, ranks)` a function of `ctx` that runs in the `processes` of the stage's settings."""

    @wraps(stage)
    def run(ctx: StageContext, ranks: Ranks | None = None) -> dict[str, float]:
        if ranks is not None or ctx.stage.processes == 1:
            return stage(ctx, ranks or ALONE)
        report = {"log": ctx.log, "event": ctx.event}

        def hear(kind: str, *values: Any, **named: Any) -> None:
            report[kind](*values, **named)

        mute = replace(ctx, log=silent, event=silent)  # the callers' own cannot travel
        return launch(_one_rank, ctx.stage.processes, run, mute, hear=hear)[0]

    return run


def _one_rank(ranks: Ranks, run: Callable[..., dict[str, float]], ctx: StageContext) -> dict[str, float]:
    if ranks.first:
        ctx = replace(ctx, log=partial(ranks.tell, "log"), event=partial(ranks.tell, "event"))
    return run(ctx, ranks)
