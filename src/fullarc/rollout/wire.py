"""OpenAI's chat completions as data: read a request, write a reply. Pure; the gateway does the rest.

A request that asks for something fullarc does not do is refused with a 400 that names the parameter; nothing is
silently ignored that would change what is sampled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fullarc.chat import Message, Tokenizer
from fullarc.chat.forms import read_form
from fullarc.chat.grammar import Grammar
from fullarc.chat.openai import BadRequest, flag, message_json, number, read_messages, read_tools
from fullarc.chat.render import Tools
from fullarc.chat.turns import before, begins, partial_text, read_turn, stopped
from fullarc.rollout.engine_client import Completion
from fullarc.rollout.sessions import Incoming, Plan

SEED_MASK = 2**63 - 1
# Parameters that would change sampling and that we do not have, with the values that ask for nothing: any dialect's …
_STEERS: dict[str, tuple[Any, ...]] = {
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "lora_path": (None, ""),
    "cache_salt": (None, ""),
}
# … and OpenAI's
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_logprobs": (None, 0),
    "functions": (None, []),
    "function_call": (None,),
    "tool_choice": (None, "auto", "none"),
}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    incoming: list[Incoming]
    tools: list[dict[str, Any]] | None
    thinking: bool
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    n: int
    logprobs: bool
    return_token_ids: bool
    form: Grammar | None
    stop: tuple[str, ...]
    top_k: int
    min_p: float
    model: str


def read_request(body: Any) -> ChatRequest:
    """Check a decoded JSON body. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    refuse_steering(body, _NEUTRAL)
    if not isinstance(body.get("model", ""), str):
        raise BadRequest("'model' must be a string.", "model")
    kwargs = body.get("chat_template_kwargs") or {}
    options = body.get("stream_options") or {}
    if not isinstance(kwargs, dict) or not isinstance(options, dict):
        raise BadRequest(
            "'chat_template_kwargs' and 'stream_options' must be objects.", "chat_template_kwargs"
        )
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    seed = number(body, "seed", None, -math.inf, math.inf, whole=True)
    request = ChatRequest(
        incoming=_incoming(body.get("messages")),
        tools=None if body.get("tool_choice") == "none" else read_tools(body.get("tools")),
        thinking=flag(kwargs, "enable_thinking", True),
        stream=flag(body, "stream", False),
        include_usage=flag(options, "include_usage", False),
        max_tokens=number(body, limit, None, 1, math.inf, whole=True),
        temperature=number(body, "temperature", 1.0, 0, 2),
        top_p=number(body, "top_p", 1.0, 0, 1) or 1e-6,
        seed=None if seed is None else seed & SEED_MASK,
        n=number(body, "n", 1, 1, 64, whole=True),
        logprobs=flag(body, "logprobs", False),
        return_token_ids=flag(body, "return_token_ids", False),
        form=read_form(body),
        stop=read_stop(body.get("stop"), "stop"),
        top_k=number(body, "top_k", 0, -1, 2**31, whole=True),
        min_p=number(body, "min_p", 0.0, 0, 1),
        model=body.get("model", ""),
    )
    if request.stream and request.n > 1:
        raise BadRequest("'n' must be 1 with 'stream'.", "n")
    return request


def refuse_steering(body: Mapping[str, Any], more: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Raise BadRequest for what is not recorded and would change the sample, and for `more` of the kind."""
    for name, neutral in (_STEERS | dict(more or {})).items():
        if not any(body.get(name) == value for value in neutral):
            raise BadRequest(f"'{name}' is not supported with this value.", name, "unsupported_parameter")


def read_stop(given: Any, name: str) -> tuple[str, ...]:
    """Strings that end a reply."""
    strings = [given] if isinstance(given, str) else [] if given is None else given
    good = isinstance(strings, list) and all(isinstance(text, str) for text in strings)
    if not good or any("\ud800" <= char <= "\udfff" for text in strings for char in text):
        raise BadRequest(f"'{name}' must be a string or a list of strings.", name)
    return tuple(text for text in strings if text)


def _incoming(messages: Any) -> list[Incoming]:
    out = []
    for data, message in zip(
        messages if isinstance(messages, list) else (), read_messages(messages), strict=True
    ):
        reasoned = any(data.get(name) is not None for name in ("reasoning_content", "reasoning"))
        silent = None
        if message.role == "assistant" and not reasoned:  # its content as it was sent, with any <think> in it
            silent = Message.from_openai({"role": "user", "content": data.get("content")}).content
        out.append(Incoming(message, silent))
    return out


@dataclass(frozen=True)
class Reply:
    """One choice: what the client is told the model said, and what was wrong with its form."""

    message: Message
    finish: str
    format_errors: list[str]
    completion: Completion


def read_completion(
    tok: Tokenizer, completion: Completion, thinking: bool, tools: Tools | None, call_prefix: str
) -> Reply:
    """Parse what was sampled. A malformed tool call makes the whole reply plain content with a format error."""
    ids = completion.token_ids
    if completion.matched:
        ids = before(tok, ids, begins(tok, ids, completion.matched))
    turn = read_turn(tok, ids, thinking, tools, call_prefix)
    if completion.finish == "stop":
        turn = stopped(turn)
    return Reply(turn.message, turn.finish, turn.format_errors, completion)


def certain_text(tok: Tokenizer, request: ChatRequest, completion: Completion) -> tuple[str, str]:
    """(reasoning, content) that can be shown of an unfinished reply: nothing that may be part of a stop string."""
    reasoning, content = partial_text(tok, completion.token_ids, request.thinking)
    held = max(map(len, request.stop), default=1) - 1
    if content:
        return reasoning, content[: max(0, len(content) - held)].rstrip()
    return reasoning[: max(0, len(reasoning) - held)].rstrip(), ""


def completion_json(
    tok: Tokenizer, request: ChatRequest, plan: Plan, replies: Sequence[Reply], name: str, model: str
) -> dict[str, Any]:
    """The finished replies."""
    choices = []
    for index, reply in enumerate(replies):
        choice = {
            "index": index,
            "message": message_json(reply.message),
            "finish_reason": reply.finish,
            "logprobs": logprobs_json(tok, reply.completion) if request.logprobs else None,
            "format_errors": reply.format_errors,
        }
        if request.return_token_ids:
            choice["token_ids"] = reply.completion.token_ids
        choices.append(choice)
    body = {
        "id": name,
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": choices,
        "usage": usage_json(len(plan.prompt_ids), [r.completion for r in replies]),
    }
    if request.return_token_ids:
        body["prompt_token_ids"] = plan.prompt_ids
    return body


def logprobs_json(tok: Tokenizer, completion: Completion) -> dict[str, Any]:
    """OpenAI's logprobs object: the sampled tokens only."""
    content = [
        {
            "token": tok.decode([token]),
            "logprob": logprob,
            "bytes": list(tok.token_bytes(token)),
            "top_logprobs": [],
        }
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def usage_json(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, Any]:
    """Token counts; `cached_tokens` is what the engine's prefix cache saved."""
    sampled = sum(len(c.token_ids) for c in completions)
    cached = sum(c.cached_tokens for c in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": prompt_tokens + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
