"""New weights beside the running ones: verified, merged, fused, and only then handed to the scheduler.

Tensors that come in parts (a stream of buckets) are merged into a copy of the last complete weights under their on-disk
names, an MTP layer included; it is read from the folder that was loaded (see `origin`) when the first part comes, and
not at all when all come. No tensor that the engine reads is ever written to: parts replace. What the engine does not
keep (an MTP layer, where nothing is drafted) is taken and ignored.

Only safetensors is read. A pickle is refused by its first byte: unpickling runs the sender's code.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.files import MANIFEST
from fullarc.engine.backend import Weights, kernels_of, prepare
from fullarc.engine.engine import check_finite, load
from fullarc.engine.origin import Change, Origin
from fullarc.model import GlmMoeDsa
from fullarc.model.checkpoint import fill_state

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")


class Staging:
    """Where the next weights are put together. Not thread-safe: one update at a time.

    What was put together becomes the base of the next parts when `commit` says that the engine runs it.
    """

    def __init__(self, origin: Origin, running: Weights) -> None:
        self.origin, self.dtype, self.kernels = origin, running.dtype, kernels_of(running)
        self.drafts, self._mtp_layers = running.has_mtp, running.config.num_nextn_predict_layers
        self._tensors: dict[str, Tensor] | None = None
        self._next: tuple[Origin, dict[str, Tensor] | None] = origin, None

    def commit(self) -> None:
        """The engine runs what was put together last."""
        self.origin, self._tensors = self._next

    def from_folder(self, folder: str, version: str, manifest_sha256: str | None = None) -> Weights:
        """The weights of a checkpoint folder; its manifest's own hash must be `manifest_sha256` if that is given."""
        try:
            if manifest_sha256 is not None:
                _check_manifest(Path(folder) / MANIFEST, manifest_sha256)
            weights, origin = load(folder, version, self.dtype, self.kernels, self.drafts)
        except OSError as error:
            raise FullarcError(
                f"{folder[:200]} cannot be read: {error.strerror}.", "Is it a folder?"
            ) from None
        self._next = origin, None
        return weights

    def check(self, parts: dict[str, Tensor]) -> None:
        """Raise FullarcError for a tensor that the model has not, or has in another shape, or that is of integers."""
        self.origin.check("tensors")
        for name, value in parts.items():
            shape = self.origin.shapes.get(name)
            if shape is None:
                raise FullarcError(
                    f"The model has no tensor {name[:200]}.", "Send on-disk names of this model."
                )
            if value.shape != shape:
                raise FullarcError(f"{name} has shape {tuple(value.shape)}, the engine runs {tuple(shape)}.")
            if not value.is_floating_point():
                raise FullarcError(f"{name} is {value.dtype}, and no floating-point numbers.")

    def from_tensors(self, parts: dict[str, Tensor], version: str) -> Weights:
        """The present weights with `parts` in the place of the tensors of the same names; they are read if some stay.

        Raises FullarcError for what `check` refuses, for no tensors, or for values that are not finite.
        """
        if not parts:
            raise FullarcError("The update has no tensors.", "Send at least one.")
        self.check(parts)
        base = {} if len(parts) == len(self.origin.shapes) else self.tensors("tensors")
        tensors = {n: parts[n].float() if n in parts else base[n] for n in self.origin.shapes}
        with torch.device("meta"):
            model = GlmMoeDsa(
                self.origin.config.model_copy(update={"num_nextn_predict_layers": self._mtp_layers})
            )
        fill_state(model, dict(tensors), Path("the update"))
        check_finite(model, "the update")
        weights = prepare(model.eval(), version, self.dtype, self.kernels)
        self._next = self.origin, tensors
        return weights

    def zeroed(self, skipped: Sequence[str], version: str) -> Weights:
        """The present weights with zeros in the place of every tensor whose name has no part of `skipped`."""
        shapes = self.origin.shapes.items()
        named = {name: shape for name, shape in shapes if not any(part in name for part in skipped)}
        return self.from_tensors({name: torch.zeros(shape) for name, shape in named.items()}, version)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the bytes of every tensor of the present weights, by its on-disk name."""
        tensors = self.tensors(None)
        flat = ((name, tensor.contiguous().view(-1).view(torch.uint8)) for name, tensor in tensors.items())
        return {name: hashlib.sha256(data.numpy().tobytes()).hexdigest() for name, data in flat}

    def values(self, name: str, count: int) -> list[float]:
        """The first numbers of a tensor of the present weights, by its on-disk name. Raises FullarcError."""
        if name not in self.origin.shapes:
            raise FullarcError(f"The model has no tensor {name[:200]}.", "Use on-disk names of this model.")
        return self.tensors(None)[name].flatten()[:count].float().tolist()

    def tensors(self, change: Change | None, coming: bool = False) -> dict[str, Tensor]:
        """On-disk names and tensors of the present weights, or of those put together last.

        Raises FullarcError if they are quantised and cannot `change` so, or lie no longer where they came from.
        """
        origin, tensors = self._next if coming else (self.origin, self._tensors)
        return tensors or origin.tensors(change)


def _check_manifest(manifest: Path, sha256: str) -> None:
    """Raise FullarcError unless the file has this hash."""
    found = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "absent"
    if found != sha256.lower():
        raise FullarcError(
            f"{manifest.parent}: the manifest's SHA-256 is {found}, not {sha256[:64]}.",
            "It is another checkpoint than the one meant.",
        )


def decode_tensors(encoded: list[str]) -> dict[str, Tensor]:
    """Named tensors from base64 of safetensors. Raises FullarcError, also for pickles."""
    tensors: dict[str, Tensor] = {}
    for text in encoded:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise FullarcError("serialized_named_tensors is not base64.", _HOW) from None
        tensors |= read_safetensors(data)
    return tensors


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """Named tensors from the bytes of a safetensors file. Raises FullarcError, also for pickles."""
    if data[:1] == b"\x80" and data[1:2] <= b"\x06":
        raise FullarcError("This is a pickle, and pickles are never read.", _HOW)
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise FullarcError(f"This is not safetensors: {str(error)[:200]}.", _HOW) from None


def read_shared_memory(name: str, sha256: str | None) -> dict[str, Tensor]:
    """Named tensors from a POSIX shared-memory object that holds a safetensors file."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise FullarcError("shared_memory must be the name of a shared-memory object, without slashes.")
    try:
        data = (SHARED_MEMORY / name).read_bytes()
    except OSError as error:
        raise FullarcError(
            f"Shared memory {name} cannot be read: {error.strerror}.", "Is it of this machine?"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise FullarcError(
            f"Shared memory {name} has SHA-256 {found}, not {sha256[:64]}.", "Write it whole first."
        )
    return read_safetensors(data)


_HOW = "Send base64 of safetensors.torch.save({name: tensor})."
