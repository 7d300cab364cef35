"""What the gateway hands on: bodies, answers and streams as they are; ends on either side are ends on the other."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fullarc.chat import Tokenizer
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.serve import serving

FAR = 20.0


class Upstream:
    """An engine that notes what it was asked and who left."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.seen: list[dict[str, Any]] = []
        paths: dict[str, Callable[..., Any]] = {
            "/echo": self.echo,
            "/stream": self.stream,
            "/slow": self.slow,
        }
        paths |= {"/v1/chat/completions": self.echo, "/v1/messages": self.echo}
        self.app = Starlette(
            routes=[Route(path, app, methods=["GET", "POST", "PUT"]) for path, app in paths.items()]
        )

    async def echo(self, http: Request) -> Response:
        body = await http.body()
        self.seen.append(dict(http.headers) | {"method": http.method})
        told = {"query": str(http.url.query), "bytes": len(body), "sum": sum(body) % 251}
        return JSONResponse(told, int(http.query_params.get("status", 200)), headers={"x-own": "yes"})

    async def stream(self, http: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            try:
                for number in range(int(http.query_params["n"])):
                    yield b"data: %d\n\n" % number
                    await asyncio.sleep(0.05)
                    if number == int(http.query_params.get("break", -1)):
                        raise RuntimeError("broken")
            except asyncio.CancelledError:
                self.left.set()
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    async def slow(self, http: Request) -> Response:
        await http.body()
        while not await http.is_disconnected():
            await asyncio.sleep(0.02)
        self.left.set()
        return Response()


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def base(upstream: Upstream, tok: Tokenizer) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(upstream.app))
        yield stack.enter_context(serving(Gateway(EngineClient(url), tok, passes="all", api_key="k").app))


@pytest.fixture
def web(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=base, headers={"authorization": "Bearer k"}, timeout=FAR, trust_env=False
    ) as client:
        yield client


def test_bodies_and_answers_are_as_they_were(web: httpx.Client, upstream: Upstream) -> None:
    said = {"x-mine": "1", "origin": "http://elsewhere", "sec-fetch-site": "cross-site"}
    answer = web.post("/echo?a=%2F&b=1&status=418", content=b"\x01\xff" * 3_000_000, headers=said)
    assert answer.status_code == 418 and answer.headers["x-own"] == "yes"
    assert answer.json() == {
        "query": "a=%2F&b=1&status=418",
        "bytes": 6_000_000,
        "sum": 256 * 3_000_000 % 251,
    }
    seen = upstream.seen[-1]
    assert seen["x-mine"] == "1" and seen["content-length"] == "6000000"
    assert not {"authorization", "origin", "sec-fetch-site"} & seen.keys(), "a key lets in whoever has it"

    def parts() -> Iterator[bytes]:
        yield from [b"ab"] * 1000

    assert web.put("/echo", content=parts()).json()["bytes"] == 2000
    assert web.get("/echo").json()["bytes"] == 0 and upstream.seen[-1]["method"] == "GET"
    assert web.get("/nothing").status_code == 404 and web.delete("/echo").status_code == 405


def test_only_requests_without_a_session_are_handed_on(
    web: httpx.Client, base: str, upstream: Upstream
) -> None:
    for path in ("/v1/chat/completions", "/v1/messages"):
        assert web.post(path, json={"top_k": ["x"]}).json()["bytes"] == 15
        refused = web.post(path, json={"top_k": ["x"]}, headers={"X-Session-ID": "a"})
        assert refused.status_code == 400 and len(upstream.seen) == (1 if "chat" in path else 2)
    for path, status in (("/echo", 401), ("/", 404)):  # the page needs no key, and this engine has none
        assert httpx.get(base + path, trust_env=False).status_code == status


def test_a_stream_comes_as_it_grows(web: httpx.Client) -> None:
    times = []
    with web.stream("GET", "/stream?n=20") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) == 20 and times[-1] - times[0] > 0.5


@pytest.mark.parametrize("path", ["/stream?n=10000", "/slow"])
def test_a_client_that_hangs_up_is_gone_for_the_engine(base: str, upstream: Upstream, path: str) -> None:
    client = socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nContent-Length: 2\r\n\r\n"
    client.sendall(head.encode() + b"{}")
    time.sleep(0.3)
    assert not upstream.left.is_set()
    client.close()
    assert upstream.left.wait(FAR)


def test_a_stream_that_breaks_off_is_not_a_whole_one(web: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError), web.stream("GET", "/stream?n=20&break=3") as response:
        list(response.iter_lines())


def test_an_engine_that_is_not_there_is_a_503(tok: Tokenizer) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with serving(Gateway(EngineClient(f"http://127.0.0.1:{port}"), tok, passes="all").app) as own:
        for path, kind in (("/generate", "engine_error"), ("/v1/messages", "engine_error")):
            answer = httpx.post(own + path, json={}, trust_env=False)
            assert answer.status_code == 503 and answer.json()["error"]["type"] == kind
            assert "does not answer" in answer.json()["error"]["message"]
