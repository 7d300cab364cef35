"""Anthropic's Messages at the gateway: read a request, write a reply, whole or as it is sampled. Pure, like `wire`.

A request that asks for something the gateway does not do is refused with a 400 that names the parameter.
"""

from collections.abc import Iterator
from typing import Any

from fullarc.chat import Tokenizer, anthropic
from fullarc.chat.grammar import read_format
from fullarc.chat.openai import BadRequest, dump, flag, number
from fullarc.rollout.engine_client import Completion
from fullarc.rollout.sessions import Incoming, Plan
from fullarc.rollout.wire import SEED_MASK, ChatRequest, Reply, certain_text, read_stop, refuse_steering


def read_request(body: Any) -> ChatRequest:
    """Check a decoded JSON body. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    refuse_steering(body)
    use = anthropic.read_tool_use(body.get("tools"), body.get("tool_choice"))
    if use.forced is not None or not use.several:
        raise BadRequest(
            "In a session 'tool_choice' may be auto or none.", "tool_choice", "unsupported_parameter"
        )
    if not isinstance(body.get("model", ""), str):
        raise BadRequest("'model' must be a string.", "model")
    if not isinstance(body.get("system"), str | list | None):
        raise BadRequest("'system' must be a string or a list of blocks.", "system")
    if body.get("max_tokens") is None:
        raise BadRequest("'max_tokens' is missing.", "max_tokens")
    seed = number(body, "seed", None, -(2**63), 2**64, whole=True)
    return ChatRequest(
        incoming=[
            # most clients leave thinking blocks out: their absence means "as you recorded it"
            Incoming(m, m.content if m.role == "assistant" and not m.reasoning else None)
            for m in anthropic.read_conversation(body.get("system"), body.get("messages"))
        ],
        tools=use.tools,
        thinking=anthropic.read_thinking(body.get("thinking")),
        stream=flag(body, "stream", False),
        include_usage=True,
        max_tokens=number(body, "max_tokens", None, 1, 2**31, whole=True),
        temperature=number(body, "temperature", 1.0, 0, 1),
        top_p=number(body, "top_p", 1.0, 0, 1) or 1e-6,
        seed=None if seed is None else seed & SEED_MASK,
        n=1,
        logprobs=False,
        return_token_ids=False,
        form=read_format(anthropic.output_format(body.get("output_config")), "output_config.format"),
        stop=read_stop(body.get("stop_sequences"), "stop_sequences"),
        top_k=number(body, "top_k", 0, -1, 2**31, whole=True),
        min_p=number(body, "min_p", 0.0, 0, 1),
        model=body.get("model", ""),
    )


def reply_json(
    _tok: Tokenizer, _request: ChatRequest, plan: Plan, replies: list[Reply], name: str, model: str
) -> dict[str, Any]:
    """The finished message."""
    [reply] = replies
    head = anthropic.message_head(name, model, _usage(plan, reply.completion))
    return head | {"content": anthropic.content_blocks(reply.message)} | _end(reply)


class MessageStream:
    """The events of a reply that is still being sampled; tool calls are sent whole at the end."""

    def __init__(self, tok: Tokenizer, request: ChatRequest, plan: Plan, name: str, model: str) -> None:
        self._tok, self._request, self._plan = tok, request, plan
        self._head = anthropic.message_head(name, model, anthropic.usage_json(len(plan.prompt_ids), 0, 0))
        self._blocks = anthropic.BlockEvents()

    def start(self) -> bytes:
        """The event that opens the message."""
        return _event({"type": "message_start", "message": self._head})

    def grow(self, done: Completion) -> Iterator[bytes]:
        """Events for the text that is certain by now."""
        yield from map(_event, self._blocks.grow(*certain_text(self._tok, self._request, done)))

    def end(self, reply: Reply) -> Iterator[bytes]:
        """The rest of the message and its end."""
        yield from map(_event, self._blocks.end(reply.message))
        yield _event(
            {"type": "message_delta", "delta": _end(reply), "usage": _usage(self._plan, reply.completion)}
        )
        yield _event({"type": "message_stop"})

    def error(self, text: str) -> bytes:
        """The stream breaks off."""
        return _event({"type": "error", "error": {"type": "api_error", "message": text}})


def _end(reply: Reply) -> dict[str, str | None]:
    own = reply.completion.matched or None
    return {
        "stop_reason": "stop_sequence" if own else anthropic.STOP_REASONS[reply.finish],
        "stop_sequence": own,
    }


def _usage(plan: Plan, completion: Completion) -> dict[str, int]:
    return anthropic.usage_json(len(plan.prompt_ids), completion.cached_tokens, len(completion.token_ids))


def _event(data: dict[str, Any]) -> bytes:
    return b"event: " + data["type"].encode() + b"\ndata: " + dump(data) + b"\n\n"
