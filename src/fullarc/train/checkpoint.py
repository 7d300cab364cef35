"""Resumable checkpoints: a Hugging Face folder plus `trainer/` (optimizer moments, step, data position).

Invariant: at every moment at least one complete checkpoint exists once the first was written. A new one is
written beside (atomic_dir), verified, and only then are older ones pruned; a damaged one is passed over,
with an event, for the one before it. The optimizer state is written and read by `torch.distributed.checkpoint`: a
safetensors file for each rank, with what it holds of every tensor, which any number of ranks reads back, each what it
has room for. No pickle: safetensors and JSON (design, contract 1).
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, is_complete, verify_manifest
from fullarc.model import GlmMoeDsa, write_model
from fullarc.model.checkpoint import load_state
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
        writer = HuggingFaceStorageWriter(str(common / "trainer" / "optimizer"), save_distributed=True)
        with _plainly():  # returns when every rank has written: the first may add the manifest
            dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
    ranks.barrier()  # the folder has its name: all may read it


@contextmanager
def _plainly() -> Iterator[None]:
    """Without the warning that a rank is alone, which is meant, and with the error of the rank that failed as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as failed:
            error, _ = next(iter(failed.failures.values()))
            raise error from None


def _read(folder: Path, room: Callable[[str, torch.Size], Tensor | None]) -> dict[str, Tensor]:
    """The optimizer state of a checkpoint: of each tensor what `room` of its name and whole shape has room for."""
    where = folder / "trainer" / "optimizer"
    # earlier checkpoints have files of whole tensors in the folder above
    reader = HuggingFaceStorageReader(str(where if where.is_dir() else where.parent))
    saved = cast("dict[str, TensorStorageMetadata]", reader.read_metadata().state_dict_metadata)
    places = {name: room(name, about.size) for name, about in saved.items()}
    state = {name: place for name, place in places.items() if place is not None}
    with _plainly():
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name: x.to_local() if isinstance(x, DTensor) else x for name, x in state.items()}


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
    trainer.load_state(_read(folder, trainer.room), values)
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
