"""Published weights come to this host: slime's /pull_weights, before /update_weights_from_disk.

A trainer publishes version N as the folder `weight_v{N:06d}` on a file system that both see: a whole checkpoint, or
what has changed since the version before (see `deltas`). Here the newest whole one up to the version that is asked for,
or what was pulled before, or for version 0 the engine's first checkpoint, is copied into a folder of this host, with
all changes from there on; the folder is replaced at once or not at all.

Invariants: only a folder that came by pulling is ever replaced; of several engines of a host that pull one version into
one folder, one does it and the others find it there.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.config.errors import FullarcError
from fullarc.config.files import MANIFEST, atomic_dir, verify_manifest
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.api.updates import Updates
from fullarc.engine.deltas import apply_delta, delta_metadata, opened
from fullarc.model.checkpoint import load_config

MARK = "pulled.json"


class PullBody(BaseModel):
    """POST /pull_weights."""

    model_config = ConfigDict(extra="ignore")
    local_checkpoint_dir: str = Field(min_length=1, max_length=4096)
    source_dir: str = Field(min_length=1, max_length=4096)
    target_version: int = Field(ge=0)


class Pull:
    """The handler."""

    def __init__(self, service: Service, updates: Updates) -> None:
        self.updates, self.base = updates, Path(service.model_path)

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/pull_weights", self.pull, body=PullBody)]

    async def pull(self, http: HttpRequest) -> Response:
        """Copy a published version."""
        body = await read_body(http, PullBody)
        try:
            async with self.updates.lock:  # not while a folder is being read
                where = Path(body.source_dir), Path(body.local_checkpoint_dir)
                await asyncio.to_thread(pull, *where, body.target_version, self.base)
        except FullarcError as error:
            return answer({"success": False, "message": str(error)}, 400)
        return answer(
            {"success": True, "message": f"{body.local_checkpoint_dir} is version {body.target_version}."}
        )


def pull(source: Path, local: Path, version: int, base: Path | None = None) -> None:
    """Make `local` the published `version`; nothing is done if it is that already. `base`: version 0.

    Raises FullarcError if there is no such version, or `local` is a folder of somebody's own.
    """
    try:
        if not local.parent.exists():
            _seed(source, local, version, base)  # no folder is made for what cannot be pulled
        with _alone(local.parent):
            if found := _seed(source, local, version, base):
                _copy(source, local, version, *found)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, FullarcError):
            raise
        raise FullarcError(f"Version {version} cannot be pulled from {source}: {error!r:.300}.") from None


def _seed(source: Path, local: Path, version: int, base: Path | None) -> tuple[Path, int] | None:
    """The folder to begin with, which is whole, and its version; None if `version` is there already."""
    here = _pulled(local)
    if here == _told(source, version):
        return None
    first = version
    while here != _told(source, first) and first > 0 and delta_metadata(_published(source, first)):
        first -= 1
    seed = local if here == _told(source, first) else _published(source, first)
    if first == 0 and base and not seed.exists():
        seed = base
    load_config(seed)
    if not list(seed.glob("*.safetensors")):
        raise FullarcError(f"{seed} has no safetensors.", "Publish whole checkpoints first.")
    if (seed / MANIFEST).is_file():
        verify_manifest(seed)
    for file in seed.glob("*.safetensors"):
        with opened(file):
            pass
    return seed, first


def _copy(source: Path, local: Path, version: int, seed: Path, first: int) -> None:
    """The seed and what has changed since, into `local`."""
    with atomic_dir(local) as made:
        for file in sorted(seed.iterdir()):
            if file.is_file() and file.name not in (MANIFEST, MARK):
                shutil.copyfile(file, made / file.name)
        for number in range(first + 1, version + 1):
            apply_delta(made, _published(source, number), number)
        (made / MARK).write_text(json.dumps(_told(source, version)))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else on this host pulls into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _published(source: Path, version: int) -> Path:
    return source / f"weight_v{version:06d}"


def _told(source: Path, version: int) -> dict[str, Any]:
    """What is noted of a version that was pulled."""
    return {"source": str(source.resolve()), "version": version}


def _pulled(local: Path) -> dict[str, Any] | None:
    """What is noted in `local`; None if it is not there. Raises FullarcError if it was not pulled."""
    if not local.exists():
        return None
    if not (local / MARK).is_file():
        raise FullarcError(
            f"{local} is there and was not pulled, so it is not replaced.", "Name another folder."
        )
    told: dict[str, Any] = json.loads((local / MARK).read_text())
    return told
