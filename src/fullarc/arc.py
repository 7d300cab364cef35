"""The arc: raw text to agent, one stage after another. The table below is the architecture diagram.

Invariant: a stage that has finished is never run again, a stage that was interrupted goes on where it was, and a
stage whose settings (or whose ancestors' settings) changed is never silently mixed with the old ones. The run folder
is the only memory: killing this process at any moment loses nothing that a file did not already hold.
"""

import errno
import importlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError, Interrupted
from fullarc.config.files import atomic_write, verify_manifest
from fullarc.config.machine import machine
from fullarc.config.recipe import Recipe, Resolved
from fullarc.config.runfolder import RESOLVED, RunFolder, digest
from fullarc.config.show import to_toml
from fullarc.config.stages import Distil, RLStage

# step -> what is called, in order, each with the same StageContext; "module:function", imported when it is reached
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "data": ("fullarc.tasks.demos:write_language", "fullarc.data.stage:run"),
    "pretrain": ("fullarc.train.stages:run_pretrain",),
    "midtrain": (
        "fullarc.tasks.demos:run_stage",
        "fullarc.data.stage:pack_conversations",
        "fullarc.train.stages:run_midtrain",
    ),
    "dsa": ("fullarc.train.stages:run_dsa",),
    "sft": (
        "fullarc.tasks.demos:run_stage",
        "fullarc.data.stage:pack_conversations",
        "fullarc.train.stages:run_sft",
    ),
    "reasoning_rl": ("fullarc.rl.stages:run_reasoning",),
    "agentic_rl": ("fullarc.rl.stages:run_agentic",),
    "general_rl": ("fullarc.rl.stages:run_general",),
    "distil": ("fullarc.rl.stages:run_distil",),
    "eval": ("fullarc.evals.stage:run",),
    "report": ("fullarc.view.report:write",),
}
# settings that change how fast a step goes but not what comes out (several processes, compiled layers: up to rounding)
NOT_RESULT = {
    "threads",
    "save_every",
    "log_every",
    "concurrency",
    "engines",
    "processes",
    "parallel",
    "checkpoint_activations",
    "compile",
}
IN_SANDBOX = {"midtrain", "sft", "reasoning_rl", "agentic_rl", "general_rl", "distil", "eval"}


