"""Weights while the engine runs: verified and fused beside the running ones, swapped between two steps.

Invariants: an update that fails leaves the old weights in place; every token records the version that sampled it.
"""

import asyncio
import time

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.engine import load_weights, same_shape
from fullarc.engine.scheduler import Scheduler


class UpdateBody(BaseModel):
    """POST /update_weights_from_disk. `weight_version` defaults to one more than the present number."""

    model_config = ConfigDict(extra="ignore")

    model_path: str
    weight_version: str | None = None
    abort_all_requests: bool = False


class Updates:
    """The handlers. `endpoints` lists them."""

    def __init__(self, service: Service) -> None:
        self.service, self._lock = service, asyncio.Lock()

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [Endpoint("/update_weights_from_disk", self.from_disk, body=UpdateBody)]

    async def from_disk(self, http: HttpRequest) -> Response:
        """Load a checkpoint folder."""
        body = await read_body(http, UpdateBody)
        async with self._lock:
            old = self.service.scheduler.core.weights
            version = body.weight_version
            if version is None:
                version = str(int(old.version) + 1) if old.version.isdigit() else "1"
            begin = time.monotonic()
            try:
                weights = await asyncio.to_thread(load_weights, body.model_path, version, old.dtype)
                same_shape(weights, old)
            except FullarcError as error:
                return answer({"success": False, "message": str(error)}, 400)

            def swap(scheduler: Scheduler) -> int:
                if body.abort_all_requests:
                    scheduler.abort(None)
                scheduler.set_weights(weights)
                return len(scheduler.running)

            running = await self.service.on_engine(swap)
            self.service.model_path = body.model_path
        message = f"Loaded weight version {version} in {time.monotonic() - begin:.3f} s."
        return answer(
            {"success": True, "message": message, "weight_version": version, "num_paused_requests": running}
        )
