"""What the HTTP path costs: the same work in process and over HTTP, one after the other, with the same weights.

    throughput     tokens/s of `streams` concurrent streams over HTTP / of `Engine.generate` on the same prompts
    smoothness     99th percentile / median of the times between two events of a stream, as the client sees them
    queue          how many of `queued` requests sent at once are answered
    overlap        tokens/s with `overlap` / without, in process and over HTTP (a part of its own)
    update         longest time in which no stream gets anything while new weights come in (a part of its own)

The server is a process of its own, the client another (this one); median of `repeats` runs, in turns.
"""

import asyncio
import functools
import json
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from fullarc.evals.bench import claim

if TYPE_CHECKING:
    from fullarc.engine import Engine

SLOTS, PROMPT, NEW = 64, 32, 128


@dataclass(frozen=True)
class HttpPath:
    """Medians over the runs. tokens/s, seconds, and the bare ratios that are the claims."""

    in_process: float
    over_http: float
    ratio: float
    between_median_s: float
    between_p99_s: float
    smoothness: float
    answered: int
    queued: int


def measure(folder: Path, streams: int = SLOTS, queued: int = 1000, repeats: int = 5) -> HttpPath:
    """Measure the checkpoint `folder`. Raises FullarcError if its server does not start."""
    from fullarc.engine import Engine
    from fullarc.rollout.serve import EngineProcess

    engine = Engine(folder, max_batch=streams, max_len=2 * (PROMPT + NEW))
    prompts, bodies = _work(engine.scheduler.weights.config.vocab_size, streams)
    inside, outside, ratios, gaps = list[float](), list[float](), list[float](), list[float]()
    with EngineProcess(folder, 2 * (PROMPT + NEW), max_batch=streams) as url:
        asyncio.run(_streams(url, bodies[:2]))
        engine.generate(prompts[:2], NEW, stop_ids=())
        for _ in range(repeats):
            inside.append(_inside(engine, prompts))
            rate, between = _outside(url, bodies)
            outside.append(rate)
            gaps += between
            ratios.append(outside[-1] / inside[-1])
        answered = asyncio.run(_queue(url, prompts, queued))
    gaps.sort()
    middle, last = statistics.median(gaps), gaps[int(len(gaps) * 0.99)]
    return HttpPath(
        statistics.median(inside), statistics.median(outside), statistics.median(ratios), middle, last, last / middle,
        answered, queued,
    )  # fmt: skip


def overlap(folder: Path, streams: int = SLOTS, repeats: int = 5) -> list[dict[str, Any]]:
    """Does it pay to do what a step leaves behind the next forward pass? Medians of runs in turn."""
    from fullarc.engine import Engine
    from fullarc.rollout.serve import EngineProcess

    engines = [Engine(folder, streams, 2 * (PROMPT + NEW), overlap=way) for way in (False, True)]
    prompts, bodies = _work(engines[0].scheduler.weights.config.vocab_size, streams)
    rates: dict[str, list[tuple[float, float]]] = {"in process": [], "over HTTP": []}
    with (
        EngineProcess(folder, 2 * (PROMPT + NEW), streams) as plain,
        EngineProcess(folder, 2 * (PROMPT + NEW), streams, options=("--overlap",)) as other,
    ):
        for number in range(repeats + 1):
            inside = _inside(engines[0], prompts), _inside(engines[1], prompts)
            outside = _outside(plain, bodies)[0], _outside(other, bodies)[0]
            if number:  # the first one warms up
                rates["in process"].append(inside)
                rates["over HTTP"].append(outside)
    out = []
    for name, pairs in rates.items():
        ratio = statistics.median(b / a for a, b in pairs)
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        told = f"{after:,.0f} and {before:,.0f} tokens/s"
        out.append(
            claim(
                f"{streams} streams {name}: with overlap against without", ratio, "x", "> 1", ratio > 1, told
            )
        )
    return out


def update(folder: Path, streams: int = 16, new: int = 1900, updates: int = 5) -> list[dict[str, Any]]:
    """Do streams go on while weights are read and swapped in?"""
    from fullarc.model import load_config
    from fullarc.rollout.serve import EngineProcess

    _, bodies = _work(load_config(folder).vocab_size, streams, new)
    with EngineProcess(folder, PROMPT + new, streams) as url:
        asyncio.run(_streams(url, [body | {"max_tokens": 8} for body in bodies]))
        gaps, took, through = asyncio.run(_updating(url, folder, bodies, updates))
    longest = 1000 * max(gaps)
    each = ", ".join(f"{1000 * gap:.0f}" for gap in gaps)
    return [
        claim(f"longest time without a token for {streams} streams, in {updates} weight updates over HTTP", longest,
              "ms", "< 100", longest < 100, f"{each} ms; an update takes {1000 * statistics.median(took):.0f} ms",
              better="lower"),
        claim(f"streams that got all their tokens, and some from each of {updates + 1} versions", through, "streams",
              f"{streams}", through == streams),
    ]  # fmt: skip


