"""The gateway: agents speak OpenAI's or Anthropic's chat to it, it speaks token ids to the engine (GLM-5 4.1, TITO).

A request with the header `X-Session-ID` continues that session's token tree (`sessions`): the engine is served the
recorded ids plus the new messages' ids, never a re-rendered history, and what it samples is recorded with log-probs
and weight versions for training. Without the header the request stands alone and nothing is kept.

    POST /v1/chat/completions   POST /v1/messages   POST /v1/messages/count_tokens   GET /v1/models   GET /health
    GET /sessions/{id}/trajectory   DELETE /sessions/{id}

With `passes` the engine's other routes are served too (`passing`) and /workers lists the engines (`workers`), and with
"all" also chats that stand alone are the engine's: our own engine does more of both dialects than is recorded here,
such as forced tools. Without an API key only loopback clients are answered, and no pages of other sites. A bad request
is a 4xx with the error object of its dialect, an engine whose queue is full a 429, streamed or not; 5xx means that the
engine failed.
"""

import hmac
import ipaddress
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fullarc.chat import Message, Tokenizer, render, render_delta
from fullarc.chat.errors import OPEN_PATHS, error_object
from fullarc.chat.grammar import Grammar
from fullarc.chat.openai import BadRequest, dump
from fullarc.chat.render import Tools
from fullarc.chat.sites import OwnPages
from fullarc.config.seeds import derive
from fullarc.rollout import messages, wire
from fullarc.rollout.bodies import json_body
from fullarc.rollout.engine_client import SESSION_HEADER, Completion, EngineClient, EngineError, Sampling
from fullarc.rollout.passing import Passing
from fullarc.rollout.sessions import Plan, Session
from fullarc.rollout.streaming import Stream
from fullarc.rollout.trajectory import EpisodeKey, Outcome, Trajectory
from fullarc.rollout.wire import ChatRequest, Reply
from fullarc.rollout.workers import Workers

VERSION_HEADER = "X-Weight-Version"
MAX_BODY = 16 << 20
_STATUS = {"unreachable": 503, "busy": 429, "timeout": 504, "rejected": 400, "failed": 502, "protocol": 502}


@dataclass(frozen=True)
class Dialect:
    """How a chat route reads its requests, and writes replies that are finished or still being sampled."""

    read: Callable[[Any], ChatRequest]
    whole: Callable[[Tokenizer, ChatRequest, Plan, list[Reply], str, str], dict[str, Any]]
    stream: type[Stream] | type[messages.MessageStream]
    prefix: str


OPENAI = Dialect(wire.read_request, wire.completion_json, Stream, "chatcmpl-")
ANTHROPIC = Dialect(messages.read_request, messages.reply_json, messages.MessageStream, "msg_")


class ChatRenderer:
    """`sessions.Renderer` over fullarc.chat."""

    def __init__(self, tok: Tokenizer) -> None:
        self._tok = tok

    def full(self, messages: Sequence[Message], tools: Tools | None, thinking: bool) -> list[int]:
        """A whole conversation and the generation prompt; all reasoning preserved."""
        return render(self._tok, messages, tools, add_generation_prompt=True, thinking=thinking).ids

    def delta(self, messages: Sequence[Message], last_id: int, thinking: bool) -> list[int]:
        """What comes after a sampled turn, with the role marker if the turn did not sample it."""
        return render_delta(self._tok, messages, thinking, last_id)


