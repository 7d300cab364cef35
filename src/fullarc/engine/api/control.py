"""SGLang's routes that steer and describe the engine: pause, continue, abort, flush, health, information, loads,
slowness and bounds.
"""

import asyncio
import importlib.metadata
import time
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.metrics import prometheus
from fullarc.engine.api.service import Service
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.scheduler import Scheduler

FIRST = -(2**62)  # the priority before all others
HEALTH_S, HEALTH_POLL_S = 20.0, 0.01


class PauseBody(BaseModel):
    """POST /pause_generation."""

    model_config = ConfigDict(extra="ignore")
    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(BaseModel):
    """POST /abort_request."""

    model_config = ConfigDict(extra="ignore")
    rid: str | None = None
    abort_all: bool = False


class SlowBody(BaseModel):
    """POST /slow_down."""

    model_config = ConfigDict(extra="ignore")
    forward_sleep_time: float | None = Field(
        None, le=3600, description="seconds between two steps; none or 0: none"
    )


class Bounds(BaseModel):
    """The arguments of the server that can be changed while it runs."""

    model_config = ConfigDict(extra="forbid")

    max_running_requests: int | None = Field(
        None,
        strict=True,
        ge=1,
        validation_alias=AliasChoices("max_running_requests", "pp_max_micro_batch_size"),
    )
    max_queued_requests: int | None = Field(None, strict=True, ge=0)


class StateBody(BaseModel):
    """POST /set_internal_state."""

    model_config = ConfigDict(extra="ignore")
    server_args: Bounds


def pause(scheduler: Scheduler, mode: str) -> None:
    """Stop stepping; running requests end (abort), wait to be computed anew (retract), or stay (in_place)."""
    scheduler.paused = scheduler.admitting = True
    if mode == "abort":
        scheduler.abort(None)
    elif mode == "retract":
        scheduler.retract()


def resume(scheduler: Scheduler) -> None:
    """Go on stepping, and letting in."""
    scheduler.paused, scheduler.admitting = False, True


