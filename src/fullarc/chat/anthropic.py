"""Anthropic's Messages as data: conversations, tools and thinking in; content blocks and their events out.

The engine's own route and the gateway both read and write it here. Thinking blocks of earlier turns go back into the
conversation as reasoning; their signature is a constant, since nothing is hidden in them.

Invariant: whatever a client sends ends as a value of the right type or as a `BadRequest` that names the parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fullarc.chat.messages import Message, ToolCall, dumps
from fullarc.chat.openai import BadRequest, read_tool_choice, read_tools

SIGNATURE = "none"
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}
_CHOICES = ("auto", "any", "tool", "none")


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request as OpenAI's, the functions of which one must be called, and whether several may be."""

    tools: list[dict[str, Any]] | None
    forced: list[str] | None
    several: bool


def read_thinking(thinking: Any) -> bool:
    """Whether the turn thinks; it does unless that is disabled."""
    kind = (thinking or {}).get("type", "enabled") if isinstance(thinking, dict | None) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise BadRequest("thinking.type must be enabled, adaptive or disabled.", "thinking")
    return bool(kind != "disabled")


def output_format(output_config: Any) -> Any:
    """The form that `output_config` asks for; its other fields only ask for effort."""
    if not isinstance(output_config, dict | None):
        raise BadRequest("output_config must be an object.", "output_config")
    return (output_config or {}).get("format")


def read_tool_use(tools: Any, choice: Any) -> ToolUse:
    """`tools` and `tool_choice`."""
    kind = (choice or {}).get("type", "auto") if isinstance(choice, dict | None) else None
    if kind not in _CHOICES:
        raise BadRequest(f"tool_choice.type must be one of {', '.join(_CHOICES)}.", "tool_choice")
    if not isinstance(tools, list | None):
        raise BadRequest("tools must be a list.", "tools")
    found = []
    for number, tool in enumerate(tools or ()):
        if not isinstance(tool, dict) or "input_schema" not in tool:
            raise BadRequest(f"tools.{number} has no input_schema.", f"tools.{number}")
        function = {"name": tool.get("name"), "description": tool.get("description") or "",
                    "parameters": tool["input_schema"]}  # fmt: skip
        found.append({"type": "function", "function": function})
    known = None if kind == "none" else read_tools(found)
    wanted: Any = {"any": "required"}.get(kind, "auto")
    if kind == "tool":
        wanted = {"type": "function", "function": {"name": choice.get("name")}}
    parallel = not (choice or {}).get("disable_parallel_tool_use") and kind != "tool"
    return ToolUse(known, read_tool_choice(wanted, known), parallel)


def read_conversation(system: Any, given: Any) -> list[Message]:
    """Anthropic's messages as ours. Raises BadRequest naming the first that is not one."""
    messages = [Message("system", _text(system, "system"))] if system else []
    if not isinstance(given, list) or not given:
        raise BadRequest("messages is empty.", "messages")
    for number, data in enumerate(given):
        where = f"messages.{number}"
        if not isinstance(data, dict) or data.get("role") not in ("user", "assistant"):
            raise BadRequest(f"{where}: role must be user or assistant.", where)
        content = data.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise BadRequest(f"{where}: content must be a string or a list of blocks.", where)
        messages += (_assistant if data["role"] == "assistant" else _user)(blocks, where)
    if messages[-1].role == "assistant":
        raise BadRequest("The last message must come from the user.", "messages")
    return messages


def _user(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    """Tool results first, each a message of its own, then what the user says."""
    results = [block for block in blocks if block.get("type") == "tool_result"]
    said = [block for block in blocks if block.get("type") != "tool_result"]
    found = [
        Message(
            "tool", _text(block.get("content") or "", where), tool_call_id=str(block.get("tool_use_id") or "")
        )
        for block in results
    ]
    return found + ([Message("user", _text(said, where))] if said or not results else [])


def _assistant(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    reasoning, content, calls = "", "", list[ToolCall]()
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            reasoning += _string(block.get("thinking"), where)
        elif kind == "tool_use":
            arguments = block.get("input") or {}
            if not isinstance(arguments, dict) or not isinstance(block.get("name"), str):
                raise BadRequest(f"{where}: a tool_use block needs a name and an input object.", where)
            calls.append(ToolCall(block["name"], arguments, str(block.get("id") or "")))
        elif kind != "redacted_thinking":
            content += _text([block], where)
    return [Message("assistant", content, reasoning, calls)]


def _text(content: Any, where: str) -> str:
    """Text blocks, or a string, as one string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}: content must be a string or a list of blocks.", where)
    parts = []
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text":
            raise BadRequest(f"{where}: only text blocks are supported here.", where)
        parts.append(_string(block.get("text"), where))
    return "".join(parts)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{where}: a block's text must be a string.", where)
    return value


# --- out ------------------------------------------------------------------------------------------------------


def message_head(name: str, model: str, usage: Mapping[str, int]) -> dict[str, Any]:
    """The message that a reply begins with, still without content and end."""
    return {"id": name, "type": "message", "role": "assistant", "model": model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": dict(usage)}  # fmt: skip


def usage_json(prompt: int, cached: int, sampled: int) -> dict[str, int]:
    """Token counts; what the prefix cache saved counts as read from a cache."""
    return {"input_tokens": prompt - cached, "output_tokens": sampled, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0}  # fmt: skip


def content_blocks(message: Message) -> list[dict[str, Any]]:
    """An assistant's message as content blocks."""
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": SIGNATURE})
    if message.content:
        blocks.append({"type": "text", "text": message.content})
    for call in message.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return blocks


class BlockEvents:
    """The events of content blocks in the order in which they open; one is open at a time."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""
        self._sent = {"thinking": "", "text": ""}

    def grow(self, thinking: str, text: str) -> list[dict[str, Any]]:
        """What the two texts have gained."""
        return [*self._more("thinking", thinking), *self._more("text", text)]

    def end(self, message: Message) -> list[dict[str, Any]]:
        """The rest of the message, its tool calls, and the end of the last block."""
        events = [*self.grow(message.reasoning, message.content), *self._close()]
        for call in message.tool_calls:
            events.append(
                self._open("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            )
            events.append(self._delta({"type": "input_json_delta", "partial_json": dumps(call.arguments)}))
            events += self._close()
        return events

    def _more(self, kind: str, text: str) -> list[dict[str, Any]]:
        new = text[len(self._sent[kind]) :]
        if not new:
            return []
        self._sent[kind] = text
        opening = []
        if self._kind != kind:
            empty = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            opening = [*self._close(), self._open(kind, empty)]
        return [*opening, self._delta({"type": f"{kind}_delta", kind: new})]

    def _open(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._index, self._kind = self._index + 1, kind
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        """The end of the open block, if there is one."""
        if not self._kind:
            return []
        signed = (
            [self._delta({"type": "signature_delta", "signature": SIGNATURE})]
            if self._kind == "thinking"
            else []
        )
        self._kind = ""
        return [*signed, {"type": "content_block_stop", "index": self._index}]