async def _updating(
    url: str, folder: Path, bodies: list[dict[str, Any]], updates: int
) -> tuple[list[float], list[float], int]:
    """Of each update the longest time without an event, and how long it took; and how many streams came through."""
    streams, spans = await _connected(url, bodies), list[tuple[float, float]]()
    async with _client(url) as client:
        while not all(stream.times for stream in streams):
            await asyncio.sleep(0.005)
        for number in range(1, updates + 1):
            began = time.perf_counter()
            body = {"model_path": str(folder.resolve()), "weight_version": f"update-{number}"}
            (await client.post("/update_weights_from_disk", json=body)).raise_for_status()
            spans.append((began, time.perf_counter()))
            await asyncio.sleep(0.05)
    await asyncio.gather(*(stream.done for stream in streams))
    times = sorted(moment for stream in streams for moment in stream.times)
    pairs = list(pairwise(times))
    gaps = [
        max((b - a for a, b in pairs if b >= began and a <= ended + 0.05), default=0.0)
        for began, ended in spans
    ]
    names = [f'"weight_version":"update-{number}"'.encode() for number in range(1, updates + 1)]
    through = sum(all(name in stream.data for name in names) for stream in streams)
    return gaps, [ended - began for began, ended in spans], through


def _work(vocab: int, streams: int, new: int = NEW) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts, and the bodies that stream them."""
    prompts = [[(17 * n + 31 * at) % (vocab - 64) for at in range(PROMPT)] for n in range(streams)]
    bodies = [
        {"prompt": prompt, "max_tokens": new, "ignore_eos": True, "seed": n, "stream": True}
        for n, prompt in enumerate(prompts)
    ]
    return prompts, bodies


def _inside(engine: "Engine", prompts: list[list[int]]) -> float:
    """Tokens/s in this process."""
    engine.scheduler.prefix.clear()
    begin = time.perf_counter()
    engine.generate(prompts, NEW, seeds=range(len(prompts)), stop_ids=())
    return len(prompts) * NEW / (time.perf_counter() - begin)


def _outside(url: str, bodies: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Tokens/s of a server, and the times between events."""
    httpx.post(f"{url}/flush_cache", trust_env=False)
    return asyncio.run(_streams(url, bodies))


async def _streams(url: str, bodies: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """All bodies at once: tokens/s, and all times between two events of one stream."""
    begin = time.perf_counter()
    streams = await _connected(url, bodies)
    await asyncio.gather(*(stream.done for stream in streams))
    seconds = time.perf_counter() - begin
    gaps = [b - a for s in streams for a, b in zip(s.times, s.times[1:], strict=False)]
    return sum(body["max_tokens"] for body in bodies) / seconds, gaps


async def _connected(url: str, bodies: list[dict[str, Any]]) -> list["_Stream"]:
    """The streams, begun."""
    host, port = url.removeprefix("http://").split(":")
    streams = [_Stream(body) for body in bodies]
    for stream in streams:
        await asyncio.get_running_loop().create_connection(
            functools.partial(_itself, stream), host, int(port)
        )
    return streams


def _itself(stream: "_Stream") -> "_Stream":
    return stream


class _Stream(asyncio.Protocol):
    """One streamed request, read with as little work as there can be: the client shares the machine with the server."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self.data, self._seen = b"", 0
        self.times: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        size = len(self._body)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Content-Length: {size}\r\n\r\n"
        transport.write(head.encode() + self._body)

    def data_received(self, data: bytes) -> None:
        self.data += data
        count = self.data.count(b"data: {", self._seen)
        self._seen = max(self._seen, self.data.rfind(b"data: {") + 7)
        self.times += [time.perf_counter()] * count

    def connection_lost(self, error: Exception | None) -> None:
        if b'"finish_reason":"length"' not in self.data:
            self.done.set_exception(RuntimeError(f"A stream did not end well: {self.data[-300:]!r}"))
        else:
            self.done.set_result(None)


async def _queue(url: str, prompts: list[list[int]], count: int) -> int:
    async with _client(url) as client:

        async def one(number: int) -> bool:
            params = {"max_new_tokens": 4, "ignore_eos": True, "sampling_seed": number}
            body = {"input_ids": prompts[number % len(prompts)], "sampling_params": params}
            answer = await client.post("/generate", json=body)
            return answer.status_code == 200 and len(answer.json()["output_ids"]) == 4

        return sum(await asyncio.gather(*(one(number) for number in range(count))))


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(
        base_url=url, timeout=httpx.Timeout(120, pool=None), limits=limits, trust_env=False
    )


def claims(folder: Path) -> list[dict[str, Any]]:
    """The claims about the HTTP path, in the form of `fullarc bench`."""
    found = measure(folder)
    rates = f"{found.over_http:,.0f} and {found.in_process:,.0f} tokens/s"
    between = f"{1000 * found.between_p99_s:.1f} and {1000 * found.between_median_s:.1f} ms"
    return [
        claim(f"HTTP at {SLOTS} streams, of the throughput in process", found.ratio, "x", ">= 0.85",
              found.ratio >= 0.85, rates),
        claim("99th percentile of the times between events, of the median", found.smoothness, "x", "< 3",
              found.smoothness < 3, between, better="lower"),
        claim("queued requests answered", found.answered, "requests", f"{found.queued}",
              found.answered == found.queued),
    ]  # fmt: skip
