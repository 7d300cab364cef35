"""The folder of a run: who may write it, what is finished, and with which settings.

    runs/<name>/  recipe.resolved.toml  events.jsonl  metrics.jsonl  lock  report.{html,json}
                  data/{tokenizer, rows/<stage>, …}  stages/<stage>/{settings.json, done.json, checkpoint/, eval/, …}
                  aside/<n>/…

Invariants: one process at a time writes; a step with a `done.json` is never run again; what a finished or started
step was run with is known by its digest, which covers everything before it; nothing is ever deleted, only moved aside.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fullarc.config.errors import FullarcError
from fullarc.config.files import append_jsonl, atomic_write, read_jsonl

RESOLVED = "recipe.resolved.toml"
"""The run's recipe, every value written out."""

CONVERSATIONS = "demos/conversations.jsonl"
"""Demonstrations in a stage's folder, one a line: messages (OpenAI's form), tools, perhaps clear_thinking."""

LANGUAGE = "language.jsonl"
"""In the data folder, what training tasks say, {"text"} a line: a part of the tokenizer's sample."""


def digest(*parts: Any) -> str:
    """Hex SHA-256 of JSON-able parts, independent of key order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class RunFolder:
    """Bookkeeping of one run folder. Steps are named `data`, `pretrain`, `pretrain/eval`, …"""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def step(self, name: str) -> Path:
        """The folder of a step."""
        return self.path / "data" if name == "data" else self.path / "stages" / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the kernel frees it when the process dies, however it dies.

        Raises FullarcError naming the process that holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise FullarcError(
                    f"{self.path} is in use by process {file.read().strip() or '?'}.",
                    "Wait for it, stop it, or choose another --name.",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def event(self, kind: str, **fields: Any) -> None:
        """Append to events.jsonl."""
        append_jsonl(self.path / "events.jsonl", {"kind": kind, "time": time.time(), **fields})

    def metric(self, stage: str, step: int, **values: Any) -> None:
        """Append to metrics.jsonl; a reader takes the last record of a (stage, step)."""
        append_jsonl(
            self.path / "metrics.jsonl", {"stage": stage, "step": step, "time": time.time(), **values}
        )

    def read(self, name: str, file: str) -> dict[str, Any] | None:
        """A JSON file of a step, None if it is absent or damaged."""
        try:
            value = json.loads((self.step(name) / file).read_text())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, name: str, file: str, value: dict[str, Any]) -> None:
        """Atomically write a JSON file of a step."""
        atomic_write(self.step(name) / file, json.dumps(value, indent=1, default=str))

    def is_done(self, name: str) -> bool:
        """True once the step has finished."""
        return self.read(name, "done.json") is not None

    def move_aside(self, names: list[str]) -> Path | None:
        """Move steps, with the rows packed for them, their metrics and events, to `aside/<n>`.

        Returns that folder, None if nothing was there.
        """
        own = [folder for name in names for folder in (self.step(name), self.path / "data" / "rows" / name)]
        folders = [folder.relative_to(self.path) for folder in own if folder.exists()]
        if not folders:
            return None
        taken = [int(path.name) for path in self.path.glob("aside/*") if path.name.isdigit()]
        aside = self.path / "aside" / f"{max(taken, default=0) + 1:03d}"
        for folder in folders:
            if (self.path / folder).exists():  # a part of a step may have moved with it
                (aside / folder).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.path / folder, aside / folder)
        for file in ("metrics.jsonl", "events.jsonl"):
            self._split(file, aside, lambda record: record.get("stage") in names)
        return aside

    def _split(self, file: str, aside: Path, moved: Callable[[dict[str, Any]], bool]) -> None:
        records = read_jsonl(self.path / file)
        for path, keep in ((aside / file, True), (self.path / file, False)):
            lines = [json.dumps(record, ensure_ascii=False) for record in records if moved(record) is keep]
            atomic_write(path, "".join(f"{line}\n" for line in lines))
