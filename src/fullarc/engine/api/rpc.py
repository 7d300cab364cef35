"""vLLM's POST /collective_rpc, where RL frameworks call methods of vLLM's workers by their names.

What is known is a table: nothing is looked up by a name that a client sends. Any other method is refused with the names
of those that are known.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.openai import BadRequest
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.upkeep import MEMORY, Upkeep, memory


class RpcBody(BaseModel):
    """POST /collective_rpc."""

    model_config = ConfigDict(extra="ignore")

    method: str = Field(max_length=1000)
    args: list[Any] = Field(default_factory=list, max_length=100)
    keywords: dict[str, Any] = Field(
        default_factory=dict, max_length=100, validation_alias=AliasChoices("kwargs")
    )
    timeout: float | None = Field(None, description="without effect: every method ends by itself")


@dataclass(frozen=True)
class Method:
    """What is done, and the arguments by name in order, each with its type; what is not given is None."""

    act: Callable[..., Awaitable[None]]
    takes: dict[str, Any] = field(default_factory=dict)

    def bind(self, body: RpcBody) -> list[Any]:
        """The arguments in order. Raises BadRequest for others than it takes."""
        names = [*self.takes]
        if len(body.args) > len(names) or not set(body.keywords) <= set(names[len(body.args) :]):
            raise BadRequest(f"{body.method} takes {', '.join(names) or 'no arguments'}, each once.", "args")
        given = dict(zip(names, body.args, strict=False)) | body.keywords
        try:
            return [TypeAdapter(kind).validate_python(given.get(name)) for name, kind in self.takes.items()]
        except ValidationError as error:
            told = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
            raise BadRequest(f"{body.method}({', '.join(names)}): {told}.", "args") from None


class Rpc:
    """The handler."""

    def __init__(self, upkeep: Upkeep) -> None:
        self.service, self.updates, self.upkeep = upkeep.service, upkeep.updates, upkeep
        self.methods = {
            "reset_prefix_cache": Method(self._reset),
            "reload_weights": Method(self._load, {"weights_path": str | None}),
            "update_weights_from_path": Method(self._load, {"weight_path": str}),  # prime-rl's
            "update_weights_from_disk": Method(self._load, {"model_path": str}),
            "sleep": Method(self._sleep, {"level": Literal[0, 1, 2] | None}),
            "wake_up": Method(self._wake, {"tags": list[str] | None}),
        }

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/collective_rpc", self.call, body=RpcBody)]

    async def call(self, http: HttpRequest) -> Response:
        """One of the methods that are known, on the one worker."""
        body = await read_body(http, RpcBody)
        method = self.methods.get(body.method)
        if method is None:
            known = ", ".join(self.methods)
            raise BadRequest(f"There is no method {body.method[:200]!r}; known are {known}.", "method")
        await method.act(*method.bind(body))
        return answer({"results": [None]})

    async def _reset(self) -> None:
        await self.service.on_engine(lambda s: s.prefix.clear())

    async def _load(self, folder: str | None) -> None:
        """A folder, or as `reload_weights` has it the present one once more under the present version."""
        version = None if folder else self.service.scheduler.version
        await self.updates.load_folder(folder or self.service.model_path, version, "keep")

    async def _sleep(self, level: int | None) -> None:
        await self.upkeep.fall_asleep("abort", MEMORY)

    async def _wake(self, tags: list[str] | None) -> None:
        await self.upkeep.awake(memory(tags))
