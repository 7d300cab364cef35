"""What frameworks call around weight updates: checks of the weights, and memory that is given back while others train.

The weights have one form here, so there is nothing to post-process. Asleep, the engine has ended or holds its
requests and has forgotten all cached prefixes; weights and slots stay, since on this machine they are nobody else's
to use. It wakes up when all that was released is resumed, by one call or several.
"""

import asyncio
import hashlib
from collections.abc import Sequence, Set
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.openai import BadRequest
from fullarc.config.errors import FullarcError
from fullarc.engine.api import control
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.api.updates import Updates
from fullarc.engine.scheduler import Scheduler

MEMORY = frozenset(("weights", "kv_cache"))
TAGS = MEMORY | {"cuda_graph"}  # of which there is none


class SglangCheckBody(BaseModel):
    """POST /weights_checker."""

    model_config = ConfigDict(extra="ignore")
    action: Literal["checksum", "snapshot", "compare", "reset_tensors"] = "checksum"
    skip_tensor_list: list[str] | None = Field(None, max_length=10_000)


class VllmCheckBody(BaseModel):
    """POST /weight_checker."""

    model_config = ConfigDict(extra="ignore")
    action: Literal["checksum", "compare", "reset"]
    baseline: dict[str, str] | None = None


class PostProcessBody(BaseModel):
    """POST /post_process_weights, slime's."""

    model_config = ConfigDict(extra="ignore")
    restore_weights_before_load: bool = False
    post_process_quantization: bool = False


class MemoryBody(BaseModel):
    """POST /release_memory_occupation, /resume_memory_occupation."""

    model_config = ConfigDict(extra="ignore")
    tags: list[str] | None = Field(None, max_length=100)


