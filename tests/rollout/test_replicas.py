"""Two engines as one: who is asked, and that both know what changes an engine."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fullarc.chat import Tokenizer
from fullarc.chat.openai import BadRequest
from fullarc.rollout import replicas
from fullarc.rollout.engine_client import EngineError, Sampling
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import Gateway
from fullarc.rollout.merged import merged
from fullarc.rollout.replicas import Replicas
from fullarc.rollout.serve import EngineProcess, _missed, serving

FAR = 20.0
FOLDER, BROADCAST = "/update_weights_from_disk", "/update_weights_from_distributed"
PULL, LORA, LOAD = "/pull_weights", "/areal_update_weights_lora", "/v1/load_lora_adapter"
TRL = ("/update_named_param/", "/reset_prefix_cache/", "/close_communicator/")
UPDATE = {"model_path": "/somewhere", "weight_version": "5"}


class Loading(FakeEngine):
    """Its answers end when `free` is set, those to updates with a refusal if `refuses`. `told`: what came."""

    def __init__(self, engine: FakeEngine, refuses: bool = False) -> None:
        super().__init__(engine.script, engine.stop_ids)
        self.begun, self.free, self.refuses = threading.Event(), threading.Event(), refuses
        self.told: list[dict[str, Any]] = []
        self.app.add_route("/get_load", self._load)
        for path in (BROADCAST, PULL, LORA, LOAD, *TRL):
            self.app.add_route(path, self._update, methods=["POST"])

    async def _update(self, http: Request) -> Response:
        self.told.append(await http.json())
        await self._held(http)
        if self.refuses:
            return JSONResponse({"message": "no"}, 400)
        reply = await super()._update(http)
        return PlainTextResponse("Success.") if http.url.path == LOAD else reply

    async def _generate(self, http: Request) -> Response:
        await self._held(http)
        return await super()._generate(http)

    async def _info(self, http: Request) -> Response:
        if not self.begun.is_set():
            await self._held(http)
        return await super()._info(http)

    async def _load(self, http: Request) -> Response:
        await self._held(http)
        return JSONResponse([{"num_reqs": 3}])

    async def _held(self, http: Request) -> None:
        await http.body()
        self.begun.set()
        while not self.free.is_set():
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def before(tok: Tokenizer, *urls: str) -> Iterator[httpx.Client]:
    """A client of a gateway with these engines."""
    app = Gateway(Replicas(urls), tok, passes="all").app
    with serving(app) as url, httpx.Client(base_url=url, timeout=FAR, trust_env=False) as client:
        yield client


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FAR
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def two(engine: FakeEngine, tok: Tokenizer) -> list[FakeEngine]:
    return [FakeEngine(engine.script, tok.stop_ids) for _ in range(2)]


async def test_requests_are_shared_out_and_the_answer_does_not_depend_on_who_gave_it(
    two: list[FakeEngine], engine: FakeEngine
) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second, serving(engine.app) as alone:
        async with Replicas([first, second]) as both, Replicas([alone]) as single:
            asked = [([1, n], Sampling(seed=n)) for n in range(8)]
            got = await asyncio.gather(*(both.generate_batch([p], [s]) for p, s in asked))
            assert got == [await single.generate_batch([p], [s]) for p, s in asked]
            assert [len(e.prompts) for e in two] == [4, 4]
            assert [c async for c in both.stream([1, 2], Sampling(seed=1))][-1].finish == "stop"


async def test_a_session_stays_where_its_prefix_is(two: list[FakeEngine]) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second:
        async with Replicas([first, second]) as both:
            for session in ("a", "b", "c", "d", "e"):
                before = [len(e.prompts) for e in two]
                await asyncio.gather(*(both.generate([3], Sampling(seed=n), session) for n in range(4)))
                after = [len(e.prompts) for e in two]
                assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 4]
            assert all(len(e.prompts) for e in two), "not every session went to one engine"


async def test_weights_and_pauses_reach_all_and_one_that_is_gone_is_an_error(two: list[FakeEngine]) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second:
        async with Replicas([first, second], retries=0) as both:
            await both.update_weights("/somewhere", 5)
            await both.pause()
            assert [(e.version, e.paused) for e in two] == [(5, True), (5, True)]
            await both.resume()
            assert not any(e.paused for e in two) and await both.health()
        async with Replicas([first, "http://127.0.0.1:9"], retries=0) as half:
            with pytest.raises(EngineError, match="No engine answers"):
                await half.update_weights("/elsewhere", 6)
            assert not await half.health()


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("path", [FOLDER, BROADCAST, PULL, LORA, LOAD, *TRL])
def test_no_engine_is_added_while_an_update_loads(
    engine: FakeEngine, tok: Tokenizer, path: str, others: int
) -> None:
    loading = [Loading(engine) for _ in range(1 + others)]
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(one.app)) for one in loading]
        late = stack.enter_context(serving(engine.app))
        web = stack.enter_context(before(tok, *urls))
        pool = stack.enter_context(ThreadPoolExecutor())
        update = pool.submit(web.post, path, json=UPDATE)
        assert all(one.begun.wait(FAR) for one in loading)
        adding = pool.submit(web.post, "/workers", json={"url": late})
        time.sleep(0.3)
        assert not adding.done() and web.get("/health").status_code == 200
        for one in loading:
            one.free.set()
        assert update.result().status_code == 200
        refused = adding.result()
        assert refused.status_code == 400 and "weight_version 0, the others 5" in refused.text
        assert web.get("/workers").json()["total"] == 1 + others


async def joining(both: Replicas, url: str) -> "asyncio.Task[str]":
    """What it says, when it has had the time to look at the engine."""

    async def join() -> str:
        try:
            return (await both.join(url)).name
        except BadRequest as error:
            return str(error)

    task = asyncio.create_task(join())
    await asyncio.wait([task], timeout=1.5)
    return task


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_no_engine_is_added_while_a_method_updates(engine: FakeEngine, hangs_up: bool) -> None:
    """Also when nobody waits for the update any more: the engines still load."""
    loading = [Loading(engine) for _ in range(2)]
    with serving(loading[0].app) as first, serving(loading[1].app) as second, serving(engine.app) as late:
        async with Replicas([first, second]) as both:
            update = asyncio.create_task(both.update_weights("/somewhere", 5))
            for one in loading:
                assert await asyncio.to_thread(one.begun.wait, FAR)
            if hangs_up:
                update.cancel()
            adding = await joining(both, late)
            assert not adding.done()
            for one in loading:
                one.free.set()
            assert "weight_version 0, the others 5" in await adding
            await asyncio.gather(update, return_exceptions=True)


async def test_an_engine_that_was_looked_at_before_a_change_is_looked_at_again(engine: FakeEngine) -> None:
    """Otherwise it is added with the weights that the others had when it was asked."""
    others, late = FakeEngine(engine.script, ()), Loading(engine)
    with serving(others.app) as first, serving(late.app) as second:
        async with Replicas([first]) as both:
            adding = await joining(both, second)
            assert late.begun.is_set() and not adding.done(), "it is being asked"
            await asyncio.wait_for(both.update_weights("/somewhere", 5), FAR)  # waits for nobody
            late.free.set()
            assert "weight_version 0, the others 5" in await adding
            late.version = 5
            assert await (await joining(both, second)) == "1"


async def test_updates_come_to_all_in_one_order(engine: FakeEngine) -> None:
    slow, quick = Loading(engine), Loading(engine)
    quick.free.set()
    with serving(slow.app) as first, serving(quick.app) as second:
        async with Replicas([first, second]) as both:
            updates = [asyncio.create_task(both.update_weights("/x", version)) for version in (5, 6)]
            assert await asyncio.to_thread(slow.begun.wait, FAR)
            await asyncio.sleep(0.3)
            assert [one.told[-1]["weight_version"] for one in (slow, quick)] == ["5", "5"]
            slow.free.set()
            await asyncio.gather(*updates)
            assert [one.version for one in (slow, quick)] == [6, 6]


HANGS = """
import http.server, sys, time
class Engine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def do_POST(self):
        print("begun", flush=True)
        time.sleep(1000)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_in_the_middle_holds_up_nobody(
    engine: FakeEngine, two: list[FakeEngine], tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, blow: int
) -> None:
    """One that is killed breaks its connections off; one that hangs must be looked at. A slow one is only slow."""
    monkeypatch.setattr(replicas, "LOOK_S", 0.1)
    monkeypatch.setattr(replicas, "LOOKS", 1)
    slow = Loading(engine)
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        bad = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with serving(slow.app) as first, serving(two[1].app) as late, before(tok, first, bad) as web:
            with ThreadPoolExecutor() as pool:
                update = pool.submit(web.post, LORA, json=UPDATE)
                assert slow.begun.wait(FAR) and process.stdout.readline() == "begun\n"
                process.send_signal(blow)
                time.sleep(1)
                slow.free.set()
                told = update.result(FAR)
            assert told.status_code == 200 and told.json()["taken_out"][0]["url"] == bad
            two[1].version = 5
            assert web.post("/workers", json={"url": late}).status_code == 202
            assert web.post(FOLDER, json=UPDATE | {"weight_version": "6"}).status_code == 200
            assert (slow.version, two[1].version) == (6, 6)
    finally:
        process.kill()
        process.communicate()


