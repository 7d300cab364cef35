"""SGLang's sessions: /open_session, /close_session, and a /generate that goes on from an earlier request's tokens.

A request with `session_params` sends only what is new: its prompt is that of the session's request `rid`, what that one
sampled, and its own tokens behind. `offset` cuts off the old tokens there first (as Python slices: -1 leaves out the
last one; 0 is none), `drop_previous_output` leaves out what was sampled, `replace` ends `rid` if it still runs and
forgets what came behind it; without a `rid`, everything. A `streaming` session goes on from its last request that was
not aborted, one at a time, and keeps no other. Only tokens are kept: that their latents are not computed again is the
prefix cache's business.

Invariants: at most MAX_SESSIONS sessions and MAX_TURNS requests are kept, none of them when it is closed or idle for
its `timeout`; no two of a session have one name; a request that is refused makes a session forget nothing, and what
it would replace runs on.
"""

import time
import uuid
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.openai import BadRequest
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.request import Request, RequestError
from fullarc.engine.scheduler import Scheduler

MAX_SESSIONS, MAX_TURNS = 1024, 2**14


class OpenBody(BaseModel):
    """POST /open_session."""

    model_config = ConfigDict(extra="ignore")

    session_id: str | None = Field(None, min_length=1, max_length=1000)
    capacity_of_str_len: int = Field(0, description="without effect: sequences are bounded by --max-len")
    streaming: bool | None = None
    timeout: float | None = Field(
        None, gt=0, description="seconds after its last request came that it is closed"
    )


class CloseBody(BaseModel):
    """POST /close_session."""

    model_config = ConfigDict(extra="ignore")
    session_id: str = Field(max_length=1000)


class SessionParams(BaseModel):
    """`session_params` of POST /generate. Without an `id` it is a request like any other."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = Field(None, max_length=1000)
    rid: str | None = Field(None, max_length=1000)
    offset: int | None = Field(None, strict=True)
    replace: bool | None = None
    drop_previous_output: bool | None = None


class Turn:
    """One request of a session, which goes on from `parent` as `params` say. Raises RequestError if it cannot.

    Attributes:
        replaces: what is to be ended for it, if that runs.
    """

    def __init__(self, session: "Session", params: SessionParams) -> None:
        self.session, self.params = session, params
        self.parent = session.origin(params)
        self.replaces = self.parent.request if self.parent else None
        self.name, self.aborted = "", False
        self.request: Request | None = None  # while it runs
        self._ids, self._prompt = array("i"), 0

    @property
    def before(self) -> list[int]:
        """The tokens that come before its own; those so far where the parent runs."""
        if self.parent is None:
            return []
        running, ids, prompt = self.parent.request, self.parent._ids, self.parent._prompt
        if running:
            ids, prompt = array("i", running.ids), len(running.prompt)
        if self.params.drop_previous_output:
            ids = ids[:prompt]
        return ids[: self.params.offset or None].tolist()

    def watch(self, request: Request) -> None:
        """It is this one, which is to be submitted. Raises RequestError where the session has its name already."""
        self.name, self.request, request.on_finish = request.rid, request, self._end
        if self.session.has(self.name, beside=self):
            raise RequestError(
                f"The session has a request {self.name[:200]!r} already.", "Choose another rid, or none."
            )

    def _end(self, request: Request) -> None:
        """Engine thread: keep its tokens, and nothing else of it."""
        self._ids, self._prompt = array("i", request.ids), len(request.prompt)
        self.aborted, self.request = request.finish == "abort", None

    def line(self) -> "Iterator[Turn]":
        """Itself, and what it comes from."""
        turn: Turn | None = self
        while turn:
            yield turn
            turn = turn.parent


class Session:
    """The requests of one session by their names, in order."""

    def __init__(self, streaming: bool, timeout: float | None) -> None:
        self.streaming, self.timeout = streaming, timeout
        self.turns: dict[str, Turn] = {}
        self.coming: list[Turn] = []  # not kept yet
        self.used = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a request comes or runs."""
        return bool(self.coming) or any(turn.request for turn in self.turns.values())

    @property
    def over(self) -> bool:
        """Whether it was idle for too long."""
        return not self.busy and self.timeout is not None and time.monotonic() - self.used > self.timeout

    def origin(self, params: SessionParams) -> Turn | None:
        """Where a request goes on from. Raises RequestError."""
        if self.streaming:
            return self._last(params)
        if params.rid is None:
            return None
        origin = self.turns.get(params.rid)
        if origin is None:
            raise RequestError(f"The session has no request {params.rid[:200]!r}.", "Was it replaced?")
        if origin.request and not params.replace:
            raise RequestError(f"Request {params.rid[:200]!r} has not finished.", "Wait, or say replace.")
        return origin

    def _last(self, params: SessionParams) -> Turn | None:
        if params.replace or params.offset or params.drop_previous_output:
            raise RequestError("A streaming session only goes on: no replace, offset, drop_previous_output.")
        if self.busy:
            raise RequestError("A streaming session has one request at a time.", "Wait for its end.")
        return next((turn for turn in reversed(self.turns.values()) if not turn.aborted), None)

    def has(self, name: str, beside: Turn) -> bool:
        """Whether another request has this name, of those that stay and those that come."""
        coming = (other.name for other in self.coming if other is not beside)
        return name in self._staying(beside) or name in coming

    def _staying(self, turn: Turn) -> dict[str, Turn]:
        """What is kept beside a request."""
        origin = turn.parent
        if self.streaming:
            return {name: other for name, other in self.turns.items() if other is origin}
        if turn.params.replace:
            return {n: t for n, t in self.turns.items() if origin and (t is origin or origin not in t.line())}
        return self.turns

    def keep(self, turn: Turn) -> list[Request]:
        """A request was submitted. Returns those that it replaces and that still run."""
        kept = self._staying(turn)
        if self.streaming and turn.parent:
            turn.parent.parent = None
        gone = [other.request for name, other in self.turns.items() if name not in kept]
        self.turns = kept | {turn.name: turn}
        return [request for request in gone if request]