class Upkeep:
    """The handlers."""

    def __init__(self, service: Service, updates: Updates) -> None:
        self.service, self.updates = service, updates
        self._snapshot: dict[str, str] | None = None
        self._asleep: bool | None = None  # asleep; whether it was paused before
        self._released = set[str]()

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        both = ("GET", "POST")
        return [
            Endpoint("/weights_checker", self.sglang_check, both, SglangCheckBody),
            Endpoint("/weight_checker", self.vllm_check, body=VllmCheckBody),
            Endpoint("/post_process_weights", self.post_process, body=PostProcessBody),
            Endpoint("/release_memory_occupation", self.release, both, MemoryBody),
            Endpoint("/resume_memory_occupation", self.resume, both, MemoryBody),
            Endpoint(
                "/sleep",
                self.sleep,
                query={"level": {"enum": [0, 1, 2]}, "mode": {"enum": ["abort", "keep"]}},
            ),
            Endpoint(
                "/wake_up", self.wake_up, query={"tags": {"type": "array", "items": {"type": "string"}}}
            ),
            Endpoint("/is_sleeping", self.is_sleeping, ("GET",)),
        ]

    # --- checks -----------------------------------------------------------------------------------------------

    async def sglang_check(self, http: HttpRequest) -> Response:
        """SHA-256 of every tensor by its on-disk name; or remember them, compare with that, or zero the weights."""
        body = await read_body(http, SglangCheckBody)
        skipped = body.skip_tensor_list or ()
        if body.action == "reset_tensors":
            return await self.updates.tell(self._zero(skipped))
        sums = await self._sums(skipped)
        if body.action == "snapshot":
            self._snapshot = sums
            return answer({"success": True, "message": f"{len(sums)} tensors are remembered."})
        if body.action == "compare":
            wrong = _different(sums, self._snapshot)
            said = (
                "There is no snapshot."
                if wrong is None
                else f"{len(wrong)} tensors differ: {', '.join(wrong[:5])}"
            )
            good = wrong == []
            return answer(
                {"success": good, "message": "All tensors are equal." if good else said}, 200 if good else 400
            )
        overall = hashlib.sha256()
        for name in sorted(sums):
            overall.update(name.encode() + sums[name].encode())
        whole = overall.hexdigest()
        ranks = [{"checksums": sums, "per_gpu_checksum": whole, "parallelism_info": []}]
        engine = hashlib.sha256(whole.encode()).hexdigest()
        return answer({"success": True, "message": "", "ranks": ranks, "per_engine_checksum": engine})

    async def vllm_check(self, http: HttpRequest) -> Response:
        """The same in vLLM's form; the baseline comes with the request."""
        body = await read_body(http, VllmCheckBody)
        if body.action == "reset":
            await self._zero(())
            return answer({"status": "reset"})
        sums = await self._sums(())
        if body.action == "checksum":
            return answer({"checksums": sums})
        wrong = _different(sums, body.baseline)
        if wrong is None:
            raise BadRequest("action='compare' needs a baseline.", "baseline")
        return answer({"match": not wrong, "mismatches": wrong})

    async def _sums(self, skipped: Sequence[str]) -> dict[str, str]:
        sums = await asyncio.to_thread(self.updates.staging.checksums)
        return {name: value for name, value in sums.items() if not any(part in name for part in skipped)}

    async def _zero(self, skipped: Sequence[str]) -> dict[str, Any]:
        """Weights that are nobody's, so that an update that reaches only some of them is found out."""
        staging, version = self.updates.staging, self.service.scheduler.version
        return await self.updates.install(lambda name: staging.zeroed(skipped, name), version, "keep")

    async def post_process(self, http: HttpRequest) -> Response:
        """There is nothing to do."""
        await read_body(http, PostProcessBody)
        return answer({"success": True, "message": "Weights need no processing here."})

    # --- memory -----------------------------------------------------------------------------------------------

    async def release(self, http: HttpRequest) -> Response:
        """Fall asleep; running requests end with what they have."""
        await self.fall_asleep("abort", await _tags(http))
        return answer(None)

    async def resume(self, http: HttpRequest) -> Response:
        """Wake up, when nothing is left that was released."""
        await self.awake(await _tags(http))
        return answer(None)

    async def sleep(self, http: HttpRequest) -> Response:
        """Fall asleep; running requests end (mode abort, the default) or stay (keep)."""
        level, mode = http.query_params.get("level", "1"), http.query_params.get("mode", "abort")
        if level not in ("0", "1", "2") or mode not in ("abort", "keep"):
            raise BadRequest("level must be 0, 1 or 2, and mode abort or keep.", "mode")
        await self.fall_asleep(mode, MEMORY)
        return answer({"status": "sleeping", "level": int(level)})

    async def wake_up(self, http: HttpRequest) -> Response:
        """Wake up, when nothing is left that was released."""
        tags = http.query_params.getlist("tags") or None
        await self.awake(memory(tags))
        return answer({"status": "awake", "tags": tags})

    async def is_sleeping(self, _http: HttpRequest) -> Response:
        """Whether the engine sleeps."""
        return answer({"is_sleeping": self._asleep is not None})

    async def fall_asleep(self, mode: str, released: Set[str]) -> None:
        """Whatever runs ends (mode abort) or waits (keep)."""

        def act(scheduler: Scheduler) -> None:
            if self._asleep is None:
                self._asleep = scheduler.paused
            self._released |= released
            control.pause(scheduler, "abort" if mode == "abort" else "retract")
            scheduler.prefix.clear()

        await self.service.on_engine(act)

    async def awake(self, resumed: Set[str]) -> None:
        """Go on as before the sleep, when nothing is left that was released."""

        def act(scheduler: Scheduler) -> None:
            self._released -= resumed
            if self._asleep is not None and not self._released:
                scheduler.paused, self._asleep = self._asleep, None

        await self.service.on_engine(act)


def _different(sums: dict[str, str], known: dict[str, str] | None) -> list[str] | None:
    if known is None:
        return None
    return sorted(name for name in sums.keys() | known.keys() if sums.get(name) != known.get(name))


async def _tags(http: HttpRequest) -> Set[str]:
    """What the request names, or all."""
    return memory((await read_body(http, MemoryBody)).tags if http.method == "POST" else None)


def memory(tags: Sequence[str] | None) -> Set[str]:
    """What `tags` name; all where there are none. Raises FullarcError for memory that there is not."""
    for tag in tags or ():
        if tag not in TAGS:
            raise FullarcError(f"There is no memory called {tag[:100]!r}.", "Tags are weights and kv_cache.")
    return MEMORY.intersection(tags) if tags else MEMORY
