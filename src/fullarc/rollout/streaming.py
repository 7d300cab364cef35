"""Server-sent chunks of a reply that is still being sampled, as OpenAI streams them.

Reasoning and content are sent as they grow (`delta.reasoning_content`, `delta.content`); tool calls are sent whole at
the end, since half a call is of no use. The concatenation of all deltas is the message of the finished reply.
"""

from collections.abc import Iterator
from typing import Any

from fullarc.chat import Tokenizer
from fullarc.chat.openai import dump, error_body
from fullarc.rollout import wire
from fullarc.rollout.engine_client import Completion
from fullarc.rollout.sessions import Plan
from fullarc.rollout.wire import ChatRequest, Reply


class Stream:
    """What was sent of one reply so far, and the chunks that follow."""

    def __init__(self, tok: Tokenizer, request: ChatRequest, plan: Plan, name: str, model: str) -> None:
        self._tok = tok
        self._request = request
        self._plan = plan
        self._head = {"id": name, "object": "chat.completion.chunk", "created": 0, "model": model}
        self._sent = {"reasoning_content": "", "content": ""}
        self._tokens = 0

    def start(self) -> bytes:
        """The chunk that opens the reply."""
        more = {"prompt_token_ids": self._plan.prompt_ids} if self._request.return_token_ids else {}
        return self._chunk({"role": "assistant", "content": ""}, None, None, more)

    def grow(self, done: Completion) -> Iterator[bytes]:
        """Chunks for the text that is certain by now."""
        reasoning, content = wire.certain_text(self._tok, self._request, done)
        delta = self._delta("reasoning_content", reasoning) | self._delta("content", content)
        if delta:
            yield self._chunk(delta, done, None)

    def end(self, reply: Reply) -> Iterator[bytes]:
        """The rest of the reply, its finish reason, the usage if asked for, and the end of the stream."""
        message = reply.message
        delta = self._delta("reasoning_content", message.reasoning) | self._delta("content", message.content)
        if message.tool_calls:
            calls = message.to_openai()["tool_calls"]
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        if delta:
            yield self._chunk(delta, reply.completion, None)
        yield self._chunk({}, reply.completion, reply.finish, choice={"format_errors": reply.format_errors})
        if self._request.include_usage:
            usage = wire.usage_json(len(self._plan.prompt_ids), [reply.completion])
            yield _event(self._head | {"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def error(self, text: str) -> bytes:
        """The stream breaks off: an error object in place of a chunk."""
        return _event(error_body(text, kind="engine_error"))

    def _delta(self, name: str, text: str) -> dict[str, Any]:
        sent = self._sent[name]
        if len(text) <= len(sent):
            return {}
        self._sent[name] = text
        return {name: text[len(sent) :]}

    def _chunk(
        self,
        delta: dict[str, Any],
        done: Completion | None,
        finish: str | None,
        more: dict[str, Any] | None = None,
        choice: dict[str, Any] | None = None,
    ) -> bytes:
        entry: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish, **(choice or {})}
        if done is not None:
            new = slice(self._tokens, len(done.token_ids))
            self._tokens = len(done.token_ids)
            if self._request.return_token_ids:
                entry["token_ids"] = done.token_ids[new]
            if self._request.logprobs:
                part = Completion(done.token_ids[new], done.logprobs[new], done.versions[new], "")
                entry["logprobs"] = wire.logprobs_json(self._tok, part)
        return _event(self._head | {"choices": [entry]} | (more or {}))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + dump(body) + b"\n\n"
