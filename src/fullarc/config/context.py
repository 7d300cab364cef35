"""What a stage is given: its settings, where it reads and writes, and how it reports.

A stage is a function `run(ctx) -> dict` that can be imported and called alone. It reads `ctx.model_in`, writes
under `ctx.out`, and tells the world through `ctx.log` and `ctx.event`; the run folder is its only memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def silent(*_: Any, **__: Any) -> None:
    """Default reporter: say nothing."""


@dataclass
class StageContext:
    """Everything a stage may use.

    Attributes:
        recipe: the resolved recipe of the run.
        stage: this stage's own settings (one of the models in `config.stages`).
        name: the stage's name, e.g. "pretrain".
        run_dir: the run folder.
        out: this stage's folder, `run_dir/stages/<name>`; may hold partial work of a killed attempt.
        model_in: checkpoint folder to start from; None for the first model stage.
        seed: the run's seed.
        log: `log(step, total=…, **metrics)` appends to metrics.jsonl and moves the progress display.
        event: `event(kind, **fields)` appends to events.jsonl.
    """

    recipe: Any
    stage: Any
    name: str
    run_dir: Path
    out: Path
    model_in: Path | None
    seed: int
    log: Callable[..., None] = field(default=silent)
    event: Callable[..., None] = field(default=silent)

    @property
    def checkpoint(self) -> Path:
        """Where this stage's final checkpoint goes."""
        return self.out / "checkpoint"