def test_an_answer_in_plain_text_says_too_who_was_taken_out(engine: FakeEngine, tok: Tokenizer) -> None:
    good, bad = Loading(engine), Loading(engine, refuses=True)
    good.free.set()
    bad.free.set()
    with serving(good.app) as first, serving(bad.app) as second, before(tok, first, second) as web:
        told = web.post(LOAD, json=UPDATE)
        assert told.headers["content-type"] == "application/json"
        assert told.json()["message"].startswith("Success. Taken out") and second in told.json()["message"]


def test_an_update_ends_also_when_its_client_hangs_up(engine: FakeEngine, tok: Tokenizer) -> None:
    good, bad = Loading(engine), Loading(engine, refuses=True)
    with serving(good.app) as first, serving(bad.app) as second, before(tok, first, second) as web:
        with pytest.raises(httpx.ReadTimeout):
            web.post(FOLDER, json=UPDATE, timeout=1.0)
        assert good.begun.wait(FAR) and bad.begun.wait(FAR)
        time.sleep(0.3)  # the gateway sees it
        good.free.set()
        bad.free.set()
        wait(lambda: web.get("/list_workers").json() == {"urls": [first]})
        assert good.version == 5


def test_an_update_never_takes_out_the_last_engine(engine: FakeEngine, tok: Tokenizer) -> None:
    good, bad = Loading(engine), Loading(engine, refuses=True)
    with serving(good.app) as first, serving(bad.app) as second, before(tok, first, second) as web:
        with ThreadPoolExecutor() as pool:
            update = pool.submit(web.post, FOLDER, json=UPDATE)
            assert good.begun.wait(FAR) and bad.begun.wait(FAR)
            web.delete("/workers/0").raise_for_status()
            good.free.set()
            bad.free.set()
            assert update.result().status_code == 400
        assert web.get("/list_workers").json() == {"urls": [second]}


