"""Weights by collectives, in the names of SGLang (slime, AReaL), vLLM, AReaL's vLLM server and prime-rl (see
`transfer`).

An engine on a CPU speaks gloo, and is one rank: `rank_offset` is its place. vLLM's and prime-rl's own senders are
NCCL's and cannot reach a CPU; their routes are the same here, with rank 0 in a plain gloo group. Without an API key
only groups on this machine are joined. All goes through `Updates`, so an update that breaks off leaves the old
weights in place.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service, in_thread
from fullarc.engine.api.updates import UpdateBody, Updates, Version
from fullarc.engine.transfer import WAIT_S, Form, Group, Spec, is_loopback, specs

MAX_GROUPS, MAX_TENSORS = 8, 1_000_000
VLLM, PRIME = "vllm's weight transfer", "prime-rl's broadcaster"  # names that no client can give
Names = Annotated[list[str], Field(max_length=MAX_TENSORS)]
Shapes = Annotated[list[list[Annotated[int, Field(strict=True)]]], Field(max_length=MAX_TENSORS)]
GroupName = Annotated[str, Field(min_length=1, max_length=200)]


class GroupBody(BaseModel):
    """POST /init_weights_update_group."""

    model_config = ConfigDict(extra="ignore")

    master_address: str = Field(max_length=300)
    master_port: int = Field(ge=1, lt=2**16)  # AReaL sends digits
    rank_offset: int = Field(strict=True)
    world_size: int = Field(strict=True)
    group_name: GroupName = "weight_update_group"
    backend: str = "nccl"


class GroupNameBody(BaseModel):
    """POST /destroy_weights_update_group."""

    model_config = ConfigDict(extra="ignore")
    group_name: GroupName = "weight_update_group"


class TensorsBody(UpdateBody):
    """POST /update_weights_from_distributed, /areal_set_update_weight_meta: what rank 0 broadcasts, in this order."""

    names: Names
    dtypes: Names
    shapes: Shapes
    group_name: GroupName = "weight_update_group"
    load_format: Literal["flattened_bucket", "auto", None] = None


class InitInfo(BaseModel):
    """vLLM's `init_info`."""

    model_config = ConfigDict(extra="ignore")

    master_address: str = Field(max_length=300)
    master_port: int = Field(ge=1, lt=2**16)
    rank_offset: int = Field(strict=True)
    world_size: int = Field(strict=True)
    packed: bool = False
    packed_buffer_size_bytes: int = Field(2**30, strict=True, ge=1)


class InitBody(BaseModel):
    """POST /init_weight_transfer_engine."""

    model_config = ConfigDict(extra="ignore")
    init_info: InitInfo


class UpdateInfo(BaseModel):
    """vLLM's `update_info`: names, types and shapes of what rank 0 broadcasts."""

    model_config = ConfigDict(extra="ignore")
    names: Names
    dtype_names: Names
    shapes: Shapes


class WeightsBody(BaseModel):
    """POST /update_weights: vLLM's `update_info`, or prime-rl's `weight_dir` (null after /init_broadcaster)."""

    model_config = ConfigDict(extra="ignore")

    weight_dir: str | None = Field(None, max_length=4096)
    update_info: UpdateInfo | list[UpdateInfo] | None = None
    weight_version: str | None = Version


class FinishBody(BaseModel):
    """POST /finish_weight_update."""

    model_config = ConfigDict(extra="ignore")
    weight_version: str | None = Version


class BroadcasterBody(BaseModel):
    """POST /init_broadcaster. `timeout` in seconds, as everywhere at most WAIT_S."""

    model_config = ConfigDict(extra="ignore")

    host: str = Field(max_length=300)
    port: int = Field(ge=1, lt=2**16)
    rank_offset: int = Field(strict=True, ge=0)
    inference_world_size: int = Field(strict=True, ge=1)
    timeout: float | None = Field(None, gt=0)
    quantize_in_weight_transfer: bool = False

    @field_validator("quantize_in_weight_transfer")
    @classmethod
    def _plain(cls, value: bool) -> bool:
        if value:
            raise ValueError("quantised transfer is vLLM's own layout; send weights in on-disk names")
        return value


