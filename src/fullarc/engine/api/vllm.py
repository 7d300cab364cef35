"""vLLM's names where RL frameworks call them: pause and resume, weights, prefix cache, tokenizer (`tito`: generation).

prime-rl: POST /pause?mode=keep&clear_cache=false, /update_weights {weight_dir}, /resume. AReaL: /areal_* and
/v1/completions with token prompts. Every update makes cached prefixes of other weights unreachable, so nobody needs a
`cache_salt` for each version; it keeps prefixes apart all the same.
"""

import asyncio
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from fullarc.chat import render
from fullarc.chat.openai import BadRequest, read_messages, read_tools
from fullarc.config.errors import FullarcError
from fullarc.engine.api import control
from fullarc.engine.api.fields import Ids, known
from fullarc.engine.api.guard import Endpoint, answer, aside, error_answer, read_body
from fullarc.engine.api.service import Service, disconnected
from fullarc.engine.api.updates import Updates
from fullarc.engine.scheduler import Scheduler

DRAIN_POLL_S = 0.01
MODES = ("abort", "wait", "keep")


class ArealBody(BaseModel):
    """POST /areal_update_weights."""

    model_config = ConfigDict(extra="ignore")
    model_path: str = Field(max_length=4096)


class AbortsBody(BaseModel):
    """POST /abort_requests."""

    model_config = ConfigDict(extra="ignore")
    request_ids: list[str] | None = Field(None, max_length=10_000)


