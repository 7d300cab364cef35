"""Weights while the engine runs, from a folder, a tensor stream or shared memory: put together beside the running ones
(see `staging`), swapped between two steps.

What becomes of running sequences is the update's `kv_policy`: "keep" (they go on with the latents they have, SGLang's
in_place), "recompute" (their latents are computed anew under the new weights), "drop" (they end with "abort"). Cached
prefixes of other weights are never used. `/begin_weight_update` … `/end_weight_update` make many parts one update.

Invariants: an update that fails leaves the old weights in place; every token records the version that sampled it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service, in_thread
from fullarc.engine.backend import Weights
from fullarc.engine.engine import same_shape
from fullarc.engine.lora import Adapter, merge
from fullarc.engine.scheduler import Scheduler
from fullarc.engine.staging import Staging, decode_tensors, read_shared_memory

MAX_TENSOR_BODY = 2**31
KvPolicy = Literal["keep", "recompute", "drop"]
Version = Field(None, max_length=200)


class UpdateBody(BaseModel):
    """What every update may say."""

    model_config = ConfigDict(extra="ignore")

    weight_version: str | None = Version
    kv_policy: KvPolicy = "keep"
    # AReaL's spelling too
    abort_all_requests: bool = Field(
        False, validation_alias=AliasChoices("abort_all_requests", "abort_all_request")
    )

    @property
    def policy(self) -> KvPolicy:
        """`kv_policy`, or what SGLang's flag says."""
        return "drop" if self.abort_all_requests else self.kv_policy


class DiskBody(UpdateBody):
    """POST /update_weights_from_disk. `weight_version` defaults to one more than the present number."""

    model_path: str = Field(max_length=4096)
    manifest_sha256: str | None = None
    # refused unless neutral
    load_format: Literal["auto", "safetensors", None] = None
    is_async: Literal[False, None] = None
    keep_pause: Literal[False, None] = None


class TensorBody(UpdateBody):
    """POST /update_weights_from_tensor: base64 of safetensors, never a pickle."""

    serialized_named_tensors: list[str] = Field(min_length=1)
    load_format: str | None = None


class SharedMemoryBody(UpdateBody):
    """POST /update_weights_from_ipc: the name of a shared-memory object that holds safetensors."""

    shared_memory: str
    sha256: str | None = None


class VersionBody(BaseModel):
    """POST /update_weight_version."""

    model_config = ConfigDict(extra="ignore")
    new_version: str = Field(max_length=200)
    abort_all_requests: bool = False


class EndBody(UpdateBody):
    """POST /end_weight_update."""


class NameBody(BaseModel):
    """POST /get_weights_by_name."""

    model_config = ConfigDict(extra="ignore")
    name: str
    truncate_size: int = Field(100, ge=1, le=100_000)


class _Session:
    """The parts of an open update; `check` refuses what does not fit when it comes. `over`: nothing is added any more.

    So it never has more than the model; when a part fails, nothing.
    """

    def __init__(self, check: Callable[[dict[str, Tensor]], None]) -> None:
        self._check, self._parts = check, dict[str, Tensor]()
        self.failed, self.over = "", False

    def add(self, parts: dict[str, Tensor]) -> None:
        """Keep some more. Raises FullarcError when it is too late or they do not fit."""
        if self.over:
            raise FullarcError("The update ended before this part had come.", "Begin it again.")
        self._sound()
        self._check(parts)
        self._parts |= parts

    def fail(self, error: FullarcError) -> None:
        """Nothing becomes of it any more."""
        self.failed, self._parts = self.failed or str(error), {}

    def whole(self) -> dict[str, Tensor]:
        """All of them, and the end. Raises FullarcError if some are missing."""
        self.over = True
        self._sound()
        return self._parts

    def _sound(self) -> None:
        if self.failed:
            raise FullarcError(f"A part of this update failed: {self.failed}", "Begin it again.")