class Reporter(Protocol):
    """Where progress is shown; see `fullarc.progress`."""

    def plan(self, steps: list[str], done: list[str]) -> None:
        """The steps of the run in order, and which of them are already finished."""

    def start(self, step: str) -> None:
        """A step begins."""

    def log(self, step: str, at: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        """A step reports."""

    def end(self, step: str, seconds: float) -> None:
        """A step has finished."""


@dataclass(frozen=True)
class Step:
    """One unit of work with its own folder: `data`, a stage, or a stage's `…/eval`."""

    name: str
    kind: str
    settings: Any
    digest: str
    models: tuple[str, ...] = ()
    """Steps whose checkpoints it reads; the first one is the model it starts from."""


def plan(recipe: Recipe) -> list[Step]:
    """The steps of a recipe in order. A digest covers everything the step's result depends on."""
    dump = recipe.model_dump(mode="json")
    chain = digest(recipe.seed, dump["data"], dump["model"], dump["tasks"])
    steps = [Step("data", "data", recipe.data, chain)]
    model: tuple[str, ...] = ()
    for name, stage in recipe.stages.items():
        settings = {key: value for key, value in dump["stages"][name].items() if key not in NOT_RESULT}
        if isinstance(stage, RLStage):
            settings["dtype"] = dump["engine"]["dtype"]
        chain = digest(chain, name, settings, dump["sandbox"] if stage.type in IN_SANDBOX else None)
        teachers = tuple(dict.fromkeys(stage.teachers.values())) if isinstance(stage, Distil) else ()
        steps.append(Step(name, stage.type, stage, chain, model + teachers))
        model = (name,)
        if recipe.eval.after == "each" or name == recipe.arc[-1]:
            steps.append(
                Step(f"{name}/eval", "eval", recipe.eval, digest(chain, dump["eval"], dump["sandbox"]), model)
            )
    return steps


def run(
    resolved: Resolved,
    *,
    source: str = "",
    restart_from: str = "",
    only: str = "",
    model_in: Path | None = None,
    reporter: Reporter | None = None,
    functions: Mapping[str, tuple[str, ...]] = FUNCTIONS,
) -> Path:
    """Run a recipe, or go on with it, and return the run folder.

    Args:
        source: the recipe file's name, for the events.
        restart_from: a stage that, with everything after it, is moved aside and done again.
        only: run this one step alone.
        model_in: with `only`, the checkpoint to start from instead of the previous stage's.

    Raises:
        FullarcError: settings of a finished stage changed, a checkpoint is damaged, the disk is full, …
        Interrupted: SIGINT or SIGTERM; the same command goes on.
    """
    recipe, folder = resolved.recipe, RunFolder(resolved.recipe.run_dir)
    steps = plan(recipe)
    with folder.lock(), _stoppable(folder):
        if restart_from:
            _move_aside(folder, steps, restart_from)
        todo = steps if not only else [_find(steps, only)]
        _check_settings(folder, todo)
        atomic_write(folder.path / RESOLVED, to_toml(resolved))
        done = [step.name for step in todo if folder.is_done(step.name)]
        folder.event(
            "run_resume" if done else "run_start",
            recipe=source,
            machine=machine(),
            steps=[s.name for s in todo],
        )
        if reporter:
            reporter.plan([step.name for step in todo], done)
        for step in todo:
            if step.name not in done:
                _do(recipe, folder, step, model_in, reporter, functions)
        if not only:
            _call(functions["report"][0])(folder.path)
        folder.event("run_end")
    return folder.path


def _do(
    recipe: Recipe,
    folder: RunFolder,
    step: Step,
    model_in: Path | None,
    reporter: Reporter | None,
    functions: Mapping[str, tuple[str, ...]],
) -> None:
    """Run one step to its end and write its done.json."""
    if model_in is None:
        for name in step.models:
            _verify(folder, name, step.name)
        model_in = folder.step(step.models[0]) / "checkpoint" if step.models else None
    is_eval = step.kind == "eval"
    stage = step.name.removesuffix("/eval")
    before = folder.read(step.name, "settings.json") or {}
    attempt, parts = before.get("attempt", 0) + 1, before.get("parts", {})
    state = {"digest": step.digest, "attempt": attempt, "parts": parts}
    folder.write(step.name, "settings.json", state)
    folder.event(
        "eval_start" if is_eval else "stage_start" if attempt == 1 else "stage_resume",
        stage=stage,
        attempt=attempt,
    )

    def log(at: int, total: int | None = None, **metrics: Any) -> None:
        if not is_eval:
            folder.metric(stage, at, **metrics)
        if reporter:
            reporter.log(step.name, at, total, metrics)

    def event(kind: str, **fields: Any) -> None:
        folder.event(kind, **{"stage": stage, **fields})

    context = StageContext(
        recipe, step.settings, stage, folder.path, folder.step(step.name), model_in, recipe.seed, log, event
    )
    if reporter:
        reporter.start(step.name)
    began = time.monotonic()
    for name in functions[step.kind]:
        if name not in parts:  # a part that finished in an earlier attempt is not repeated
            parts[name] = _call(name)(context) or {}
            folder.write(step.name, "settings.json", state)
    seconds = time.monotonic() - began
    if not is_eval and step.kind != "data":
        _verify(folder, step.name, "the next stage")
    metrics = {key: value for part in parts.values() for key, value in part.items()}
    done = {
        "stage": stage,
        "seconds": seconds,
        "attempts": attempt,
        "digest": step.digest,
        "metrics": metrics,
    }
    folder.write(step.name, "done.json", done)
    folder.event("eval_end" if is_eval else "stage_end", stage=stage, seconds=seconds, attempts=attempt)
    if reporter:
        reporter.end(step.name, seconds)


def _call(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _find(steps: list[Step], name: str) -> Step:
    for step in steps:
        if step.name == name:
            return step
    raise FullarcError(
        f"There is no stage '{name}' in this recipe.", f"It has: {', '.join(s.name for s in steps)}."
    )


def _move_aside(folder: RunFolder, steps: list[Step], first: str) -> None:
    start = steps.index(_find(steps, first))
    aside = folder.move_aside([step.name for step in steps[start:]])
    if aside:
        folder.event("moved_aside", folder=str(aside), first=first)


def _check_settings(folder: RunFolder, steps: list[Step]) -> None:
    """Refuse to mix settings: every finished or started stage must have been run with this recipe's.

    Nothing is built on an evaluation, so one whose settings changed is simply done again.
    """
    ran = {step.name: folder.read(step.name, "settings.json") for step in steps}
    changed = [step for step in steps if (before := ran[step.name]) and before.get("digest") != step.digest]
    for step in changed:
        if step.kind != "eval":
            raise FullarcError(
                f"{folder.path}: '{step.name}' was already run with other settings than this recipe's.",
                f"Choose another --name, or redo it with --from {step.name} (old files are kept in aside/).",
            )
    folder.move_aside([step.name for step in changed])


def _verify(folder: RunFolder, name: str, reader: str) -> None:
    try:
        verify_manifest(folder.step(name) / "checkpoint")
    except FullarcError as error:
        raise FullarcError(
            f"{reader} needs the checkpoint of '{name}', but {error.message}",
            f"Make it again with --from {name} (old files are kept in aside/).",
        ) from None


@contextmanager
def _stoppable(folder: RunFolder) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and a full disk into one sentence; record what ended the run."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    except KeyboardInterrupt as error:
        why = str(error) or "SIGINT"
        folder.event("interrupted", signal=why)
        raise Interrupted(
            f"Stopped by {why}; {folder.path} is safe.", "Type the same command to go on."
        ) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or folder.path
        raise FullarcError(
            f"The disk is full ({where}).", "Free some space and type the same command to go on."
        ) from None
    except Exception as error:
        folder.event("error", message=f"{type(error).__name__}: {error}")
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
