"""`fullarc serve`: a checkpoint behind the gateway, and the pieces to start one from Python.

The engine is a child process on a free loopback port (it leaves when its parent does), or several share the requests
(`replicas`); the gateway runs here, records sessions and hands everything else on: the chat page, chats that stand
alone, SGLang's and vLLM's routes.
Everything listens on loopback unless an API key is set.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal

import uvicorn
from starlette.types import ASGIApp

from fullarc.chat import Tokenizer
from fullarc.config.errors import FullarcError, UsageError
from fullarc.config.files import is_complete
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.replicas import Replicas

START_S = 120.0
STOP_S = 10.0
MAX_LEN = 4096
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# options of `python -m fullarc.engine.server` that are ours too, with what they take
ENGINE_OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("--dtype", "fp32|bf16|fp8", "what the engine computes in"),
    ("--kernels", "auto|native|torch", "auto: in C where there is a compiler"),
    ("--deterministic", "", "insist on bits that no batch, chunk or cache changes"),
    ("--threads", "N", "that compute a step; default 1"),
    ("--max-batch", "N", "sequences decoded together; default 16"),
    ("--max-queue", "N", "waiting requests before 429"),
    ("--weight-version", "NAME", "what the weights are called"),
    ("--speculative-num-steps", "N", "tokens that the MTP layer drafts ahead, at most 4"),
    ("--speculative-use-rejection-sampling", "", "accept more drafts when sampling"),
    ("--prefix-mb", "N", "memory for cached prefixes"),
    ("--prefix-spill", "FOLDER", "prefixes that memory has no room for go here"),
    ("--prefix-spill-mb", "N", "what is reserved there; default 1024"),
    ("--overlap", "", "do what a step leaves behind the next one"),
    ("--enable-return-routed-experts", "npy|compact", "tell routed experts on vLLM's routes by default"),
)


def resolve_model(path: Path | str | None) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest complete checkpoint of a run, of all runs (None).

    Raises FullarcError saying what was looked for and where.
    """
    folder = Path("runs") if path is None else Path(path)
    if (folder / "config.json").is_file():
        return folder
    pattern = "*/stages/*/checkpoint" if path is None else "stages/*/checkpoint"
    found = sorted(folder.glob(pattern), key=lambda p: _written(p), reverse=True)
    for checkpoint in found:
        if is_complete(checkpoint):
            return checkpoint
    if path is not None and not folder.exists():
        raise FullarcError(f"{folder} does not exist.", "Give a checkpoint folder or a run folder.")
    raise FullarcError(
        f"{folder}/ holds no complete checkpoint.",
        "Make one: fullarc run recipes/laptop.toml (or make demo).",
    )


def _written(checkpoint: Path) -> float:
    manifest = checkpoint / "manifest.json"
    return manifest.stat().st_mtime if manifest.is_file() else 0.0


