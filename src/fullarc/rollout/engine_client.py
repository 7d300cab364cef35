"""The engine over HTTP, in SGLang's dialect: token ids in, token ids with log-probs and weight versions out.

Pooled connections per client. Only a failed connection is retried (a bounded number of times, with back-off):
generation with a seed is idempotent, so a request that died with its connection can be sent again. Everything that
goes wrong ends in `EngineError` with a `kind`; no httpx exception leaves this module.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import httpx

from fullarc.chat.grammar import Grammar
from fullarc.config.errors import FullarcError

BACKOFF_S = (0.05, 0.2, 0.5, 1.0, 2.0)
MAX_RESUMES, MAX_RESTARTS = 64, 4
POOLS = 32
ROUTING_HEADER, SESSION_HEADER = "X-SMG-Routing-Key", "X-Session-ID"


class EngineError(FullarcError):
    """The engine could not do what was asked.

    `kind`: "unreachable" (no connection), "timeout", "busy" (429: its queue is full), "rejected" (other 4xx: our
    request), "failed" (5xx), "protocol" (an answer that is not SGLang's). `retry_after`: what a busy engine said of it;
    `said`: the sentence of one that refuses.
    """

    def __init__(
        self, kind: str, message: str, hint: str = "", retry_after: str = "", said: str = ""
    ) -> None:
        super().__init__(message, hint)
        self.kind, self.retry_after, self.said = kind, retry_after, said


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` None leaves the choice of randomness to the engine; temperature 0 is greedy.

    `top_p`, `top_k` and `min_p` cut the distribution (1, 0 and 0: not); log-probs are told of the whole one. `stop`:
    strings that end the reply. `form`: what it must follow; with `calls` it may call a tool instead (our
    engine's, not SGLang's).
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    form: Grammar | None = None
    calls: bool = False
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether its replies are sampled in one go: no engine takes up a form or a stop string in its middle."""
        return self.form is not None or bool(self.stop)

    def wire(self) -> dict[str, Any]:
        """SGLang's `sampling_params`."""
        params: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop_token_ids": list(self.stop_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        if self.seed is not None:
            params["sampling_seed"] = self.seed
        if self.stop:
            params["stop"] = list(self.stop)
        if self.top_k > 0:
            params["top_k"] = self.top_k
        if self.min_p:
            params["min_p"] = self.min_p
        if self.form:
            params[self.form.kind] = self.form.text
            if self.calls and self.form.kind != "structural_tag":
                params["tool_call_instead"] = True
        return params


@dataclass(frozen=True)
class Completion:
    """What the engine sampled; the three lists are aligned. finish: "stop" | "length" | "abort".

    `matched`: the stop string that ended it, which its tokens contain.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    matched: str = ""


class _Pools(httpx.AsyncBaseTransport):
    """Several pools of connections in turn: for every request httpcore looks at all pairs of a pool's connections."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        context = httpx.create_ssl_context(trust_env=False)
        self._pools = [httpx.AsyncHTTPTransport(verify=context, limits=limits) for _ in range(POOLS)]
        self._turns = itertools.cycle(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


class EngineClient:
    """Async client of one engine (or of a router in front of several).

    Args:
        url: e.g. "http://127.0.0.1:30000".
        timeout_s: bound on one request; a generation that takes longer is an EngineError("timeout").
        retries: how often a broken connection is tried again.
        transport: an httpx transport, for tests and in-process engines.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 600.0,
        retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.engines: list[EngineClient] = [self]
        self.name = "0"
        self.retries = retries
        timeout = httpx.Timeout(timeout_s, connect=5.0, pool=None)
        self._http = httpx.AsyncClient(
            base_url=self.url, timeout=timeout, transport=transport or _Pools(), trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the pooled connections."""
        await self._http.aclose()

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, session: str | None = None, n: int = 1
    ) -> list[Completion]:
        """Sample `n` completions of one prompt. With a seed and n > 1 use `generate_batch`, one seed each."""
        params = sampling.wire() | ({"n": n} if n > 1 else {})
        body = {"input_ids": list(ids), "sampling_params": params, "return_logprob": True}
        reply = await self._post("/generate", body, session)
        return [_completion(item) for item in (reply if isinstance(reply, list) else [reply])]

    async def generate_batch(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], session: str | None = None
    ) -> list[Completion]:
        """One completion per prompt in one HTTP request; each prompt has its own sampling (and seed)."""
        if len(prompts) != len(samplings):
            raise ValueError(f"{len(prompts)} prompts but {len(samplings)} samplings")
        if not prompts:
            return []
        body = {
            "input_ids": [list(p) for p in prompts],
            "sampling_params": [s.wire() for s in samplings],
            "return_logprob": True,
        }
        reply = await self._post("/generate", body, session)
        if not isinstance(reply, list) or len(reply) != len(prompts):
            raise EngineError("protocol", f"{self.url}/generate did not answer with one result per prompt.")
        return [_completion(item) for item in reply]

    async def stream(
        self, ids: Sequence[int], sampling: Sampling, session: str | None = None
    ) -> AsyncIterator[Completion]:
        """Cumulative completions of one prompt as they grow; the last one is final (finish is not "")."""
        body = {
            "input_ids": list(ids),
            "sampling_params": sampling.wire(),
            "return_logprob": True,
            "stream": True,
        }
        headers = {ROUTING_HEADER: session} if session else {}
        try:
            async with self._http.stream("POST", "/generate", json=body, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _status_error(self.url, response)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    yield _completion(json.loads(await response.aread()))
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        yield _completion(json.loads(data))
        except httpx.HTTPError as error:
            raise _transport_error(self.url, error) from error
        except EngineError:
            raise
        except ValueError as error:
            raise EngineError("protocol", f"{self.url}/generate sent something that is not JSON.") from error

    async def finish(
        self, ids: Sequence[int], sampling: Sampling, done: Completion, session: str | None = None
    ) -> Completion:
        """Go on from where an abort (a weight update) left a completion of `ids`, until it stops or is full.

        The tokens of the parts keep their own log-probs and weight versions. What is sampled `whole` begins anew.
        """
        tries = MAX_RESTARTS if sampling.whole else MAX_RESUMES
        for _ in range(tries):
            if done.finish != "abort":
                return done
            if sampling.whole:
                [done] = await self.generate(ids, sampling, session)
                continue
            room = sampling.max_new_tokens - len(done.token_ids)
            if room <= 0:
                return replace(done, finish="length")
            rest = replace(sampling, max_new_tokens=room)
            more = (await self.generate([*ids, *done.token_ids], rest, session))[0]
            done = replace(
                done,
                token_ids=done.token_ids + more.token_ids,
                logprobs=done.logprobs + more.logprobs,
                versions=done.versions + more.versions,
                finish=more.finish,
            )
        raise EngineError("failed", f"The engine aborted one reply {tries} times.")

    async def score(
        self, sequences: Sequence[Sequence[int]], session: str | None = None
    ) -> list[list[float]]:
        """Log-prob of each token given those before it; per sequence len(ids) values, the first is 0.0."""
        if not sequences:
            return []
        body = {
            "input_ids": [list(s) for s in sequences],
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        }
        reply = await self._post("/generate", body, session)
        try:
            rows = [
                [float(entry[0] or 0.0) for entry in item["meta_info"]["input_token_logprobs"]]
                for item in reply
            ]
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError("protocol", f"{self.url}/generate sent no input_token_logprobs.") from error
        if [len(row) for row in rows] != [len(s) for s in sequences]:
            raise EngineError(
                "protocol", f"{self.url}/generate scored a different number of tokens than it was sent."
            )
        return rows

    async def update_weights(self, model_path: str, version: int) -> None:
        """Load the checkpoint folder `model_path` as weight version `version`."""
        body = {"model_path": str(model_path), "weight_version": str(version)}
        reply = await self._post("/update_weights_from_disk", body)
        if isinstance(reply, dict) and reply.get("success") is False:
            raise EngineError(
                "failed", f"The engine refused the weights in {model_path}: {reply.get('message', '')}"
            )

    async def pause(self, mode: str = "in_place") -> None:
        """Stop decoding; running requests stay (in_place) or end with finish "abort" (abort)."""
        await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._post("/continue_generation", {})

    def open(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], content: AsyncIterator[bytes] | None
    ) -> AbstractAsyncContextManager[httpx.Response]:
        """Any request, as it is, and its answer while it comes. Raises httpx.HTTPError."""
        timeout = httpx.Timeout(None, connect=5.0)
        return self._http.stream(method, path, headers=headers, content=content, timeout=timeout)

    @asynccontextmanager
    async def use(self, engines: "Sequence[EngineClient]") -> "AsyncIterator[list[EngineClient]]":
        """Ask `engines` themselves, which are some of this one's: inside none of them is closed."""
        yield list(engines)

    async def health(self) -> bool:
        """True when the engine answers GET /health with 200; never raises EngineError."""
        try:
            return (await self._http.get("/health", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def info(self) -> dict[str, Any]:
        """GET /model_info as a dict (weight_version, and whatever the engine tells)."""
        reply = await self._send("GET", "/model_info", None, None)
        return reply if isinstance(reply, dict) else {}

    async def adapters(self) -> list[dict[str, Any]]:
        """What GET /v1/models tells of adapters."""
        reply = await self._send("GET", "/v1/models", None, None)
        cards = reply.get("data") if isinstance(reply, dict) else None
        return [card for card in cards or () if isinstance(card, dict) and card.get("parent")]

    async def routes_to_others(self) -> bool:
        """True when it is a gateway or a router, which list their engines at GET /list_workers."""
        try:
            await self._send("GET", "/list_workers", None, None)
        except EngineError as error:
            if error.kind != "rejected":
                raise
            return False
        return True

    async def load(self) -> int:
        """How many requests run and wait, by GET /get_load."""
        ranks = await self._send("GET", "/get_load", None, None)
        try:
            return sum(int(rank["num_reqs"]) for rank in ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError("protocol", f"{self.url}/get_load is not SGLang's: {error!r}.") from error

    async def _post(self, path: str, body: dict[str, Any], session: str | None = None) -> Any:
        return await self._send("POST", path, body, session)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, session: str | None) -> Any:
        headers = {ROUTING_HEADER: session} if session else {}
        for attempt in range(self.retries + 1):
            try:
                response = await self._http.request(method, path, json=body, headers=headers)
                break
            except (
                httpx.ConnectError,
                httpx.ConnectTimeout,
                httpx.RemoteProtocolError,
                httpx.ReadError,
            ) as error:
                if attempt == self.retries:
                    raise _transport_error(self.url, error) from error
                await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            except httpx.HTTPError as error:
                raise _transport_error(self.url, error) from error
        if response.status_code != 200:
            raise _status_error(self.url + path, response)
        try:
            return response.json()
        except ValueError as error:
            if method == "POST" and not body:
                return None  # control endpoints may answer with plain text
            raise EngineError("protocol", f"{self.url}{path} sent something that is not JSON.") from error


def _transport_error(url: str, error: httpx.HTTPError) -> EngineError:
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return EngineError("timeout", f"The engine at {url} did not answer in time.")
    return EngineError(
        "unreachable", f"No engine answers at {url} ({type(error).__name__}).", "Is it running?"
    )


def _status_error(url: str, response: httpx.Response) -> EngineError:
    status, text = response.status_code, response.content.decode(errors="replace")[:300]
    kind = "busy" if status == 429 else "rejected" if status < 500 else "failed"
    retry_after = response.headers.get("retry-after", "")
    return EngineError(kind, f"{url} answered {status}: {text}", "", retry_after, _said(response))


def _said(response: httpx.Response) -> str:
    """The sentence of an error object; "" if it is another answer."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _version(value: object) -> int:
    """Weight versions are integers here; SGLang's initial "default" counts as 0."""
    return int(str(value)) if str(value).isdigit() else 0


def _completion(item: Any) -> Completion:
    try:
        meta = item["meta_info"]
        pairs = [(int(entry[1]), float(entry[0])) for entry in meta.get("output_token_logprobs") or []]
        versions = [_version(meta.get("weight_version", 0))] * len(pairs)
        for version, start, end in meta.get("weight_versions") or []:
            versions[start:end] = [_version(version)] * (min(end, len(pairs)) - start)
        reason = meta.get("finish_reason") or {}
        finish, matched = reason.get("type", ""), reason.get("matched")
        if len(item.get("output_ids") or pairs) != len(pairs):
            raise EngineError("protocol", "The engine sent a different number of tokens and log-probs.")
        return Completion(
            [token for token, _ in pairs],
            [logprob for _, logprob in pairs],
            versions,
            finish,
            int(meta.get("prompt_tokens") or 0),
            int(meta.get("cached_tokens") or 0),
            matched if isinstance(matched, str) else "",
        )
    except EngineError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise EngineError("protocol", f"The engine's answer is not SGLang's: {error!r}.") from error
