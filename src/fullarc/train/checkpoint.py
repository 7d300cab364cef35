"""Resumable checkpoints: a Hugging Face folder plus `trainer/` (optimizer moments, step, data position).

Invariant: at every moment at least one complete checkpoint exists once the first was written. A new one is
written beside (atomic_dir), verified, and only then are older ones pruned; a damaged one is passed over,
with an event, for the one before it. The optimizer state is one safetensors file for each rank that wrote it, and
any number of ranks reads it back, each what it owns. No pickle: safetensors and JSON (design, contract 1).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, is_complete, verify_manifest
from fullarc.model import GlmMoeDsa, write_model
from fullarc.model.checkpoint import load_state
from fullarc.train.parallel.ranks import Ranks
from fullarc.train.trainer import Trainer

KEEP = 2
_STEP = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path,
    trainer: Trainer,
    data_state: dict[str, Any],
    tokenizer_dir: Path | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write model, tokenizer and trainer state to `folder` in one step.

    Every rank calls this: the first writes the folder, each its own part of the optimizer state.

    Args:
        data_state: JSON values, e.g. `Rows.state()`.
        extra: called with the temporary folder, to add files of the caller's own (RL: its behaviour weights).

    Raises:
        FullarcError: a weight or a router's bias is NaN or infinite; nothing is written.
    """
    ranks, model = trainer.ranks, trainer.whole_model()
    stored = model.state_dict() if ranks.first else {}
    bad = [name for name, value in stored.items() if not torch.isfinite(value).all()]
    if bad := ranks.gather(bad)[0]:
        raise FullarcError(f"{bad[0]} is not finite; the checkpoint {folder} was not written.")
    tensors, values = trainer.state()
    with atomic_dir(Path(folder)) if ranks.first else nullcontext() as temp:
        if temp is not None:
            write_model(model, temp, tokenizer_dir)
            (temp / "trainer").mkdir()
            state = {"trainer": values, "data": data_state}
            (temp / "trainer" / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            if extra is not None:
                extra(temp)
        common = Path(ranks.gather(str(temp))[0])
        save_file(tensors, common / "trainer" / _shard(ranks))
        ranks.barrier()  # all shards are there: the first rank may write the manifest
    ranks.barrier()  # the folder has its name: all may read it


def _shard(ranks: Ranks) -> str:
    """The file of one rank's part of the optimizer state."""
    part = f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}" if ranks.size > 1 else ""
    return f"optimizer{part}.safetensors"


class Shards(Mapping[str, Tensor]):
    """The tensors of several safetensors files as one mapping; a tensor is read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                self._files |= dict.fromkeys(handle.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_checkpoint(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Put weights, router biases, optimizer state and step into `trainer`; returns the data state.

    A trainer on several ranks reads what it owns, however many ranks the checkpoint was written by.

    Raises:
        FullarcError: the folder is incomplete or of another model or optimizer; the trainer is as it was.
    """
    folder = Path(folder)
    verify_manifest(folder)
    data_state = saved_data_state(folder)
    weights = GlmMoeDsa(trainer.model.config)
    load_state(weights, folder)
    values = json.loads((folder / "trainer" / "state.json").read_text())["trainer"]
    trainer.load_state(Shards(sorted((folder / "trainer").glob("optimizer*.safetensors"))), values)
    trainer.load_weights(weights.state_dict())
    return data_state


def saved_data_state(folder: Path) -> dict[str, Any]:
    """The `data_state` that a checkpoint was saved with."""
    try:
        return dict(json.loads((Path(folder) / "trainer" / "state.json").read_text())["data"])
    except OSError:
        raise FullarcError(
            f"{folder} has no trainer state: it is a model, not a resumable checkpoint."
        ) from None


@dataclass
class Steps:
    """The `step-XXXXXXXX` checkpoints of one training phase.

    Attributes:
        folder: their parent.
        event: told about damaged checkpoints that were passed over.
        keep: how many complete ones survive.
    """

    folder: Path
    event: Callable[..., None] = lambda *_, **__: None
    keep: int = KEEP

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        """Checkpoint folders, newest first, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted((p for p in found if _STEP.fullmatch(p.name)), reverse=True)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None if there is none."""
        for path in self._all():
            try:
                verify_manifest(path)
            except FullarcError as error:
                self.event("checkpoint_damaged", path=str(path), reason=str(error))
                continue
            return path
        return None

    def save(self, trainer: Trainer, data_state: dict[str, Any], tokenizer_dir: Path | None = None) -> Path:
        """Write the checkpoint of the trainer's step, verify it, then prune all but the newest `keep`.

        Damaged ones go too, and those of later steps, from which training fell back to an earlier one.
        """
        path = self.path(trainer.step_number)
        save_checkpoint(path, trainer, data_state, tokenizer_dir)
        if not trainer.ranks.first:
            return path
        verify_manifest(path)
        kept = [p for p in self._all() if p.name <= path.name and is_complete(p)][: self.keep]
        for old in (*self._all(), *self.folder.glob(".step-*")):
            if old not in kept:
                shutil.rmtree(old)
        return path

    def clear(self) -> None:
        """Remove all of them (the phase is finished and its result is elsewhere)."""
        shutil.rmtree(self.folder, ignore_errors=True)


def latest(folder: Path, event: Callable[..., None] = lambda *_, **__: None) -> Path | None:
    """The newest complete `step-XXXXXXXX` checkpoint under `folder`; see `Steps.latest`."""
    return Steps(Path(folder), event).latest()