def context_length(model: Path) -> int:
    """Tokens per sequence to serve: what the checkpoint allows, at most MAX_LEN."""
    try:
        return min(MAX_LEN, int(json.loads((model / "config.json").read_text())["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise FullarcError(
            f"{model}/config.json has no max_position_embeddings.", "Is it a model folder?"
        ) from None


class EngineProcess:
    """The engine server of a checkpoint as a child process; a context manager that gives its URL.

    `told`: what it announced. Raises FullarcError with the engine's own words if it does not come up within `START_S`
    seconds.
    """

    def __init__(
        self, model: Path, max_len: int, max_batch: int = 16, threads: int = 1, options: Sequence[str] = ()
    ) -> None:
        self.command = [
            sys.executable, "-m", "fullarc.engine.server", "--model", str(model), "--port", "0",
            "--max-len", str(max_len), "--max-batch", str(max_batch), "--threads", str(threads), *options,
        ]  # fmt: skip
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self._process: subprocess.Popen[bytes] | None = None
        self.told: dict[str, Any] = {}

    def __enter__(self) -> str:
        env = {name: value for name, value in os.environ.items() if name != "FULLARC_API_KEY"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=self._stderr, stdin=subprocess.DEVNULL, env=env,
            start_new_session=True,
        )  # fmt: skip
        told: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout, told), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            self.told = told.get(timeout=START_S)
        if not self.told:
            self.stop()
            raise FullarcError(f"The engine did not start: {self.words() or 'it said nothing'}")
        return self.url

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.told['port']}"

    def __exit__(self, *_: object) -> None:
        self.stop()

    @staticmethod
    def _read(stdout: IO[bytes], told: "queue.Queue[dict[str, Any]]") -> None:
        for line in stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                announced = json.loads(line)
                told.put(announced | {"port": int(announced["port"])})
        told.put({})

    def words(self) -> str:
        """The last line the engine wrote to stderr."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def dead(self) -> bool:
        """True when it ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """End it: politely, then not."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an ASGI app on a free loopback port from a thread of this process; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise FullarcError("The local server did not start.")
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(STOP_S)


@contextlib.contextmanager
def local_gateway(
    model: Path,
    engines: Sequence[EngineProcess] | str | None = None,
    max_len: int = 0,
    api_key: str | None = None,
    passes: Literal["", "routes", "all"] = "",
) -> Iterator[Gateway]:
    """A gateway for a checkpoint folder, before the engine at a URL or those that are started (and stopped) here."""
    tok = Tokenizer.load(model)
    max_len = max_len or context_length(model)
    name = model.parent.name if model.name == "checkpoint" else model.name
    engines = engines or [EngineProcess(model, max_len)]
    with contextlib.ExitStack() as stack:
        if isinstance(engines, str):
            urls = [engines]
        else:
            with ThreadPoolExecutor() as pool:  # all at once
                urls = list(pool.map(stack.enter_context, engines))
        yield Gateway(Replicas(urls), tok, model=name, max_len=max_len, api_key=api_key, passes=passes)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise FullarcError(f"Can not listen on {host}:{port}: {why}.", "Choose another --port.") from None


def main(argv: Sequence[str]) -> int:
    """`fullarc serve`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fullarc serve", description="Serve a checkpoint to OpenAI, Anthropic, SGLang and vLLM clients."
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="RUN_OR_DIR", help="default: the newest run")
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback only with --api-key")
    parser.add_argument("--port", type=int, default=8000, help="0 = any free port")
    parser.add_argument("--api-key", default=os.environ.get("FULLARC_API_KEY"), help="or FULLARC_API_KEY")
    parser.add_argument(
        "--max-len",
        type=int,
        default=0,
        help=f"tokens per sequence; default: what the model allows, at most {MAX_LEN}",
    )
    parser.add_argument("--engine", default="", metavar="URL", help="a running engine instead of our own")
    parser.add_argument(
        "--engines", type=int, default=1, metavar="N", help="processes that share the requests, a core each"
    )
    own = parser.add_argument_group("of each engine that is started")
    for name, takes, says in ENGINE_OPTIONS:
        if takes:
            own.add_argument(name, metavar=takes, help=says)
        else:
            own.add_argument(name, action="store_true", help=says)
    args = parser.parse_args(argv)
    options = _engine_options(args)
    if args.engine and options:
        raise UsageError(f"{options[0]} is for an engine that is started here.", "Leave out --engine.")
    if args.engines < 1 or (args.engine and args.engines > 1):
        raise UsageError("--engines is how many are started here, at least 1.", "Leave out --engine.")
    if args.max_len < 0:
        raise UsageError(f"--max-len is {args.max_len}.", "Give at least 1, or leave it out.")
    if args.host not in LOOPBACK and not args.api_key:
        raise UsageError(
            f"Refusing to listen on {args.host} without a key.", "Give --api-key, or use loopback."
        )
    model = resolve_model(args.model)
    listener = _listen(args.host, args.port)
    max_len = args.max_len or context_length(model)
    count = 0 if args.engine else args.engines
    engines = [EngineProcess(model, max_len, options=options) for _ in range(count)]
    passes: Literal["routes", "all"] = "all" if engines else "routes"  # others' engines may chat otherwise
    print(f"Starting {'the engine' if count < 2 else f'{count} engines'} for {model} …", file=sys.stderr)
    with listener, local_gateway(model, engines or args.engine, max_len, args.api_key, passes) as gateway:
        server = uvicorn.Server(uvicorn.Config(gateway.app, log_level="warning", lifespan="off"))
        if engines:
            used = gateway.engine.engines
            threading.Thread(target=_stop_with, args=(engines, used, server), daemon=True).start()
        host = f"[{args.host}]" if ":" in args.host else args.host
        at = f"http://{host}:{listener.getsockname()[1]}"
        print(
            f"{gateway.model} ({max_len} tokens) answers OpenAI clients at {at}/v1, Anthropic's, SGLang's and vLLM's "
            f"at {at}, and you at {at}/ in a browser. Stop it with Ctrl-C.",
            flush=True,
        )
        if engines and (deterministic := engines[0].told.get("deterministic")):
            print(deterministic, flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down cleanly and passes the signal on
            server.run(sockets=[listener])
        for engine in engines:
            if _missed(engine, gateway.engine.engines):
                raise FullarcError(f"The engine ended: {engine.words() or 'it said nothing'}", "Start again.")
    return 0


def _engine_options(args: argparse.Namespace) -> list[str]:
    """The command line's options that are the engine's, as they are handed on."""
    given = (
        (name, getattr(args, name.removeprefix("--").replace("-", "_"))) for name, _, _ in ENGINE_OPTIONS
    )
    return [
        part for name, value in given if value for part in ([name] if value is True else [name, str(value)])
    ]


def _stop_with(
    engines: Sequence[EngineProcess], used: Sequence[EngineClient], server: uvicorn.Server
) -> None:
    while not any(_missed(engine, used) for engine in engines):
        time.sleep(0.5)
    server.should_exit = True


def _missed(engine: EngineProcess, used: Sequence[EngineClient]) -> bool:
    """Whether it has ended and was not removed before."""
    return engine.dead() and any(client.url == engine.url for client in list(used))