class Transfer:
    """The handlers. `remote`: whether groups on other machines may be joined."""

    def __init__(self, service: Service, updates: Updates, remote: bool) -> None:
        self.service, self.updates, self.remote = service, updates, remote
        self._groups: dict[str, Group] = {}
        self._opening: set[str] = set()
        self._packed: int | None = None  # vLLM's buffers, where they are used
        self._announced: TensorsBody | None = None

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/init_weights_update_group", self.init_group, body=GroupBody),
            Endpoint("/update_weights_from_distributed", self.from_distributed, body=TensorsBody),
            Endpoint("/destroy_weights_update_group", self.destroy_group, body=GroupNameBody),
            Endpoint("/init_weight_transfer_engine", self.init_engine, body=InitBody),
            Endpoint("/shutdown_weight_transfer_engine", self.shutdown_engine),
            Endpoint("/start_weight_update", self.start),
            Endpoint("/start_draft_weight_update", self.start),
            Endpoint("/update_weights", self.update, body=WeightsBody),
            Endpoint("/finish_weight_update", self.finish, body=FinishBody),
            Endpoint("/areal_init_weights_update_group", self.init_group, body=GroupBody),
            Endpoint("/areal_set_update_weight_meta", self.announce, body=TensorsBody),
            Endpoint("/areal_update_weights_xccl", self.from_announced),
            Endpoint("/init_broadcaster", self.init_broadcaster, body=BroadcasterBody),
        ]

    # --- SGLang, AReaL ----------------------------------------------------------------------------------------

    async def init_group(self, http: HttpRequest) -> Response:
        """Join a group that rank 0 opens under a name."""
        body = await read_body(http, GroupBody)

        async def join() -> dict[str, Any]:
            if body.backend != "gloo":
                raise FullarcError(
                    f"backend {body.backend[:50]!r} is not for CPUs.", 'Open the group with "gloo".'
                )
            where = body.master_address, body.master_port, body.rank_offset, body.world_size
            await self.join(body.group_name, body.master_address, lambda: Group(*where, body.group_name))
            return {"success": True, "message": f"Joined {body.group_name} as rank {body.rank_offset}."}

        return await self.updates.tell(join())

    async def destroy_group(self, http: HttpRequest) -> Response:
        """Leave a group."""
        name = (await read_body(http, GroupNameBody)).group_name

        async def leave() -> dict[str, Any]:
            self.leave(name)
            return {"success": True, "message": f"Left {name}."}

        return await self.updates.tell(leave())

    async def from_distributed(self, http: HttpRequest) -> Response:
        """Replace tensors by those that rank 0 of a group broadcasts."""
        return await self.updates.tell(self._from_group(await read_body(http, TensorsBody)))

    async def announce(self, http: HttpRequest) -> Response:
        """What the next /areal_update_weights_xccl receives."""
        self._announced = await read_body(http, TensorsBody)
        return answer({"success": True, "message": f"{len(self._announced.names)} tensors are expected."})

    async def from_announced(self, _http: HttpRequest) -> Response:
        """Receive what was announced; running requests end with what they have, as AReaL's server does."""
        body, self._announced = self._announced, None

        async def receive() -> dict[str, Any]:
            if body is None:
                raise FullarcError("Nothing is announced.", "POST /areal_set_update_weight_meta first.")
            return await self._from_group(body.model_copy(update={"abort_all_requests": True}))

        return await self.updates.tell(receive())

    async def _from_group(self, body: TensorsBody) -> dict[str, Any]:
        group, found = self.group(body.group_name), self.expected(body.names, body.dtypes, body.shapes)
        form: Form = "bucket" if body.load_format == "flattened_bucket" else "each"
        return await self.updates.parts(lambda: group.receive(form, found, limit=self.limit), body)

    # --- vLLM, prime-rl ---------------------------------------------------------------------------------------

    async def init_engine(self, http: HttpRequest) -> Response:
        """Join rank 0's plain group, for /update_weights with update_info."""
        info = (await read_body(http, InitBody)).init_info
        where = info.master_address, info.master_port, info.rank_offset, info.world_size
        await self.join(VLLM, info.master_address, lambda: Group(*where))
        self._packed = info.packed_buffer_size_bytes if info.packed else None
        return answer({"message": "Weight transfer initialized"})

    async def shutdown_engine(self, _http: HttpRequest) -> Response:
        """Leave that group."""
        if VLLM in self._groups:
            self.leave(VLLM)
        return answer({"message": "Weight transfer shut down"})

    async def init_broadcaster(self, http: HttpRequest) -> Response:
        """Join rank 0's plain group, for /update_weights with weight_dir."""
        body = await read_body(http, BroadcasterBody)
        wait = min(body.timeout or WAIT_S, WAIT_S)
        where = body.host, body.port, body.rank_offset + 1, body.inference_world_size + 1
        await self.join(PRIME, body.host, lambda: Group(*where, timeout_s=wait))
        return answer({"status": "ok"})

    async def start(self, _http: HttpRequest) -> Response:
        """From now on parts are collected."""
        self.updates.open()
        return answer({"message": "Weight update started"})

    async def update(self, http: HttpRequest) -> Response:
        """Weights from a broadcast or, as prime-rl sends them, from a folder; running requests keep their latents."""
        body = await read_body(http, WeightsBody)
        keep, limit = UpdateBody(weight_version=body.weight_version), self.limit
        if body.update_info is not None:
            infos = body.update_info if isinstance(body.update_info, list) else [body.update_info]
            if len(infos) != 1:
                raise FullarcError(f"update_info is for {len(infos)} workers; this engine is one.")
            group = self.group(VLLM)
            found = self.expected(infos[0].names, infos[0].dtype_names, infos[0].shapes)
            form: Form = "each" if self._packed is None else "packed"
            told = await self.updates.parts(lambda: group.receive(form, found, self._packed or 0), keep)
        elif PRIME in self._groups:
            group = self._groups[PRIME]
            told = await self.updates.parts(lambda: group.receive("described", limit=limit), keep)
        elif body.weight_dir is not None:
            told = await self.updates.load_folder(body.weight_dir, body.weight_version, "keep")
        else:
            raise FullarcError(
                "weight_dir is empty and no group is open.", "Give a folder, or POST /init_broadcaster first."
            )
        return answer({"status": "ok"} | told | {"message": "Weights updated"})

    async def finish(self, http: HttpRequest) -> Response:
        """Install the collected parts as one update."""
        body = await read_body(http, FinishBody)
        told = await self.updates.finish(UpdateBody(weight_version=body.weight_version))
        return answer(told | {"message": "Weight update finished"})

    def close(self) -> None:
        """Leave all groups."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()

    # --- groups -----------------------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Bytes that weights of this model can have at most."""
        return 8 * self.service.scheduler.weights.config.parameter_count(with_mtp=True) + 2**20

    def expected(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> list[Spec]:
        """What is announced. Raises FullarcError for what cannot be."""
        return specs(names, dtypes, shapes, self.limit)

    def group(self, name: str) -> Group:
        """An open group. Raises FullarcError."""
        if name not in self._groups:
            raise FullarcError(f"There is no group {name}.", "Open it first.")
        return self._groups[name]

    def leave(self, name: str) -> None:
        """Close a group. Raises FullarcError if there is none of that name."""
        self.group(name).close()
        del self._groups[name]

    def check_host(self, host: str) -> None:
        """Raise FullarcError for another machine's, unless there is an API key."""
        if not self.remote and not is_loopback(host.strip("[]")):
            raise FullarcError(
                f"Without an API key only groups on this machine are joined, not at {host[:200]}.",
                "Start the server with --api-key.",
            )

    async def join(self, name: str, host: str, join: Callable[[], Group]) -> None:
        """Open a group in the place of one of that name."""
        self.check_host(host)
        if name in self._opening or len(self._opening) + len(self._groups) >= MAX_GROUPS + (
            name in self._groups
        ):
            raise FullarcError(f"{name} is being opened already, or {MAX_GROUPS} groups are open.")
        if old := self._groups.pop(name, None):
            old.close()
        self._opening.add(name)
        try:
            self._groups[name] = await in_thread(join)
        finally:
            self._opening.discard(name)
