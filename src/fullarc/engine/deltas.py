"""Published versions that tell only what has changed since the version before, as slime's trainer writes them.

    weight_v000007/model.safetensors.index.json   "metadata": version and base_version, how it is written
    weight_v000007/*.safetensors                  of every tensor that changed, under its on-disk name, bytes by zstd;
                                                  "__metadata__": the checksum of what the tensor is now

    delta_encoding   xor         new XOR old
                     overwrite   how many bytes changed (u32), where they are (u32 each), what they are now

Invariant: a version is applied to the one that it was made from and to no other, and every tensor that it changes has
the checksum that its publisher has seen.
"""

import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fullarc.config.errors import FullarcError

INDEX = "model.safetensors.index.json"
# checksums by their names: a module and what in it makes a hash object
_HASHES = {"xxh3-128": ("xxhash", "xxh3_128"), "blake3": ("blake3", "blake3")}


class DeltaMetadata(BaseModel):
    """How a difference is written."""

    version: int
    base_version: int
    delta_encoding: str
    compression_format: str
    checksum_format: str


class _Index(BaseModel):
    metadata: dict[str, Any] | None = None


def delta_metadata(folder: Path) -> DeltaMetadata | None:
    """How a published version is written if it is a difference; None for a whole checkpoint. Raises FullarcError."""
    file = folder / INDEX
    try:
        told = (_Index.model_validate_json(file.read_bytes()).metadata or {}) if file.is_file() else {}
        return DeltaMetadata.model_validate(told) if "delta_encoding" in told else None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        raise FullarcError(f"{file} is no index: {where}{first['msg']}.", "Publish it again.") from None


def apply_delta(checkpoint: Path, folder: Path, version: int) -> None:
    """Make the files of `checkpoint`, which are of the version before, those of the published `version`.

    Raises FullarcError; then some of them may have changed.
    """
    told = delta_metadata(folder)
    if told is None or (told.version, told.base_version) != (version, version - 1):
        raise FullarcError(f"{folder} is not the difference of version {version} from the one before.")
    if told.compression_format != "zstd":
        raise FullarcError(f"{folder}: compression {told.compression_format!r} is not known.", "Use zstd.")
    checksum, changes = _checksum(told.checksum_format), dict[str, bytes]()
    sums = dict[str, str]()
    for file in sorted(folder.glob("*.safetensors")):
        with opened(file) as tensors:
            sums |= tensors.metadata() or {}
            changes |= {name: _bytes(tensors.get_tensor(name)).tobytes() for name in tensors.keys()}  # noqa: SIM118
    for file in sorted(checkpoint.glob("*.safetensors")):
        with opened(file) as old:
            metadata, names = old.metadata(), set(old.keys())
            if names.isdisjoint(changes):
                continue
            tensors = {name: old.get_tensor(name) for name in names}
        for name in names.intersection(changes):
            tensors[name] = _changed(name, tensors[name], changes.pop(name), told.delta_encoding)
            if (found := checksum(_bytes(tensors[name]))) != sums.get(name):
                raise FullarcError(
                    f"{folder}: {name} has the checksum {found} then, not {sums.get(name)}.",
                    "Publish a whole checkpoint.",
                )
        save_file(tensors, file, metadata)
    if changes:
        raise FullarcError(f"{folder} changes {min(changes)}, which the version before has not.")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The tensors of a file. Raises FullarcError where it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise FullarcError(f"{file} cannot be read: {error}.", "Publish it again.") from None


def _changed(name: str, tensor: Tensor, packed: bytes, encoding: str) -> Tensor:
    """The tensor with what has changed."""
    new = _bytes(tensor).copy()
    data = np.frombuffer(_unpacked(packed, 4 + 5 * len(new)), np.uint8)
    if encoding == "xor" and len(data) == len(new):
        new ^= data
    elif encoding == "overwrite" and len(data) >= 4:
        count = int(data[:4].view("<u4")[0])
        places, values = data[4 : 4 + 4 * count].view("<u4"), data[4 + 4 * count :]
        if len(places) != count or len(values) != count or (count and int(places.max()) >= len(new)):
            raise FullarcError(f"What is to change in {name} does not fit.", "Is it the same model?")
        new[places] = values
    else:
        raise FullarcError(
            f"{name}: {len(data)} bytes of {encoding!r} for {len(new)}.", "Use xor or overwrite."
        )
    return torch.from_numpy(new).view(tensor.dtype).view(tensor.shape)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _unpacked(packed: bytes, most: int) -> bytes:
    """What zstd has packed, if it is not more than `most` bytes."""
    try:
        import pyarrow
    except ImportError:
        raise FullarcError(
            "Differences are packed by zstd, which needs pyarrow.", "Install fullarc[data]."
        ) from None
    with pyarrow.input_stream(pyarrow.py_buffer(packed), compression="zstd") as stream:
        data: bytes = stream.read(most + 1)
    if len(data) > most:
        raise FullarcError(f"More than {most} bytes are packed where fewer belong.")
    return data


def _checksum(name: str) -> Callable[[np.ndarray], str]:
    """What makes the checksum of bytes."""
    if name == "adler32":
        return lambda data: f"{zlib.adler32(data.tobytes()):08x}"
    if name not in _HASHES:
        raise FullarcError(f"There is no checksum {name!r} here.", f"Use adler32, {' or '.join(_HASHES)}.")
    module, maker = _HASHES[name]
    try:
        make = getattr(importlib.import_module(module), maker)
    except ImportError:
        raise FullarcError(
            f"The checksum {name} needs the package {module}.", "Install it, or publish with adler32."
        ) from None

    def made(data: np.ndarray) -> str:
        found = make()
        found.update(data.tobytes())
        return str(found.hexdigest())

    return made