class Updates:
    """The handlers. `install` is what other dialects call."""

    def __init__(self, service: Service) -> None:
        self.service, self.staging = service, Staging(service.origin, service.scheduler.weights)
        self.lock = asyncio.Lock()
        self._open: _Session | None = None

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/update_weights_from_disk", self.from_disk, body=DiskBody),
            Endpoint("/update_weights_from_tensor", self.from_tensor, body=TensorBody),
            Endpoint("/update_weights_from_ipc", self.from_shared_memory, body=SharedMemoryBody),
            Endpoint("/begin_weight_update", self.begin),
            Endpoint("/end_weight_update", self.end, body=EndBody),
            Endpoint("/update_weight_version", self.rename, body=VersionBody),
            Endpoint(
                "/get_weights_by_name", self.by_name, ("GET", "POST"), NameBody, {"name": {"type": "string"}}
            ),
        ]

    async def install(
        self, load: Callable[[str], Weights], version: str | None, policy: KvPolicy
    ) -> dict[str, Any]:
        """Run `load(version)` in a thread and swap its result in. Raises FullarcError; then nothing has changed."""
        begin = time.monotonic()
        async with self.lock:
            old = self.service.scheduler.weights
            if version is None:
                version = str(int(old.version) + 1) if old.version.isdecimal() else "1"
            name = version
            weights = await in_thread(lambda: load(name))
            same_shape(weights, old)
            adapters = await self.service.on_engine(lambda s: s.adapters_in_use)
            merged = await asyncio.to_thread(self._adapted, weights, adapters)

            def swap(scheduler: Scheduler) -> int:
                if policy == "drop":
                    scheduler.abort(None)
                elif policy == "recompute":
                    scheduler.retract()
                running = len(scheduler.running)
                scheduler.set_weights(weights, merged)
                return running

            running = await self.service.on_engine(swap)
            self.staging.commit()
        message = f"Loaded weight version {version} in {time.monotonic() - begin:.3f} s."
        return {
            "success": True,
            "message": message,
            "weight_version": version,
            "num_paused_requests": running,
        }

    def _adapted(self, weights: Weights, adapters: set[Adapter]) -> dict[Adapter, Weights]:
        tensors = self.staging.tensors("adapters", coming=True) if adapters else {}
        return {adapter: merge(weights, tensors, adapter.deltas, adapter.folder) for adapter in adapters}

    async def load_folder(
        self, folder: str, version: str | None, policy: KvPolicy, sha256: str | None = None
    ) -> dict[str, Any]:
        """Install a checkpoint folder."""
        told = await self.install(
            lambda name: self.staging.from_folder(folder, name, sha256), version, policy
        )
        self.service.model_path = folder
        return told

    async def from_disk(self, http: HttpRequest) -> Response:
        """Load a checkpoint folder."""
        body = await read_body(http, DiskBody)
        return await self.tell(
            self.load_folder(body.model_path, body.weight_version, body.policy, body.manifest_sha256)
        )

    async def from_tensor(self, http: HttpRequest) -> Response:
        """Replace some or all tensors."""
        body = await read_body(http, TensorBody, MAX_TENSOR_BODY)
        if body.load_format not in (None, "", "safetensors"):
            message = f"load_format {body.load_format[:50]!r} needs a pickle, and pickles are never read."
            return answer({"success": False, "message": f"{message} Send base64 of safetensors."}, 400)
        return await self.tell(self.parts(lambda: decode_tensors(body.serialized_named_tensors), body))

    async def from_shared_memory(self, http: HttpRequest) -> Response:
        """Replace some or all tensors by those in shared memory."""
        body = await read_body(http, SharedMemoryBody)
        return await self.tell(self.parts(lambda: read_shared_memory(body.shared_memory, body.sha256), body))

    async def parts(self, read: Callable[[], dict[str, Tensor]], body: UpdateBody) -> dict[str, Any]:
        """Install the tensors that `read` gives, or keep them where an update is open. Raises FullarcError."""
        session = self._open
        if session is None:
            return await self.install(
                lambda version: self.staging.from_tensors(read(), version), body.weight_version, body.policy
            )
        async with self.lock:
            try:
                session.add(await in_thread(read))
            except FullarcError as error:
                session.fail(error)
                raise
        return {"success": True, "message": "Kept until the update is finished."}

    def open(self) -> None:
        """From now on parts are collected."""
        if self._open is not None:
            self._open.over = True
        self._open = _Session(self.staging.check)
        self.service.collecting.add(self)

    async def finish(self, body: UpdateBody) -> dict[str, Any]:
        """Install the collected parts as one update. Raises FullarcError if one of them failed."""
        session, self._open = self._open, None
        self.service.collecting.discard(self)
        if session is None:
            raise FullarcError("No weight update is open.", "Begin one first.")
        return await self.install(  # whole() behind the lock: parts that are still coming belong to it
            lambda version: self.staging.from_tensors(session.whole(), version),
            body.weight_version, body.policy,
        )  # fmt: skip

    async def begin(self, _http: HttpRequest) -> Response:
        """From now on parts are collected."""
        self.open()
        return answer({"success": True, "message": "Parts are collected until /end_weight_update."})

    async def end(self, http: HttpRequest) -> Response:
        """Install the collected parts as one update."""
        return await self.tell(self.finish(await read_body(http, EndBody)))

    async def rename(self, http: HttpRequest) -> Response:
        """Give the present weights another version."""
        body = await read_body(http, VersionBody)
        async with self.lock:  # what is being read now gets the new version too, or comes after it
            await self.service.on_engine(lambda s: _rename(s, body.new_version, body.abort_all_requests))
        return answer({"success": True, "message": "Renamed.", "new_version": body.new_version})

    async def by_name(self, http: HttpRequest) -> Response:
        """The first numbers of a tensor, by its on-disk name."""
        if http.method == "GET":
            body = NameBody(name=http.query_params.get("name", ""))
        else:
            body = await read_body(http, NameBody)
        values = await asyncio.to_thread(self.staging.values, body.name, body.truncate_size)
        return answer(values)

    async def tell(self, update: Any) -> Response:
        """SGLang's answer to an update that is awaited here."""
        try:
            return answer(await update)
        except FullarcError as error:
            return answer({"success": False, "message": str(error)}, 400)


def _rename(scheduler: Scheduler, version: str, abort: bool) -> None:
    """The same weights under another version; what is cached stays valid."""
    if abort:
        scheduler.abort(None)
    scheduler.rename(version)