class Control:
    """The handlers. `endpoints` lists them."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        get, both = ("GET",), ("GET", "POST")
        return [
            Endpoint("/pause_generation", self.pause, body=PauseBody),
            Endpoint("/continue_generation", self.resume),
            Endpoint("/abort_request", self.abort, body=AbortBody),
            Endpoint("/flush_cache", self.flush, both),
            Endpoint("/health", self.health, get),
            Endpoint("/ready", self.ready, get),
            Endpoint("/ping", self.health, both),
            Endpoint("/health_generate", self.health_generate, get),
            Endpoint("/model_info", self.model_info, get),
            Endpoint("/get_model_info", self.model_info, get),
            Endpoint("/server_info", self.server_info, get),
            Endpoint("/get_server_info", self.server_info, get),
            Endpoint("/slow_down", self.slow_down, body=SlowBody),
            Endpoint("/set_internal_state", self.set_state, ("POST", "PUT"), StateBody),
            Endpoint("/get_weight_version", self.weight_version, get),
            Endpoint("/weight_version", self.weight_version, get),
            Endpoint("/v1/loads", self.loads, get),
            Endpoint("/get_load", self.get_load, get),
            Endpoint("/metrics", self.metrics, get),
        ]

    async def pause(self, http: HttpRequest) -> Response:
        """Stop generating."""
        body = await read_body(http, PauseBody)
        await self.service.on_engine(lambda s: pause(s, body.mode))
        return answer({"status": "ok", "message": "Generation paused."})

    async def resume(self, _http: HttpRequest) -> Response:
        """Go on generating."""
        await self.service.on_engine(resume)
        return answer({"status": "ok", "message": "Generation continues."})

    async def abort(self, http: HttpRequest) -> Response:
        """End one request and its samples, or all, with what they have."""
        body = await read_body(http, AbortBody)
        if not (body.rid or body.abort_all):
            raise RequestError("abort_request needs rid or abort_all.")
        count = await self.service.on_engine(lambda s: s.abort(None if body.abort_all else body.rid))
        return answer({"aborted": count})

    async def flush(self, _http: HttpRequest) -> Response:
        """Forget all cached prefixes, if nothing is pending."""

        def act(scheduler: Scheduler) -> int:
            pending = len(scheduler.running) + len(scheduler.waiting)
            if not pending:
                scheduler.prefix.clear()
            return pending

        if pending := await self.service.on_engine(act):
            return PlainTextResponse(f"{pending} requests are pending; the cache was not flushed.", 400)
        return PlainTextResponse("Cache flushed.")

    async def health(self, _http: HttpRequest) -> Response:
        """Whether the engine's thread lives."""
        if self.service.worker.healthy:
            return PlainTextResponse("ok")
        return PlainTextResponse(f"The engine failed: {self.service.worker.error!r}", 503)

    async def ready(self, _http: HttpRequest) -> Response:
        """Whether a request would be served now."""
        if self.service.worker.healthy and not self.service.scheduler.paused:
            return PlainTextResponse("ok")
        return PlainTextResponse("The engine does not generate.", 503)

    async def health_generate(self, _http: HttpRequest) -> Response:
        """Whether the engine generates: it ends a step for others or, where there are none, for a token of its own."""
        worker, scheduler, asked = self.service.worker, self.service.scheduler, time.monotonic()
        own = Request(
            self.service.next_id("health"),
            [0],
            SamplingParams(max_new_tokens=1, temperature=0.0),
            priority=FIRST,
        )

        def act(scheduler: Scheduler) -> None:
            if not (own.arrived or scheduler.running or scheduler.waiting):
                scheduler.submit(own, bounded=False)

        while worker.healthy and not scheduler.paused and worker.stepped < asked:
            if time.monotonic() > asked + HEALTH_S:
                return PlainTextResponse(f"No step has ended for {HEALTH_S:g} s.", 503)
            if scheduler.idle:
                worker.call(act)
            await asyncio.sleep(HEALTH_POLL_S)
        worker.call(lambda s: s.cancel(own) if own.arrived else None)  # paused before its turn came
        if worker.healthy and worker.stepped >= asked:
            return PlainTextResponse("ok")
        return PlainTextResponse("The engine does not generate.", 503)

    async def model_info(self, _http: HttpRequest) -> Response:
        """The model, its version and its bounds."""
        s, service = self.service.scheduler, self.service
        return answer({
            "model_path": service.model_path,
            "tokenizer_path": service.model_path if service.tok else None,
            "served_model_name": service.name,
            "weight_version": s.version,
            "is_generation": True,
            "model_type": "glm_moe_dsa",
            "vocab_size": s.weights.config.vocab_size,
            "max_model_len": s.max_len,
            "eos_token_id": list(s.weights.config.eos_token_id),
            "loaded_adapters": {name: adapter.folder for name, adapter in s.adapters.copy().items()},
            "weight_update_open": bool(service.collecting),
        })  # fmt: skip

    async def server_info(self, _http: HttpRequest) -> Response:
        """How the engine is set up, and the model's configuration."""
        s, service = self.service.scheduler, self.service
        return answer({
            "model_path": service.model_path,
            "served_model_name": service.name,
            "weight_version": s.version,
            "dtype": s.weights.dtype,
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "disaggregation_mode": "null",
            "speculative_num_steps": s.drafter.steps if s.drafter else None,
            "max_running_requests": s.max_running,
            "max_queued_requests": s.max_queue,
            "max_total_num_tokens": s.core.cache.slots * s.max_len,
            "context_length": s.max_len,
            "chunked_prefill_size": s.chunk_tokens,
            "enable_deterministic_inference": service.deterministic,
            "model_config": s.weights.config.to_hf(),
            "uptime_s": time.time() - service.started,
            "internal_states": [self._state()],
            "version": importlib.metadata.version("fullarc"),
        })  # fmt: skip

    def _state(self) -> dict[str, Any]:
        """What may change while the engine runs, in SGLang's words."""
        s, worker = self.service.scheduler, self.service.worker
        return {
            "effective_max_running_requests_per_dp": s.max_running,
            "max_queued_requests": s.max_queue,
            "forward_sleep_time": worker.sleep_s or None,
            "last_gen_throughput": s.counters.generated_tokens / worker.busy_s if worker.busy_s else 0.0,
            "avg_spec_accept_length": s.counters.spec.accept_length,
            "paused": s.paused,
        }

    async def slow_down(self, http: HttpRequest) -> Response:
        """Wait between two steps from now on, that a queue grows; for tests."""
        wait = (await read_body(http, SlowBody)).forward_sleep_time
        await self.service.on_engine(lambda _: setattr(self.service.worker, "sleep_s", max(wait or 0.0, 0.0)))
        return answer(None)

    async def set_state(self, http: HttpRequest) -> Response:
        """Bound from now on how many requests run and wait; those that do already stay."""
        bounds, slots = (
            (await read_body(http, StateBody)).server_args,
            self.service.scheduler.core.cache.slots,
        )
        if bounds.max_running_requests and bounds.max_running_requests > slots:
            raise RequestError(
                f"max_running_requests {bounds.max_running_requests} is more than --max-batch {slots}."
            )

        def act(scheduler: Scheduler) -> None:
            scheduler.max_running = bounds.max_running_requests or scheduler.max_running
            if bounds.max_queued_requests is not None:
                scheduler.max_queue = bounds.max_queued_requests

        await self.service.on_engine(act)
        return answer([True])

    async def weight_version(self, _http: HttpRequest) -> Response:
        """The version that samples the next token."""
        return answer({"weight_version": self.service.scheduler.version})

    async def loads(self, _http: HttpRequest) -> Response:
        """How much runs and waits."""
        load = self._load() | {"dp_rank": 0}
        totals = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_total_tokens")}
        now = datetime.now(UTC).isoformat()
        version = importlib.metadata.version("fullarc")
        return answer({"timestamp": now, "version": version, "loads": [load], "aggregate": totals, **totals})

    async def get_load(self, _http: HttpRequest) -> Response:
        """The older form of /v1/loads."""
        load = self._load()
        running, waiting = load["num_running_reqs"], load["num_waiting_reqs"]
        told = {
            "num_reqs": running + waiting,
            "num_waiting_reqs": waiting,
            "num_tokens": load["num_total_tokens"],
        }
        return answer([{"dp_rank": 0} | told])

    def _load(self) -> dict[str, int]:
        s = self.service.scheduler
        used = sum(request.computed for request in list(s.running.values()))
        return {
            "num_running_reqs": len(s.running),
            "num_waiting_reqs": len(s.waiting),
            "num_total_tokens": used,
        }

    async def metrics(self, _http: HttpRequest) -> Response:
        """Prometheus' text format."""
        text = prometheus(self.service.scheduler, self.service.latencies, self.service.worker.busy_s)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