def test_an_engine_is_added_once_however_its_url_is_written(two: list[FakeEngine], tok: Tokenizer) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second, before(tok, first) as web:
        names = ("127.0.0.1", "localhost", "LOCALHOST", "127.0.0.1")
        bodies = [{"url": second.replace("127.0.0.1", name) + "/"} for name in names]
        with ThreadPoolExecutor() as pool:
            told = list(pool.map(lambda body: web.post("/workers", json=body), bodies))
        assert sorted(one.status_code for one in told) == [202, 400, 400, 400]
        assert all("a worker already" in one.text for one in told if one.status_code == 400)
        assert web.get("/workers").json()["total"] == 2


def test_a_gateway_is_no_engine_of_its_own_nor_of_one_behind_it(engine: FakeEngine, tok: Tokenizer) -> None:
    with serving(engine.app) as url, before(tok, url) as inner, before(tok, str(inner.base_url)) as outer:
        for web, bad in ((inner, inner), (inner, outer), (outer, outer)):
            for name in ("127.0.0.1", "localhost"):
                added = web.post("/workers", json={"url": str(bad.base_url).replace("127.0.0.1", name)})
                assert added.status_code == 400, added.text
                assert "is a gateway" in added.text or "a worker already" in added.text
        assert outer.post(FOLDER, json=UPDATE).json()["success"] is True
        assert engine.version == 5


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", FOLDER, UPDATE),
        ("POST", "/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}}),
        ("GET", "/model_info", None),
    ],
)
async def test_one_that_is_removed_ends_what_it_is_doing_and_is_closed(
    engine: FakeEngine, method: str, path: str, body: dict[str, Any] | None
) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield json.dumps(body).encode()

    async def ask() -> tuple[int, bytes]:
        async with both.open(method, path, [], content() if body else None) as response:
            return response.status_code, await response.aread()

    loading = [Loading(engine) for _ in range(2)]
    with serving(loading[0].app) as first, serving(loading[1].app) as second:
        async with Replicas([first, second]) as both:
            asking = asyncio.create_task(ask())
            assert await asyncio.to_thread(loading[0].begun.wait, FAR)
            removed = both.engines[0]
            await both.remove(removed)
            for one in loading:
                one.free.set()
            status, told = await asking
            assert status == 200 and b"taken_out" not in told
            assert removed._http.is_closed and not both.engines[0]._http.is_closed


