"""Published weights come to this host: slime's /pull_weights, before /update_weights_from_disk.

A trainer publishes version N as the folder `weight_v{N:06d}` on a file system that both see. Here it is copied as a
whole into a folder of this host, which is replaced at once or not at all. Versions that are published as differences
from earlier ones are refused.

Invariant: only a folder that came by pulling is ever replaced.
"""

import asyncio
import json
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.config.errors import FullarcError
from fullarc.config.files import MANIFEST, atomic_dir, verify_manifest
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.api.updates import Updates
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
        del service
        self.updates = updates

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/pull_weights", self.pull, body=PullBody)]

    async def pull(self, http: HttpRequest) -> Response:
        """Copy a published version."""
        body = await read_body(http, PullBody)
        try:
            async with self.updates.lock:  # not while a folder is being read
                await asyncio.to_thread(
                    pull, Path(body.source_dir), Path(body.local_checkpoint_dir), body.target_version
                )
        except FullarcError as error:
            return answer({"success": False, "message": str(error)}, 400)
        return answer(
            {"success": True, "message": f"{body.local_checkpoint_dir} is version {body.target_version}."}
        )


def pull(source: Path, local: Path, version: int) -> None:
    """Make `local` a copy of the published `version`; nothing is done if it is one already.

    Raises FullarcError if there is no such version, or `local` is a folder of somebody's own.
    """
    published = source / f"weight_v{version:06d}"
    try:
        load_config(published)
        if not list(published.glob("*.safetensors")):
            raise FullarcError(f"{published} has no safetensors.", "Publish whole checkpoints.")
        if (published / MANIFEST).is_file():
            verify_manifest(published)
        told = {"source": str(published.resolve()), "version": version}
        if local.exists():
            if not (local / MARK).is_file():
                raise FullarcError(
                    f"{local} is there and was not pulled, so it is not replaced.", "Name another folder."
                )
            if json.loads((local / MARK).read_text()) == told:
                return
        with atomic_dir(local) as made:
            for file in sorted(published.iterdir()):
                if file.is_file() and file.name != MANIFEST:
                    shutil.copyfile(file, made / file.name)
            (made / MARK).write_text(json.dumps(told))
    except (OSError, ValueError) as error:
        if isinstance(error, FullarcError):
            raise
        raise FullarcError(f"Version {version} cannot be pulled from {source}: {error!r:.300}.") from None
