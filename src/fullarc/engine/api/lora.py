"""Adapters come and go while the engine runs: SGLang's and prime-rl's /load_lora_adapter, vLLM's /v1/load_lora_adapter.

AReaL's /areal_update_weights_lora brings one version after another, of which the last stays.

An adapter is read and merged beside the running engine, and known between two steps. A name that is loaded again gets
the new weights for new requests, and those in flight end with what they began with; vLLM's route does so only with
`load_inplace`, as vLLM's does. An unloaded name is unknown at once.
"""

import asyncio
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, error_answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.api.updates import Updates
from fullarc.engine.lora import Adapter, merge, read_adapter

_NAME = re.compile(r"[^\s:]{1,200}")
_VERSION = re.compile(r"-v\d+$")


class LoadBody(BaseModel):
    """POST /load_lora_adapter."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = Field(max_length=200)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False
    added_tokens_config: None = None


class UnloadBody(BaseModel):
    """POST /unload_lora_adapter."""

    model_config = ConfigDict(extra="ignore")
    lora_name: str = Field(max_length=200)


class ArealLoraBody(BaseModel):
    """POST /areal_update_weights_lora."""

    model_config = ConfigDict(extra="ignore")
    lora_name: str = Field(max_length=200)
    lora_model_path: str = Field(max_length=4096)
    lora_int_id: int | None = None
    base_model_name: str | None = Field(None, max_length=4096)


class Loras:
    """The handlers."""

    def __init__(self, service: Service, updates: Updates) -> None:
        self.service, self.updates = service, updates

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/load_lora_adapter", self.load, body=LoadBody),
            Endpoint("/unload_lora_adapter", self.unload, body=UnloadBody),
            Endpoint("/areal_update_weights_lora", self.areal_update, body=ArealLoraBody),
            Endpoint("/v1/load_lora_adapter", self.load_v1, body=LoadBody),
            Endpoint("/v1/unload_lora_adapter", self.unload_v1, body=UnloadBody),
        ]

    async def load(self, http: HttpRequest) -> Response:
        """Load an adapter's folder, in the place of an earlier one of the same name."""
        body = await read_body(http, LoadBody)
        try:
            await self._load(body)
        except FullarcError as error:
            return answer(self._told(str(error)), 400)
        return answer(self._told())

    async def unload(self, http: HttpRequest) -> Response:
        """Forget an adapter."""
        body = await read_body(http, UnloadBody)
        if await self._unload(body.lora_name):
            return answer(self._told())
        return answer(self._told(f"No adapter {body.lora_name!r} is loaded."), 400)

    async def load_v1(self, http: HttpRequest) -> Response:
        """Load an adapter's folder under a new name."""
        body = await read_body(http, LoadBody)
        if not await self._load(body, body.load_inplace):
            message = f"The adapter {body.lora_name!r} is loaded already. Set load_inplace to replace it."
            return error_answer(http.url.path, 400, message, "lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_v1(self, http: HttpRequest) -> Response:
        """Forget an adapter."""
        body = await read_body(http, UnloadBody)
        if await self._unload(body.lora_name):
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
        return error_answer(http.url.path, 404, f"No adapter {body.lora_name!r} is loaded.", "lora_name")

    async def areal_update(self, http: HttpRequest) -> Response:
        """Load an adapter NAME-vN; earlier versions of NAME are forgotten. Running requests end with what they have."""
        body = await read_body(http, ArealLoraBody)
        family = _VERSION.sub("", body.lora_name)
        try:
            await self._load(LoadBody(lora_name=body.lora_name, lora_path=body.lora_model_path))
        except FullarcError as error:
            return answer({"success": False, "message": str(error)}, 400)
        await self.service.on_engine(lambda s: s.abort(None))
        for name in self.service.scheduler.adapters.copy():
            if name != body.lora_name and _VERSION.sub("", name) == family and _VERSION.search(name):
                await self._unload(name)
        return answer({"success": True, "message": f"The adapter {body.lora_name} is loaded."})

    async def _load(self, body: LoadBody, replace: bool = True) -> bool:
        """False if there is one of this name that may not be replaced."""
        name, folder = body.lora_name, body.lora_path
        if not _NAME.fullmatch(name) or name == self.service.name:
            raise FullarcError(f"{name!r} cannot be an adapter's name.", "Use one without spaces and colons.")
        async with self.updates.lock:
            if not replace and name in self.service.scheduler.adapters:
                return False
            adapter = await asyncio.to_thread(self._made, name, folder)
            self.service.strict = True
            await self.service.on_engine(lambda s: s.adapters.update({name: adapter}))
        return True

    def _made(self, name: str, folder: str) -> Adapter:
        weights = self.service.scheduler.weights
        deltas = read_adapter(folder, weights.config)
        merged = merge(weights, self.updates.staging.tensors("adapters"), deltas, folder)
        return Adapter(name, folder, deltas, merged)

    async def _unload(self, name: str) -> bool:
        async with self.updates.lock:
            return await self.service.on_engine(lambda s: s.adapters.pop(name, None)) is not None

    def _told(self, error: str | None = None) -> dict[str, Any]:
        loaded = {name: adapter.folder for name, adapter in self.service.scheduler.adapters.copy().items()}
        return {"success": error is None, "error_message": error, "loaded_adapters": loaded}
