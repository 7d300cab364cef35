"""The folder that an engine's weights were loaded from: what it held then, and its tensors as long as it holds them.

A part of the weights takes the place of tensors of that folder. Another checkpoint may lie there by now, or nothing.

Invariant: tensors of two checkpoints are never mixed.
"""

from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.files import MANIFEST, sha256
from fullarc.model import GlmMoeDsa, load_model
from fullarc.model.checkpoint import is_quantized, state_to_disk, stored_config

Change = Literal["tensors", "adapters"]
_QUANTISED: dict[Change, tuple[str, str]] = {
    "tensors": (
        "no tensor can take another's place",
        "Update from a whole folder, or start from the checkpoint that it was made of.",
    ),
    "adapters": (
        "no adapter can be merged into them",
        "Unload the adapters, or take the checkpoint that it was made of.",
    ),
}


def identify(folder: str | Path) -> str:
    """What tells a checkpoint from another one in its place: its manifest's hash, or its files' sizes and times."""
    folder = Path(folder)
    try:
        if (folder / MANIFEST).is_file():
            return sha256(folder / MANIFEST)
        found = [(f.name, f.stat()) for f in (folder / "config.json", *sorted(folder.glob("*.safetensors")))]
    except (OSError, ValueError):
        return ""
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


class Origin:
    """A folder that has just been loaded. `identity`: what it was called by `identify` before that.

    Attributes:
        config: of all that is stored.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder, self._identity = str(folder), identity
        self.config, self._quantized = stored_config(Path(folder)), is_quantized(Path(folder))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor, by its on-disk name."""
        with torch.device("meta"):
            return {name: value.shape for name, value in state_to_disk(GlmMoeDsa(self.config)).items()}

    def check(self, change: Change | None) -> None:
        """Raise FullarcError if its weights are quantised and cannot `change` so."""
        if change and self._quantized:
            cannot, hint = _QUANTISED[change]
            raise FullarcError(
                f"{self.folder} is quantised: its matrices are integers with scales, so {cannot}.", hint
            )

    def tensors(self, change: Change | None) -> dict[str, Tensor]:
        """On-disk names and tensors, to `change` them so. Raises FullarcError if they cannot be had any more."""
        self.check(change)
        if identify(self.folder) != self._identity:
            raise FullarcError(
                f"{self.folder} holds no longer what the engine loaded from it.",
                "Send all tensors, or load a folder.",
            )
        return {name: value.detach() for name, value in state_to_disk(load_model(self.folder)).items()}
