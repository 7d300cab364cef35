"""The engine over HTTP, with the endpoints and field names of SGLang (spec: engine.md, section 5).

    POST /generate                  one or many sequences, n samples each, server-sent events with "stream"
    POST /update_weights_from_disk  verify, load beside the running weights, swap between two steps
    POST /pause_generation /continue_generation /abort_request   GET|POST /flush_cache
    GET  /health /health_generate /model_info /server_info /metrics /v1/loads

Invariants: every request ends with an answer of its own; a bad body is a 4xx in one sentence and touches nobody else;
an update that fails leaves the old weights in place. Without an API key the server listens on loopback only.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fullarc.config.errors import FullarcError
from fullarc.engine.engine import Engine, load_weights, same_shape
from fullarc.engine.guard import KeyCheck, answering, read_body
from fullarc.engine.metrics import Latencies, prometheus
from fullarc.engine.products import DTYPES
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.scheduler import QueueFullError, Request, RequestError, Scheduler
from fullarc.engine.wire import AbortBody, GenerateBody, PauseBody, SeedSource, UpdateBody, reply, requests_of
from fullarc.engine.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PARENT_POLL_S = 0.5
DISCONNECT_POLL_S = 0.25


class Server:
    """The endpoints around one worker. `app` is the ASGI application."""

    def __init__(self, engine: Engine, model_path: str, api_key: str | None = None, seed: int = 0) -> None:
        self.worker = Worker(engine.scheduler)
        self.model_path, self.started = str(model_path), time.time()
        self.latencies = Latencies()
        self._seeds, self._update = SeedSource(seed), asyncio.Lock()
        self._number = 0
        get, post, both = ["GET"], ["POST"], ["GET", "POST"]
        routes: list[tuple[str, Callable[[HttpRequest], Awaitable[Response]], list[str]]] = [
            ("/generate", self.generate, post),
            ("/update_weights_from_disk", self.update_weights, post),
            ("/pause_generation", self.pause, post),
            ("/continue_generation", self.resume, post),
            ("/abort_request", self.abort, post),
            ("/flush_cache", self.flush, both),
            ("/health", self.health, get),
            ("/health_generate", self.health_generate, get),
            ("/model_info", self.model_info, get),
            ("/get_model_info", self.model_info, get),
            ("/server_info", self.server_info, get),
            ("/get_server_info", self.server_info, get),
            ("/metrics", self.metrics, get),
            ("/v1/loads", self.loads, get),
        ]
        self.app = Starlette(
            routes=[Route(path, answering(endpoint), methods=methods) for path, endpoint, methods in routes],
            middleware=[Middleware(KeyCheck, key=api_key)] if api_key else [],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        self.worker.call(lambda s: s.abort(None))
        await asyncio.to_thread(self.worker.stop)

    async def _on_engine(self, function: Callable[[Scheduler], Any]) -> Any:
        return await asyncio.wrap_future(self.worker.call(function))

    # --- generation -------------------------------------------------------------------------------------------

    async def generate(self, http: HttpRequest) -> Response:
        body = await read_body(http, GenerateBody)
        self._number += 1
        eos = self.worker.scheduler.core.weights.config.eos_token_id
        requests = requests_of(body, f"fullarc-{self._number}", eos, self._seeds)
        if body.stream and body.batched:
            raise RequestError("stream is for a single sequence.", "Send one prompt per request with n = 1.")
        events: asyncio.Queue[Request] = asyncio.Queue()
        loop, ends = asyncio.get_running_loop(), itertools.count(1)

        def notify(request: Request) -> None:
            # waking the event loop interrupts the engine: once per answer, at its last end
            if body.stream or next(ends) == len(requests):
                loop.call_soon_threadsafe(events.put_nowait, request)

        for request in requests:
            request.on_finish = notify
            request.on_token = notify if body.stream else None
        await self._on_engine(lambda s: _submit_all(s, requests))
        logprobs = bool(body.return_logprob)
        if body.stream:
            return StreamingResponse(
                self._stream(requests[0], events, logprobs), media_type="text/event-stream"
            )
        await self._finished(http, requests, events)
        for request in requests:
            self.latencies.observe(request)
        answers = [reply(request, logprobs) for request in requests]
        return JSONResponse(answers if body.batched else answers[0])

    async def _finished(
        self, http: HttpRequest, requests: list[Request], events: asyncio.Queue[Request]
    ) -> None:
        """Wait for the last end; a client that hangs up frees its slots."""
        while True:
            try:
                await asyncio.wait_for(events.get(), DISCONNECT_POLL_S)
                return
            except TimeoutError:
                if await http.is_disconnected():
                    self._cancel(requests)

    def _cancel(self, requests: list[Request]) -> None:
        self.worker.call(lambda s: [s.abort(r.rid) for r in requests if not r.finish])

    async def _stream(
        self, request: Request, events: asyncio.Queue[Request], logprobs: bool
    ) -> AsyncIterator[str]:
        """Cumulative answers as they grow; when the client falls behind, intermediate ones are left out."""
        try:
            while True:
                await events.get()
                while not events.empty():
                    events.get_nowait()
                done = bool(request.finish)
                yield f"data: {json.dumps(reply(request, logprobs))}\n\n"
                if done:
                    break
            self.latencies.observe(request)
            yield "data: [DONE]\n\n"
        finally:
            if not request.finish:
                self._cancel([request])

    # --- weights and control ----------------------------------------------------------------------------------

    async def update_weights(self, http: HttpRequest) -> Response:
        body = await read_body(http, UpdateBody)
        async with self._update:
            old = self.worker.scheduler.core.weights
            version = body.weight_version
            if version is None:
                version = str(int(old.version) + 1) if old.version.isdigit() else "1"
            begin = time.monotonic()
            try:
                weights = await asyncio.to_thread(load_weights, body.model_path, version, old.dtype)
                same_shape(weights, old)
            except FullarcError as error:
                return JSONResponse({"success": False, "message": str(error)}, status_code=400)

            def swap(scheduler: Scheduler) -> int:
                if body.abort_all_requests:
                    scheduler.abort(None)
                scheduler.set_weights(weights)
                return len(scheduler.running)

            running = await self._on_engine(swap)
            self.model_path = body.model_path
        message = f"Loaded weight version {version} in {time.monotonic() - begin:.3f} s."
        return JSONResponse(
            {"success": True, "message": message, "weight_version": version, "num_paused_requests": running}
        )

    async def pause(self, http: HttpRequest) -> Response:
        body = await read_body(http, PauseBody)

        def act(scheduler: Scheduler) -> None:
            scheduler.paused = True
            if body.mode == "abort":
                scheduler.abort(None)
            elif body.mode == "retract":
                scheduler.retract()

        await self._on_engine(act)
        return JSONResponse({"status": "ok", "message": "Generation paused."})

    async def resume(self, _http: HttpRequest) -> Response:
        await self._on_engine(lambda s: setattr(s, "paused", False))
        return JSONResponse({"status": "ok", "message": "Generation continues."})

    async def abort(self, http: HttpRequest) -> Response:
        body = await read_body(http, AbortBody)
        if not (body.rid or body.abort_all):
            raise RequestError("abort_request needs rid or abort_all.")
        count = await self._on_engine(lambda s: s.abort(None if body.abort_all else body.rid))
        return JSONResponse({"aborted": count})

    async def flush(self, _http: HttpRequest) -> Response:
        def act(scheduler: Scheduler) -> int:
            pending = len(scheduler.running) + len(scheduler.waiting)
            if not pending:
                scheduler.prefix.clear()
            return pending

        if pending := await self._on_engine(act):
            return PlainTextResponse(
                f"{pending} requests are pending; the cache was not flushed.", status_code=400
            )
        return PlainTextResponse("Cache flushed.")

    # --- information ------------------------------------------------------------------------------------------

    async def health(self, _http: HttpRequest) -> Response:
        if self.worker.healthy:
            return PlainTextResponse("ok")
        return PlainTextResponse(f"The engine failed: {self.worker.error!r}", status_code=503)

    async def health_generate(self, _http: HttpRequest) -> Response:
        if not self.worker.healthy or self.worker.scheduler.paused:
            return PlainTextResponse("The engine does not generate.", status_code=503)
        self._number += 1
        request = Request(f"health-{self._number}", [0], SamplingParams(max_new_tokens=1, temperature=0.0))
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def notify(_: Request) -> None:
            loop.call_soon_threadsafe(done.set)

        request.on_finish = notify
        await self._on_engine(lambda s: _submit_all(s, [request]))
        await done.wait()
        return PlainTextResponse("ok" if request.finish == "length" else "aborted", status_code=200)

    async def model_info(self, _http: HttpRequest) -> Response:
        s = self.worker.scheduler
        return JSONResponse(
            {
                "model_path": self.model_path,
                "weight_version": s.version,
                "is_generation": True,
                "vocab_size": s.core.weights.config.vocab_size,
                "max_model_len": s.max_len,
                "eos_token_id": list(s.core.weights.config.eos_token_id),
            }
        )

    async def server_info(self, _http: HttpRequest) -> Response:
        s = self.worker.scheduler
        return JSONResponse(
            {
                "model_path": self.model_path,
                "weight_version": s.version,
                "max_running_requests": s.core.cache.slots,
                "max_queued_requests": s.max_queue,
                "max_total_num_tokens": s.core.cache.slots * s.max_len,
                "chunked_prefill_size": s.chunk_tokens,
                "enable_deterministic_inference": True,
                "model_config": s.core.weights.config.to_hf(),
                "uptime_s": time.time() - self.started,
            }
        )

    async def loads(self, _http: HttpRequest) -> Response:
        s = self.worker.scheduler
        running, waiting = len(s.running), len(s.waiting)
        load = {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": waiting}
        return JSONResponse({"loads": [load], "num_running_reqs": running, "num_waiting_reqs": waiting})

    async def metrics(self, _http: HttpRequest) -> Response:
        text = prometheus(self.worker.scheduler, self.latencies, self.worker.busy_s)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _submit_all(scheduler: Scheduler, requests: list[Request]) -> None:
    """All or nothing: a batch with one bad prompt, or too large for the queue, is refused as a whole."""
    names = [request.rid for request in requests]
    known = {*scheduler.running, *(request.rid for request in scheduler.waiting)}
    if len(set(names)) < len(names) or known.intersection(names):
        raise RequestError("rid is in use already.", "Choose another one, or none.")
    for request in requests:
        scheduler.check(request)
    if len(scheduler.waiting) + len(requests) > scheduler.max_queue:
        raise QueueFullError(
            f"The queue holds {scheduler.max_queue} requests and is full.", "Try again later."
        )
    for request in requests:
        scheduler.submit(request)


class _Announcing(uvicorn.Server):
    """Prints where it listens, as one JSON line, once it does."""

    announcement: dict[str, Any]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(json.dumps(self.announcement), flush=True)


def _leave_with_parent(parent: int) -> None:
    """End this process when `parent` has died (works whichever thread of the parent started us)."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fullarc.engine.server", description="Serve a checkpoint (SGLang API)."
    )
    parser.add_argument("--model", required=True, type=Path, help="checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback only with --api-key")
    parser.add_argument("--port", type=int, default=30000, help="0 = any free port")
    parser.add_argument("--api-key", default=os.environ.get("FULLARC_API_KEY"), help="or FULLARC_API_KEY")
    parser.add_argument("--max-batch", type=int, default=64, help="sequences decoded together")
    parser.add_argument("--max-len", type=int, default=2048, help="tokens per sequence, prompt included")
    parser.add_argument("--max-queue", type=int, default=4096, help="waiting requests before 429")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weight-version", default="0")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="bf16: half the memory; fp8: emulated"
    )
    parser.add_argument("--detach", action="store_true", help="go on when the parent process has died")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes or the parent dies. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.host not in LOOPBACK and not args.api_key:
            raise FullarcError(
                f"Refusing to listen on {args.host} without a key.", "Give --api-key, or use loopback."
            )
        parent = os.getppid()
        engine = Engine(
            args.model,
            args.max_batch,
            args.max_len,
            args.threads,
            weight_version=args.weight_version,
            dtype=args.dtype,
        )
        engine.scheduler.max_queue = args.max_queue
        try:
            listener = socket.create_server((args.host, args.port), backlog=1024)
        except OSError as error:
            raise FullarcError(
                f"Cannot listen on {args.host}:{args.port}: {error.strerror}.", "Try --port 0."
            ) from None
    except FullarcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not args.detach:
        threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        Server(engine, args.model, args.api_key).app, log_level="warning", access_log=False
    )
    server = _Announcing(config)
    server.announcement = {"url": f"http://{args.host}:{port}", "port": port, "pid": os.getpid()}
    server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