@pytest.mark.parametrize("path", ["/workers", "/workers/0"])
def test_one_that_is_removed_while_it_is_listed_answers_that(
    engine: FakeEngine, two: list[FakeEngine], tok: Tokenizer, path: str
) -> None:
    loading = Loading(engine)
    with serving(loading.app) as first, serving(two[0].app) as second, before(tok, first, second) as web:
        with ThreadPoolExecutor() as pool:
            listing = pool.submit(web.get, path)
            assert loading.begun.wait(FAR)
            web.delete("/workers/0").raise_for_status()
            time.sleep(0.3)
            loading.free.set()
            told = listing.result()
        assert told.status_code == 200
        worker = told.json()["workers"][0] if path == "/workers" else told.json()
        assert (worker["url"], worker["is_healthy"], worker["load"]) == (first, True, 3)


def test_a_workers_body_is_bounded_also_without_a_length(engine: FakeEngine, tok: Tokenizer) -> None:
    def parts() -> Iterator[bytes]:
        yield from [b" " * 4096] * 17
        yield b"{}"

    with serving(engine.app) as url, before(tok, url) as web:
        assert web.post("/workers", content=b"[" * 60_000).status_code == 400
        assert web.post("/workers", content=parts()).status_code == 413
        assert web.get("/workers").json()["total"] == 1


async def test_only_an_engine_in_use_is_missed_when_it_ends() -> None:
    class Ended(EngineProcess):
        def dead(self) -> bool:
            return True

    process = Ended(Path("model"), 64)
    process.told = {"port": 9}
    async with Replicas([process.url, "http://127.0.0.1:10"]) as both:
        used = both.engines
        assert _missed(process, used)
        await both.remove(used[0])
        assert not _missed(process, used) and both.url == "http://127.0.0.1:10"


def test_of_what_is_not_understood_the_first_answer_is_given() -> None:
    assert merged("/get_load", [b"busy", b"[]"]) == b"busy" and merged("/v1/loads", [b"{}", b"{}"]) == b"{}"
    loads = [b'{"server_load": 2}', b'{"server_load": 3}']
    assert json.loads(merged("/load", loads)) == {"server_load": 5}
