"""Packed rows: the only thing the trainer ever reads from the data stage.

A rows folder holds `ids.npy` uint16 [N, T], `loss.npy` uint8 [N, T] (1 = this token is a training target),
`docs.npy` uint16 [N, T] (document number within the row, 0 = padding), `parents.npy` uint16 [N, T] (the document
of the row that this token's one continues, 0 = none) and `meta.json`. The files are memory-mapped; a batch has a
fixed shape.

Invariant: the k-th batch is a pure function of (folder, sizes of the batches so far, seed). Each epoch visits every row
once in the order of a permutation drawn from `derive(seed, "rows", epoch)`; a batch may span two epochs. The whole
position is `(epoch, cursor)`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.seeds import derive


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. `docs_BT` numbers the documents of a row (0 = padding), `parents_BT` those they continue.

    `isolate` says whether documents may attend to each other: True for best-fit packing (mid-training, SFT),
    False for the plain concatenation of pre-training.
    """

    ids_BT: Tensor
    loss_BT: Tensor
    docs_BT: Tensor
    parents_BT: Tensor
    isolate: bool

    @property
    def structure(self) -> dict[str, Tensor | None]:
        """What the model is told of a row's documents: nothing when the row counts as one document."""
        if not self.isolate:
            return {"doc_ids": None, "parent_ids": None}
        return {"doc_ids": self.docs_BT, "parent_ids": self.parents_BT if self.parents_BT.any() else None}

    def targets(self, shift: int) -> tuple[Tensor, Tensor]:
        """The token `shift` places ahead of each position, and whether predicting it is trained.

        Returns targets int64 [B, T] and a bool mask [B, T]. A target is trained when its loss flag is set
        (padding never has one) and both ends lie in one document; only the next token (shift 1) of concatenated
        rows may lie in the next document, as plain concatenation means.
        """
        targets_BT = torch.zeros_like(self.ids_BT)
        mask_BT = torch.zeros_like(self.loss_BT)
        if shift < self.ids_BT.shape[1]:
            here_BT, there_BT = self.docs_BT[:, :-shift], self.docs_BT[:, shift:]
            allowed_BT = (
                (here_BT == there_BT)
                if self.isolate or shift > 1
                else torch.ones_like(here_BT, dtype=torch.bool)
            )
            targets_BT[:, :-shift] = self.ids_BT[:, shift:]
            mask_BT[:, :-shift] = self.loss_BT[:, shift:] & allowed_BT & (here_BT > 0)
        return targets_BT, mask_BT

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows start..stop as a batch of their own."""
        part = slice(start, stop)
        return Batch(
            self.ids_BT[part], self.loss_BT[part], self.docs_BT[part], self.parents_BT[part], self.isolate
        )

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` rows, in order."""
        return [self.rows(i, i + size) for i in range(0, len(self.ids_BT), size)]


class Rows:
    """Endless, resumable stream of batches of `batch` shuffled rows from `folder`.

    Args:
        folder: rows folder.
        batch: rows per batch.
        seed: seed of the order.
        vocab_size: when given, every token id of the folder must be below it.
        held: rows that are left out of the stream (at most half of all), at equal distances in the folder: best-fit
            packing puts the longest documents first and the shortest last.

    Raises:
        FullarcError: the folder is incomplete, empty, has ids outside the vocabulary, or nothing to train on.
    """

    def __init__(
        self, folder: Path, batch: int, seed: int, vocab_size: int | None = None, held: int = 0
    ) -> None:
        self.folder, self.batch, self.seed = Path(folder), batch, seed
        if batch < 1:
            raise ValueError(f"batch must be at least 1 row, got {batch}")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self._ids, self._loss, self._docs, self._parents = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r")
                for name in ("ids", "loss", "docs", "parents")
            )
        except (OSError, ValueError) as error:
            hint = "Run the data stage again."
            raise FullarcError(
                f"{self.folder} is not a readable folder of packed rows: {error}.", hint
            ) from None
        self._check(vocab_size)
        rows = np.arange(len(self._ids))
        self._held = rows[:: max(1, len(rows) // held)][: min(held, len(rows) // 2)] if held else rows[:0]
        self._stream = np.setdiff1d(rows, self._held)
        self.epoch, self.cursor = 0, 0
        self._order = self._permutation(0)

    def _check(self, vocab_size: int | None) -> None:
        shapes = {self._ids.shape, self._loss.shape, self._docs.shape, self._parents.shape}
        if len(shapes) != 1 or self._ids.ndim != 2:
            raise FullarcError(
                f"{self.folder}: ids, loss, docs and parents must have one shape [N, T], found {shapes}."
            )
        if 0 in self._ids.shape:
            raise FullarcError(
                f"{self.folder} holds no rows.", "Give the data stage more text or a shorter length."
            )
        if vocab_size is not None and int(self._ids.max()) >= vocab_size:
            row, place = np.argwhere(self._ids >= vocab_size)[0]
            raise FullarcError(
                f"{self.folder}: token id {self._ids[row, place]} (row {row}, position {place}) is outside "
                f"the model's vocabulary of {vocab_size}.",
                "The rows were packed with another tokenizer: run the data stage again.",
            )
        if not self._loss.any():
            raise FullarcError(f"{self.folder}: no token is a training target (loss.npy is all zero).")

    def __len__(self) -> int:
        """Rows in the stream."""
        return len(self._stream)

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self._ids.shape[1]

    def _permutation(self, epoch: int) -> np.ndarray:
        shuffle = np.random.Generator(np.random.PCG64(derive(self.seed, "rows", epoch))).permutation
        return self._stream[shuffle(len(self))]

    def next(self, batch: int | None = None) -> Batch:
        """The next batch (of `batch` rows, if it is not as large as all); moves the position."""
        size = batch or self.batch
        picked: list[int] = []
        while len(picked) < size:
            if self.cursor == len(self):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation(self.epoch)
            take = self._order[self.cursor : self.cursor + size - len(picked)]
            picked.extend(int(i) for i in take)
            self.cursor += len(take)
        return self.at(picked)

    def at(self, rows: list[int]) -> Batch:
        """The batch of the given row numbers; does not move the position."""
        ids_BT = torch.from_numpy(self._ids[rows].astype(np.int64))
        docs_BT = torch.from_numpy(self._docs[rows].astype(np.int64))
        loss_BT = torch.from_numpy(self._loss[rows].astype(np.bool_))
        parents_BT = torch.from_numpy(self._parents[rows].astype(np.int64))
        return Batch(ids_BT, loss_BT, docs_BT, parents_BT, bool(self.meta.get("isolate", True)))

    def held_rows(self) -> Batch:
        """The rows left out of the stream, as one batch."""
        return self.at(self._held.tolist())

    def state(self) -> dict[str, int]:
        """Position of the next batch."""
        return {"epoch": self.epoch, "cursor": self.cursor, "rows": len(self._ids), "length": self.length}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue at a position from `state()`; the rows must be the ones that it was taken from."""
        if (state["rows"], state["length"]) != self._ids.shape:
            raise FullarcError(
                f"{self.folder} now holds {self._ids.shape} tokens but the checkpoint was trained on "
                f"({state['rows']}, {state['length']}).",
                "The data changed during the run: start this stage again.",
            )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._permutation(self.epoch)