class Gateway:
    """Sessions and the chat route. `app` is the ASGI application (serve it, or call it in-process).

    Args:
        engine: where tokens come from.
        tok: the tokenizer of the model behind `engine`.
        model: the name shown to clients.
        max_len: tokens per sequence, prompt included; a longer prompt is refused, a longer reply is cut off.
        default_max_tokens: for requests that give no limit.
        api_key: required as a bearer token if set; otherwise only loopback clients are answered.
        max_sessions: open sessions kept at most; beyond it new ones get 429 until some are deleted.
        passes: what is handed on to the engine: nothing, its other "routes", or "all" that is not recorded.
    """

    def __init__(
        self,
        engine: EngineClient,
        tok: Tokenizer,
        model: str = "fullarc",
        max_len: int = 2048,
        default_max_tokens: int = 256,
        api_key: str | None = None,
        max_sessions: int = 4096,
        passes: Literal["", "routes", "all"] = "",
    ) -> None:
        self.engine = engine
        self.tok = tok
        self.model = model
        self.max_len = max_len
        self.default_max_tokens = default_max_tokens
        self.max_sessions = max_sessions
        self.sessions: dict[str, Session] = {}
        self._renderer = ChatRenderer(tok)
        self._numbers = itertools.count()
        passing = Passing(engine, keyed=api_key is not None) if passes else None
        self._alone = passing if passes == "all" else None
        routes = [
            Route("/v1/chat/completions", self._openai, methods=["POST"]),
            Route("/v1/messages", self._anthropic, methods=["POST"]),
            Route("/v1/messages/count_tokens", self._count, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/sessions/{session}/trajectory", self._trajectory),
            Route("/sessions/{session}", self._delete, methods=["DELETE"]),
        ]
        if passing:
            routes += [*Workers(engine, model, api_key is not None).routes(), Route("/{path:path}", passing)]
        handlers: dict[Any, Any] = {
            HTTPException: _http_error,
            BadRequest: _bad_request,
            EngineError: _engine_error,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        self.app: ASGIApp = _Guard(OwnPages(app) if api_key is None else app, api_key)

    async def _openai(self, http: Request) -> ASGIApp:
        return await self._chat(http, OPENAI)

    async def _anthropic(self, http: Request) -> ASGIApp:
        return await self._chat(http, ANTHROPIC)

    async def _chat(self, http: Request, dialect: Dialect) -> ASGIApp:
        session_id = _session_id(http)
        if session_id is None and self._alone:
            return self._alone
        request = dialect.read(await json_body(http, MAX_BODY))
        await self._refuse_adapters(request.model)
        session = self._session(session_id)
        plan = session.plan(request.incoming, request.tools, request.thinking)
        if len(plan.prompt_ids) >= self.max_len:
            raise BadRequest(
                f"The prompt has {len(plan.prompt_ids)} tokens; the context holds {self.max_len} with the reply.",
                "messages",
                "context_length_exceeded",
            )
        if session_id is not None:
            self.sessions[session_id] = session
        node = session.open(plan, request.tools)
        number = next(self._numbers)
        name = f"{dialect.prefix}{number}"
        record = partial(self._record, request, session, session_id, node, number)
        if request.stream:
            stream = dialect.stream(self.tok, request, plan, name, self.model)
            sampling = self._sampling(request, plan, 0)
            grown = self.engine.stream(plan.prompt_ids, sampling, session_id)
            with _blaming(request.form):  # a refusal is a status and no event
                first = await anext(grown, Completion([], [], [], "abort"))
            chunks = self._stream(stream, plan, sampling, session_id, _all(first, grown), record)
            return StreamingResponse(chunks, headers=_versions(first), media_type="text/event-stream")
        with _blaming(request.form):
            completions = await self._sample(request, plan, session_id)
        replies = [record(done) for done in completions]
        reply = _reply(dialect.whole(self.tok, request, plan, replies, name, self.model))
        reply.headers.update(_versions(replies[0].completion))
        return reply

    async def _refuse_adapters(self, model: str) -> None:
        """What is recorded is the base's; any other name is the agent's own, and means nothing."""
        if not self._alone or not model or model == self.model:
            return
        if model.rpartition(":")[2] in [card.get("id") for card in await self.engine.adapters()]:
            raise BadRequest("Adapters are not served in sessions: leave out 'model'.", "model")

    async def _count(self, http: Request) -> ASGIApp:
        session_id = _session_id(http)
        if session_id is None and self._alone:
            return self._alone
        body = await json_body(http, MAX_BODY)
        request = messages.read_request({"max_tokens": 1} | body if isinstance(body, dict) else body)
        plan = self._session(session_id).plan(request.incoming, request.tools, request.thinking)
        return _reply({"input_tokens": len(plan.prompt_ids)})

    def _session(self, session_id: str | None) -> Session:
        if session_id is None:
            return Session(self._renderer)
        if session_id not in self.sessions and len(self.sessions) >= self.max_sessions:
            raise BadRequest(
                f"{self.max_sessions} sessions are open. DELETE /sessions/{{id}} when one is done.",
                code="too_many_sessions",
                status=429,
            )
        return self.sessions.get(session_id) or Session(self._renderer)

    def _sampling(self, request: ChatRequest, plan: Plan, choice: int) -> Sampling:
        room = min(request.max_tokens or self.default_max_tokens, self.max_len - len(plan.prompt_ids))
        seed = request.seed if choice == 0 or request.seed is None else derive(request.seed, "choice", choice)
        calls = request.tools is not None
        return Sampling(
            room,
            request.temperature,
            request.top_p,
            self.tok.stop_ids,
            seed,
            request.form,
            calls,
            request.stop,
            request.top_k,
            request.min_p,
        )

    async def _sample(self, request: ChatRequest, plan: Plan, session_id: str | None) -> list[Completion]:
        samplings = [self._sampling(request, plan, choice) for choice in range(request.n)]
        if request.n == 1:
            completions = await self.engine.generate(plan.prompt_ids, samplings[0], session_id)
        else:
            completions = await self.engine.generate_batch(
                [plan.prompt_ids] * request.n, samplings, session_id
            )
        pairs = zip(samplings, completions, strict=True)
        return [await self.engine.finish(plan.prompt_ids, s, c, session_id) for s, c in pairs]

    def _record(
        self,
        request: ChatRequest,
        session: Session,
        session_id: str | None,
        node: int,
        number: int,
        done: Completion,
    ) -> Reply:
        place = f"{session.next_id()}" if session_id is not None else f"{number}_{session.next_id()}"
        reply = wire.read_completion(self.tok, done, request.thinking, request.tools, f"call_{place}")
        guided = request.form is not None
        session.record(node, done, reply.message, reply.finish, reply.format_errors, guided)
        return reply

    async def _stream(
        self,
        stream: Stream | messages.MessageStream,
        plan: Plan,
        sampling: Sampling,
        session_id: str | None,
        grown: AsyncIterator[Completion],
        record: Callable[[Completion], Reply],
    ) -> AsyncIterator[bytes]:
        yield stream.start()
        try:
            async for done in grown:
                if not done.finish:
                    for chunk in stream.grow(done):
                        yield chunk
            if sampling.whole and done.finish == "abort" and done.token_ids:
                raise EngineError("failed", "The engine aborted a reply that it cannot take up; ask again.")
            done = await self.engine.finish(plan.prompt_ids, sampling, done, session_id)
        except EngineError as error:
            yield stream.error(str(error))
            return
        for chunk in stream.end(record(done)):
            yield chunk

    async def _models(self, http: Request) -> Response:
        model = {
            "id": self.model,
            "object": "model",
            "created": 0,
            "owned_by": "fullarc",
            "max_model_len": self.max_len,
        }
        adapters = await self.engine.adapters() if self._alone else []
        own = [card | {"parent": self.model, "max_model_len": self.max_len} for card in adapters]
        return _reply({"object": "list", "data": [model, *own]})

    async def _health(self, http: Request) -> Response:
        alive = await self.engine.health()
        return _reply({"status": "ok" if alive else "engine unreachable"}, 200 if alive else 503)

    async def _trajectory(self, http: Request) -> Response:
        session_id = http.path_params["session"]
        trajectory = self.trajectory(session_id)
        body = await run_in_threadpool(lambda: dump(trajectory.to_atif()))
        return Response(body, media_type="application/json")

    async def _delete(self, http: Request) -> Response:
        if self.sessions.pop(http.path_params["session"], None) is None:
            raise _no_session(http.path_params["session"])
        return _reply({"deleted": True})

    def trajectory(self, session_id: str) -> Trajectory:
        """The record of a session so far, not yet graded (outcome "invalid", reason "ungraded")."""
        session = self.sessions.get(session_id)
        if session is None:
            raise _no_session(session_id)
        return Trajectory(
            EpisodeKey("session", 0, 0, 0),
            task="",
            instance_seed=0,
            outcome=Outcome("invalid", reason="ungraded"),
            turns=session.turns(),
            tools=list(session.tools) if session.tools else None,
            session_id=session_id,
            model=self.model,
            meta={"forks": dict(session.forks)},
        )


@contextmanager
def _blaming(form: Grammar | None) -> Iterator[None]:
    """What the engine says against a form is the client's own mistake."""
    try:
        yield
    except EngineError as error:
        if form is None or error.kind != "rejected" or not error.said.startswith(form.kind):
            raise
        raise BadRequest(error.said.replace(form.kind, form.name, 1), form.name) from None


async def _all(first: Completion, rest: AsyncIterator[Completion]) -> AsyncIterator[Completion]:
    yield first
    async for completion in rest:
        yield completion


class _Guard:
    """Lets in who has the key, or, if there is none, who is on this machine."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(scope)):
            response = _reply(error_object(scope["path"], 401, problem, code="unauthorized"), 401)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _problem(self, scope: Scope) -> str:
        if self.api_key is not None:
            headers = dict(scope["headers"])
            given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            good = scope["path"] in OPEN_PATHS or hmac.compare_digest(given, self.api_key.encode())
            return "" if good else "A valid API key is required, as a bearer token or as x-api-key."
        client = scope.get("client")
        local = client is None or client[0] == "localhost" or _is_loopback(client[0])
        return "" if local else "Only this machine is answered; start the server with an API key to open it."


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _session_id(http: Request) -> str | None:
    value = http.headers.get(SESSION_HEADER)
    if value is not None and not (0 < len(value) <= 256 and value.isprintable() and "/" not in value):
        raise BadRequest(
            f"{SESSION_HEADER} must be 1 to 256 printable characters without '/'.", SESSION_HEADER
        )
    return value


def _versions(done: Completion) -> dict[str, str]:
    """What the engine says too: the weights of the last token."""
    return {VERSION_HEADER: str(done.versions[-1])} if done.versions else {}


def _no_session(session_id: str) -> BadRequest:
    return BadRequest(f"There is no session {session_id!r}.", code="session_not_found", status=404)


def _reply(body: dict[str, Any], status: int = 200) -> Response:
    return Response(dump(body), status, media_type="application/json")


async def _http_error(http: Request, error: HTTPException) -> Response:
    return _reply(error_object(http.url.path, error.status_code, error.detail), error.status_code)


async def _bad_request(http: Request, error: BadRequest) -> Response:
    told = error.body["error"]
    body = error_object(http.url.path, error.status, str(error), told["param"], told["code"], told["type"])
    return _reply(body, error.status)


async def _engine_error(http: Request, error: EngineError) -> Response:
    kind = "rate_limit_error" if error.kind == "busy" else "engine_error"
    body = error_object(http.url.path, 500, str(error), code=f"engine_{error.kind}", kind=kind)
    reply = _reply(body, _STATUS[error.kind])
    if error.retry_after:
        reply.headers["Retry-After"] = error.retry_after
    return reply
