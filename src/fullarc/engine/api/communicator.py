"""Weights as TRL's client sends them: /init_communicator/, /update_named_param/, /close_communicator/.

The roles are the other way round than in `transfer`: the engine is rank 0 and hosts the store, the client is the last
rank and broadcasts a tensor per request. TRL's own communicators are those of GPUs (NCCL, XCCL); here it is gloo under
the same fields, in the form of its XCCL branch: a TCPStore, the prefix "client2server", broadcast and barrier. Names
are those on disk. As TRL has it a request is answered before its tensor comes, so the next one tells what fails.

Tensors become one update when /reset_prefix_cache/ comes, with which TRL ends an update, or the communicator is closed;
until then tokens are sampled by the old weights. So none is sampled by weights of which some are new and some are not.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import in_thread
from fullarc.engine.api.transfer import Transfer
from fullarc.engine.transfer import Group, Spec

TRL = "trl's communicator"  # a name that no client can give
ANY = ("0.0.0.0", "::")


class CommunicatorBody(BaseModel):
    """POST /init_communicator/."""

    model_config = ConfigDict(extra="ignore")

    host: str = Field(
        max_length=300, description="where the engine listens; without an API key on this machine only"
    )
    port: int = Field(ge=1, lt=2**16)
    world_size: int = Field(strict=True)
    client_device_uuid: str = ""


class ParamBody(BaseModel):
    """POST /update_named_param/."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=1000)
    dtype: str = Field(max_length=100)
    shape: list[int] = Field(max_length=16)


class _Joining:
    """A group that comes together in another thread, until it is not wanted any more."""

    def __init__(self) -> None:
        self._group: Group | None = None
        self._unwanted = False

    def begun(self, group: Group) -> None:
        """It waits for the client now."""
        self._group = group
        if self._unwanted:
            group.close()

    def stop(self) -> None:
        """Wait no longer."""
        self._unwanted = True
        if self._group:
            self._group.close()


class Communicator:
    """The handlers, and what comes by broadcast."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer, self.updates = transfer, transfer.updates
        self._work: asyncio.Task[None] | None = None  # all that was begun, in order
        self._joining = _Joining()
        self._expected: dict[str, Spec] = {}
        self._parts: dict[str, Tensor] = {}
        self._settling = asyncio.Lock()

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/init_communicator/", self.init, body=CommunicatorBody),
            Endpoint("/update_named_param/", self.update, body=ParamBody),
            Endpoint("/close_communicator/", self.close),
        ]

    async def init(self, http: HttpRequest) -> Response:
        """Open a group of this engine and the client, which comes when this is answered."""
        body = await read_body(http, CommunicatorBody)
        if body.world_size != 2:
            raise FullarcError(f"world_size {body.world_size} is not 2, this engine and the client.")
        host = "127.0.0.1" if body.host in ANY and not self.transfer.remote else body.host
        self.transfer.check_host(host)
        self._leave()
        joining = self._joining = _Joining()

        def join() -> Group:
            return Group(host, body.port, 0, 2, hosts=True, begun=joining.begun)

        self._then(lambda: self.transfer.join(TRL, host, join))
        return answer({"message": "Request received, initializing communicator"})

    async def update(self, http: HttpRequest) -> Response:
        """Receive a tensor that the client broadcasts when this is answered."""
        body = await read_body(http, ParamBody)
        if self._work is None:
            raise FullarcError("No communicator is open.", "POST /init_communicator/ first.")
        if self._work.done():
            await self._done()
        (spec,) = self.transfer.expected([body.name], [body.dtype], [body.shape])
        coming = self._expected | {spec.name: spec}
        if sum(each.bytes for each in coming.values()) > self.transfer.limit:
            raise FullarcError("More bytes are announced than this model has.", "Is it the same model?")
        self._expected = coming
        self.transfer.service.collecting.add(self)
        self._then(lambda: self._receive(spec))
        return answer({"message": "Request received, updating named parameter"})

    async def close(self, _http: HttpRequest) -> Response:
        """Leave the group; what is whole becomes an update, what has not come will not."""
        try:
            if self._work and self._work.done():
                await self.settle()
        finally:
            self._leave()
        return answer({"message": "Request received, closing communicator"})

    async def settle(self) -> None:
        """Install what was announced, as one update. Raises FullarcError if it did not come or does not fit."""
        async with self._settling:
            await self._done()
            parts = self._parts
            self._forget()
            if parts:
                staging = self.updates.staging
                await self.updates.install(lambda name: staging.from_tensors(parts, name), None, "keep")

    async def _receive(self, spec: Spec) -> None:
        group = self.transfer.group(TRL)
        got = await in_thread(lambda: group.receive("each", [spec]))
        self._parts = self._parts | got  # a new one: what is being installed does not change

    def _then(self, step: Callable[[], Awaitable[None]]) -> None:
        """Do it behind all that was begun."""
        before = self._work

        async def run() -> None:
            if before:
                await before
            await step()

        self._work = asyncio.create_task(run())
        self._work.add_done_callback(
            lambda work: work.cancelled() or work.exception()
        )  # told by the next request

    async def _done(self) -> None:
        """Wait for all that was begun. If some of it failed, nothing is left of it. Raises FullarcError."""
        work = self._work
        try:
            if work:
                await asyncio.shield(work)
        except FullarcError:
            self._leave()
            raise
        except asyncio.CancelledError:
            if work and work.cancelled():
                raise FullarcError("The communicator was closed meanwhile.", "Open it again.") from None
            raise
        except Exception as error:
            self._leave()
            raise FullarcError(f"The communicator failed: {error!r:.300}.", "Open it again.") from error

    def _leave(self) -> None:
        self._joining.stop()
        if self._work:
            self._work.cancel()
        self._work = None
        self._forget()
        with suppress(FullarcError):
            self.transfer.leave(TRL)

    def _forget(self) -> None:
        self._parts, self._expected = {}, {}
        self.transfer.service.collecting.discard(self)