class TokenizeBody(BaseModel):
    """POST /tokenize: a text, or a conversation."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | list[str] | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="ignore")
    tokens: Ids | list[Ids]
    skip_special_tokens: bool = False


class Vllm:
    """The handlers."""

    def __init__(self, service: Service, updates: Updates) -> None:
        self.service, self.updates = service, updates

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        get = ("GET",)
        return [
            Endpoint(
                "/pause", self.pause, query={"mode": {"enum": [*MODES]}, "clear_cache": {"type": "boolean"}}
            ),
            Endpoint("/resume", self.resume),
            Endpoint("/is_paused", self.is_paused, get),
            Endpoint("/abort_requests", self.abort, body=AbortsBody),
            Endpoint("/weight_info", self.weight_info, get),
            Endpoint("/get_world_size", self.world_size, get),
            Endpoint("/areal_update_weights", self.areal_update, body=ArealBody),
            Endpoint("/areal_pause_generation", self.areal_pause),
            Endpoint("/areal_continue_generation", self.resume),
            Endpoint("/reset_prefix_cache", self.reset),
            Endpoint("/load", self.load, get),
            Endpoint("/version", self.version, get),
            Endpoint("/liveness", self.liveness, get),
            Endpoint("/tokenize", self.tokenize, body=TokenizeBody),
            Endpoint("/v1/tokenize", self.tokenize, body=TokenizeBody),
            Endpoint("/detokenize", self.detokenize, body=DetokenizeBody),
            Endpoint("/v1/detokenize", self.detokenize, body=DetokenizeBody),
        ]

    # --- pause, weights, cache --------------------------------------------------------------------------------

    async def pause(self, http: HttpRequest) -> Response:
        """Stop generating: mode abort (default), wait (running requests finish first) or keep (they stay)."""
        mode = http.query_params.get("mode", "abort")
        clear = http.query_params.get("clear_cache", "true").lower()
        if mode not in MODES or clear not in ("true", "false", "1", "0"):
            raise BadRequest("mode must be abort, wait or keep, and clear_cache true or false.", "mode")
        if mode == "wait":
            await self._drain(http)
        else:
            await self.service.on_engine(
                lambda s: control.pause(s, "abort" if mode == "abort" else "in_place")
            )
        if clear in ("true", "1"):
            await self.service.on_engine(lambda s: s.prefix.clear())
        return answer({"status": "paused"})

    async def _drain(self, http: HttpRequest) -> None:
        """Let running requests finish while waiting ones wait, then pause; a paused engine goes on until then.

        Raises FullarcError if another call pauses or resumes the engine meanwhile; that one counts. It is as before
        when the client hangs up.
        """

        def begin(scheduler: Scheduler) -> bool:
            before, scheduler.paused, scheduler.admitting = scheduler.paused, False, False
            return before

        def end(scheduler: Scheduler) -> bool:
            ours = not scheduler.admitting
            if ours:
                scheduler.paused, scheduler.admitting = before or not scheduler.running, True
            return ours

        gone = asyncio.ensure_future(disconnected(http.receive))
        scheduler, before = self.service.scheduler, await self.service.on_engine(begin)
        try:
            while scheduler.running and not scheduler.admitting and not gone.done():
                await asyncio.sleep(DRAIN_POLL_S)
        finally:
            gone.cancel()
            ours = await self.service.on_engine(end)
        if not ours:
            raise FullarcError("Another call paused or resumed the engine before all requests had ended.")

    async def resume(self, _http: HttpRequest) -> Response:
        """Go on generating."""
        await self.service.on_engine(control.resume)
        return answer({"status": "resumed"})

    async def is_paused(self, _http: HttpRequest) -> Response:
        """Whether generation is paused."""
        return answer({"is_paused": self.service.scheduler.paused})

    async def abort(self, http: HttpRequest) -> Response:
        """End requests by their ids, or all where there is no list of them, with what they have."""
        named = (await read_body(http, AbortsBody)).request_ids
        names: Sequence[str | None] = [None] if named is None else named
        count = await self.service.on_engine(lambda s: sum(s.abort(name) for name in names))
        return answer({"status": "aborted", "aborted": count})

    async def weight_info(self, _http: HttpRequest) -> Response:
        """The version of the present weights."""
        return answer(
            {"weight_version": self.service.scheduler.version, "model_path": self.service.model_path}
        )

    async def world_size(self, _http: HttpRequest) -> Response:
        """One process."""
        return answer({"world_size": 1})

    async def areal_update(self, http: HttpRequest) -> Response:
        """Load a checkpoint folder; running requests end with what they have, as AReaL's server does."""
        body = await read_body(http, ArealBody)
        try:
            return answer(await self.updates.load_folder(body.model_path, None, "drop"))
        except FullarcError as error:
            return answer({"success": False, "message": str(error)}, 400)

    async def areal_pause(self, _http: HttpRequest) -> Response:
        """Stop generating; running requests end with what they have."""
        await self.service.on_engine(lambda s: control.pause(s, "abort"))
        return answer({"success": True, "message": "Generation paused."})

    async def reset(self, http: HttpRequest) -> Response:
        """Forget all cached prefixes; running requests go on."""
        await self.service.on_engine(lambda s: s.prefix.clear())
        return PlainTextResponse("")

    # --- information and text ---------------------------------------------------------------------------------

    async def load(self, _http: HttpRequest) -> Response:
        """How many requests are being served."""
        s = self.service.scheduler
        return answer({"server_load": len(s.running) + len(s.waiting)})

    async def version(self, _http: HttpRequest) -> Response:
        """Of this software."""
        return answer({"version": importlib.metadata.version("fullarc")})

    async def liveness(self, http: HttpRequest) -> Response:
        """Whether the engine's thread lives."""
        if self.service.worker.healthy:
            return answer({"status": "ok"})
        return error_answer(http.url.path, 503, "The engine failed.")

    async def tokenize(self, http: HttpRequest) -> Response:
        """Text or messages to ids."""
        body = await read_body(http, TokenizeBody)
        return answer(await aside(http, lambda: self._tokens(body)))

    def _tokens(self, body: TokenizeBody) -> dict[str, Any]:
        tok = self.service.text
        if body.messages is not None:
            thinking = (body.chat_template_kwargs or {}).get("enable_thinking", True) is not False
            lists = [
                render(tok, read_messages(body.messages), read_tools(body.tools),
                       add_generation_prompt=body.add_generation_prompt, thinking=thinking).ids
            ]  # fmt: skip
        elif body.prompt is not None:
            lists = [
                tok.encode_raw(t) for t in ([body.prompt] if isinstance(body.prompt, str) else body.prompt)
            ]
        else:
            raise BadRequest("Give prompt or messages.", "prompt")
        tokens: Any = lists if isinstance(body.prompt, list) else lists[0]
        count: Any = [len(ids) for ids in lists] if isinstance(body.prompt, list) else len(lists[0])
        strings = [tok.decode([token]) for token in lists[0]] if body.return_token_strs and lists else None
        return {"count": count, "max_model_len": self.service.scheduler.max_len, "tokens": tokens,
                "token_strs": strings}  # fmt: skip

    async def detokenize(self, http: HttpRequest) -> Response:
        """Ids to text."""
        body, tok = await read_body(http, DetokenizeBody), self.service.text
        several = bool(body.tokens) and isinstance(body.tokens[0], list)
        lists: Any = body.tokens if several else [body.tokens]
        for ids in lists:
            known(self.service, "tokens", ids)
        texts = [tok.decode(ids, skip_special=body.skip_special_tokens) for ids in lists]
        told: Any = texts if several else texts[0]
        return answer({"prompt": told, "text": told})
