"""Where the engine's thread spends its time: SGLang's /start_profile and /stop_profile, by Python's own profiler.

Kernels are calls of their own in it, so it tells them from scheduling and sampling. The result is a file for `pstats`
in a folder that the caller names and that must be there.
"""

import asyncio
import cProfile
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.openai import BadRequest
from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.api.updates import Updates

POLL_S = 0.01


class ProfileBody(BaseModel):
    """POST /start_profile."""

    model_config = ConfigDict(extra="ignore")
    output_dir: str | None = Field(None, max_length=4096)
    num_steps: int | None = Field(None, ge=1, le=1_000_000)


class StopBody(BaseModel):
    """POST /stop_profile."""

    model_config = ConfigDict(extra="ignore")


class Profile:
    """The handlers; one profile at a time."""

    def __init__(self, service: Service, updates: Updates) -> None:
        del updates
        self.service = service
        self._running: tuple[cProfile.Profile, Path] | None = None
        self._until: asyncio.Task[None] | None = None

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/start_profile", self.start, body=ProfileBody),
            Endpoint("/stop_profile", self.stop, body=StopBody),
        ]

    async def start(self, http: HttpRequest) -> Response:
        """Profile from now on, for `num_steps` steps or until it is stopped."""
        body = await read_body(http, ProfileBody)
        if not body.output_dir:
            raise BadRequest("Name a folder for the result.", "output_dir")
        if self._running:
            raise BadRequest("A profile is running already. Stop it first.", "output_dir")
        folder = Path(body.output_dir)
        try:
            usable = folder.is_absolute() and folder.is_dir()
        except (OSError, ValueError):
            usable = False
        if not usable:
            raise BadRequest(f"{body.output_dir[:200]!r} is no absolute path of a folder.", "output_dir")
        profile = cProfile.Profile()
        self._running = profile, folder / f"engine-{time.time_ns()}.pstats"
        await self.service.on_engine(lambda _: profile.enable())
        if body.num_steps:
            self._until = asyncio.create_task(
                self._stop_at(self.service.scheduler.counters.steps + body.num_steps)
            )
        return answer({"success": True, "message": f"Profiling into {self._running[1]}."})

    async def stop(self, http: HttpRequest) -> Response:
        """End the profile and write it."""
        await read_body(http, StopBody)
        if self._until:
            self._until.cancel()
        try:
            path = await self._write()
        except FullarcError as error:
            return answer({"success": False, "message": str(error)}, 400)
        return answer({"success": True, "message": f"Written to {path}."})

    async def _stop_at(self, steps: int) -> None:
        while self.service.scheduler.counters.steps < steps and self.service.worker.healthy:
            await asyncio.sleep(POLL_S)
        await self._write()

    async def _write(self) -> Path:
        if self._running is None:
            raise FullarcError("No profile is running.", "Start one.")
        (profile, path), self._running = self._running, None
        await self.service.on_engine(lambda _: profile.disable())
        try:
            await asyncio.to_thread(profile.dump_stats, path)
        except OSError as error:
            raise FullarcError(f"The profile cannot be written to {path}: {error}.") from None
        return path
