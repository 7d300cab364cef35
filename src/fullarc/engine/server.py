"""The engine over HTTP, in the names that SGLang, vLLM, OpenAI and Anthropic gave such endpoints (see `api`).

    python -m fullarc.engine.server --model FOLDER

Invariants: every request ends with an answer of its own; a bad body is a 4xx in one sentence and touches nobody else;
an update that fails leaves the old weights in place. Without an API key the server listens on loopback only, and not
to pages of other sites.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.sites import OwnPages
from fullarc.config.errors import FullarcError
from fullarc.engine.api.anthropic import Anthropic
from fullarc.engine.api.chat import Chat
from fullarc.engine.api.choices import Form
from fullarc.engine.api.completions import Completions
from fullarc.engine.api.control import Control
from fullarc.engine.api.guard import Endpoint, KeyCheck, answer, http_error, openapi
from fullarc.engine.api.lora import Loras
from fullarc.engine.api.openai import Models
from fullarc.engine.api.page import Page
from fullarc.engine.api.parse import Parse
from fullarc.engine.api.profile import Profile
from fullarc.engine.api.pull import Pull
from fullarc.engine.api.responses import Responses
from fullarc.engine.api.rpc import Rpc
from fullarc.engine.api.scores import Scores
from fullarc.engine.api.service import Service
from fullarc.engine.api.sglang import Sglang
from fullarc.engine.api.tito import Tito
from fullarc.engine.api.transfer import Transfer
from fullarc.engine.api.trl import Trl
from fullarc.engine.api.updates import Updates
from fullarc.engine.api.upkeep import Upkeep
from fullarc.engine.api.vllm import Vllm
from fullarc.engine.backend import KERNELS
from fullarc.engine.engine import Engine
from fullarc.engine.products import DTYPES

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PARENT_POLL_S = 0.5


class Server:
    """The endpoints around one engine. `app` is the ASGI application."""

    def __init__(
        self,
        engine: Engine,
        model_path: str | Path,
        api_key: str | None = None,
        seed: int = 0,
        experts: Form | None = None,
    ) -> None:
        self.service = Service(engine, model_path, seed=seed, experts=experts)
        updates = Updates(self.service)
        plain = (Sglang, Tito, Scores, Control, Models, Chat, Completions, Responses, Anthropic, Parse, Page)
        self.transfer = Transfer(self.service, updates, remote=api_key is not None)
        beside = (kind(self.service, updates) for kind in (Pull, Profile, Loras, Vllm))
        upkeep = Upkeep(self.service, updates)
        some = [updates, self.transfer, upkeep, Rpc(upkeep), Trl(self.transfer), *beside]
        dialects = [*some, *(kind(self.service) for kind in plain)]
        self.endpoints = [endpoint for dialect in dialects for endpoint in dialect.endpoints()]
        self.endpoints.append(Endpoint("/openapi.json", self.openapi, ("GET",)))
        self.app = Starlette(
            routes=[endpoint.route() for endpoint in self.endpoints],
            middleware=[Middleware(KeyCheck, key=api_key) if api_key else Middleware(OwnPages)],
            exception_handlers={HTTPException: http_error},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        worker = self.service.worker
        worker.start()
        yield
        worker.call(lambda s: s.abort(None))
        await asyncio.to_thread(worker.stop)
        self.transfer.close()

    async def openapi(self, _http: HttpRequest) -> Response:
        """This description."""
        return answer(openapi(self.endpoints, "1"))


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
    parser.add_argument(
        "--kernels", choices=KERNELS, default="auto", help="auto: in C where there is a compiler"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="insist on bits that no batch, chunk or cache changes"
    )
    parser.add_argument(
        "--speculative-num-steps",
        type=int,
        default=0,
        help="tokens that the MTP layer drafts ahead, at most 4",
    )
    parser.add_argument(
        "--speculative-use-rejection-sampling", action="store_true", help="accept more drafts when sampling"
    )
    parser.add_argument(
        "--enable-return-routed-experts",
        nargs="?",
        const="npy",
        choices=("npy", "compact"),
        help="tell routed experts on vLLM's routes by default, as .npy or (prime-rl) compact",
    )
    parser.add_argument("--prefix-mb", type=float, default=None, help="memory for cached prefixes, in MB")
    parser.add_argument(
        "--prefix-spill",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="prefixes that memory has no room for go here",
    )
    parser.add_argument(
        "--prefix-spill-mb", type=float, default=1024.0, help="size of the file that is reserved there, in MB"
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="do what a step leaves in a second thread behind the next forward pass",
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
        if args.max_queue < 1:
            raise FullarcError(f"--max-queue is {args.max_queue}.", "Give at least 1.")
        parent = os.getppid()
        engine = Engine(
            args.model,
            args.max_batch,
            args.max_len,
            args.threads,
            weight_version=args.weight_version,
            dtype=args.dtype,
            draft_steps=args.speculative_num_steps,
            rejection=args.speculative_use_rejection_sampling,
            kernels=args.kernels,
            deterministic=args.deterministic,
            prefix_mb=args.prefix_mb,
            prefix_spill=args.prefix_spill,
            prefix_spill_mb=args.prefix_spill_mb,
            overlap=args.overlap,
        )
        engine.scheduler.max_queue = args.max_queue
        try:
            listener = socket.create_server((args.host, args.port), backlog=1024)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise FullarcError(f"Cannot listen on {args.host}:{args.port}: {why}.", "Try --port 0.") from None
    except FullarcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not args.detach:
        threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        Server(engine, args.model, args.api_key, experts=args.enable_return_routed_experts).app,
        log_level="warning",
        access_log=False,
    )
    server = _Announcing(config)
    server.announcement = {"url": f"http://{args.host}:{port}", "port": port, "pid": os.getpid()}
    if engine.deterministic is not None:
        server.announcement["deterministic"] = (
            f"No batch, chunk or cache changes a bit here: checked in {engine.deterministic:.2f} s. "
            "It costs nothing else: every step computes so anyway."
        )
    server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