class Sessions:
    """The handlers, and the sessions that are open. Used by the event loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.open_ones: dict[str, Session] = {}

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/open_session", self.open, body=OpenBody),
            Endpoint("/close_session", self.close, body=CloseBody),
        ]

    async def open(self, http: HttpRequest) -> Response:
        """Open a session; the answer is its name."""
        body = await read_body(http, OpenBody)
        self._forget()
        name = body.session_id or uuid.uuid4().hex
        if name in self.open_ones:
            raise RequestError(f"Session {name[:200]!r} is open already.", "Close it, or name another one.")
        if len(self.open_ones) >= MAX_SESSIONS:
            raise BadRequest(f"{MAX_SESSIONS} sessions are open. Close some, or give timeouts.", status=429)
        self.open_ones[name] = Session(bool(body.streaming), body.timeout)
        return answer(name)

    async def close(self, http: HttpRequest) -> Response:
        """Forget a session; its requests that run go on."""
        body = await read_body(http, CloseBody)
        self._find(body.session_id)
        del self.open_ones[body.session_id]
        return Response()

    @asynccontextmanager
    async def turn(self, params: SessionParams | None) -> AsyncIterator[Turn | None]:
        """What a request with `params` goes on from; inside it is submitted, or refused and forgotten. What it
        `replaces` is to be ended with that.

        Raises RequestError for what the session has not.
        """
        if params is None or params.id is None:
            yield None
            return
        session = self._find(params.id)
        turn = Turn(session, params)
        if sum(len(other.turns) for other in self.open_ones.values()) >= MAX_TURNS:
            raise BadRequest(f"The sessions have {MAX_TURNS} requests. Close some.", status=429)
        session.coming.append(turn)
        try:
            yield turn
            await self._end(session.keep(turn))
        finally:
            session.coming.remove(turn)
            session.used = time.monotonic()

    async def _end(self, requests: list[Request]) -> None:
        """End what runs."""

        def act(scheduler: Scheduler) -> None:
            for request in requests:
                scheduler.cancel(request)

        if requests:
            await self.service.on_engine(act)

    def _find(self, name: str) -> Session:
        self._forget()
        if name not in self.open_ones:
            raise RequestError(f"There is no session {name[:200]!r}.", "POST /open_session first.")
        return self.open_ones[name]

    def _forget(self) -> None:
        """Sessions that were idle for too long."""
        self.open_ones = {name: session for name, session in self.open_ones.items() if not session.over}
