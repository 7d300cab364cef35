"""Messages: what is said, by whom, and which of it a model should learn.

A conversation is a list of `Message`; OpenAI's dictionaries convert both ways. `loss` and `loss_spans` carry
the recipe's rule for flawed trajectories: erroneous segments stay in the context but are not trained on
(GLM-5 3.1).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fullarc.config.errors import FullarcError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


@dataclass
class ToolCall:
    """One call: the function's name and its arguments by name. `id` links a tool message to it (OpenAI)."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = ""


class LossSpan(NamedTuple):
    """A stretch of an assistant turn with its own weight.

    `part` is "reasoning" or "content" with character offsets [start, end) into that text (after stripping),
    or "tool_calls" with call numbers [start, end).
    """

    part: Literal["reasoning", "content", "tool_calls"]
    start: int
    end: int
    loss: int = 0


@dataclass
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool (a tool's result).
        content: what is said.
        reasoning: an assistant's thinking before it speaks or acts; empty means that it did not think.
        tool_calls: an assistant's calls, made after its content.
        loss: 0 keeps an assistant turn as context without training on it; None and 1 train on it.
        loss_spans: stretches of the turn that differ from `loss`.
        tool_call_id: which call a tool message answers (OpenAI's protocol; not rendered).
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    loss: int | None = None
    loss_spans: list[LossSpan] = field(default_factory=list)
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise FullarcError(f"A message has the role {self.role!r}.", f"Roles are {', '.join(ROLES)}.")
        if self.role != "assistant" and (self.loss or self.loss_spans or self.tool_calls or self.reasoning):
            raise FullarcError(
                f"A {self.role} message carries reasoning, tool calls or a loss.",
                "Only assistant messages may.",
            )
        self.loss_spans = [LossSpan(*span) for span in self.loss_spans]

    @classmethod
    def from_openai(cls, data: Mapping[str, Any]) -> "Message":
        """Read a chat-completions message; `<think>…</think>` at the head of a content becomes `reasoning`.

        Raises:
            FullarcError: the dictionary is not a message (unknown role, arguments that are not JSON objects).
        """
        role = {"developer": "system"}.get(str(data.get("role")), data.get("role"))
        content = _text(data.get("content"))
        reasoning = data.get("reasoning_content") or data.get("reasoning") or ""
        if role == "assistant" and not reasoning and "</think>" in content:
            before, content = content.split("</think>", 1)
            reasoning = before.split("<think>", 1)[-1].strip()
        return cls(
            role=role,  # type: ignore[arg-type]  # checked in __post_init__
            content=content,
            reasoning=reasoning if role == "assistant" else "",
            tool_calls=[_call(call) for call in data.get("tool_calls") or []],
            loss=data.get("loss"),
            loss_spans=list(data.get("loss_spans") or []),
            tool_call_id=str(data.get("tool_call_id") or ""),
        )

    def to_openai(self, json_arguments: bool = True) -> dict[str, Any]:
        """The chat-completions dictionary; the Jinja template wants arguments as dicts, not as JSON."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            data["reasoning_content"] = self.reasoning
        if self.tool_calls:
            data["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": dumps(call.arguments) if json_arguments else call.arguments,
                    },
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id:
            data["tool_call_id"] = self.tool_call_id
        if self.loss is not None:
            data["loss"] = self.loss
        if self.loss_spans:
            data["loss_spans"] = [list(span) for span in self.loss_spans]
        return data


def dumps(value: Any) -> str:
    """JSON as the chat template writes it."""
    return json.dumps(value, ensure_ascii=False)


def _text(content: Any) -> str:
    """OpenAI's content (a string, None, or a list of parts) as one string."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FullarcError(
            f"A message's content is {type(content).__name__}.", "Send a string or a list of parts."
        )
    parts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise FullarcError("A message has a content part that is not text.", "Send text parts only.")
        parts.append(text)
    return "".join(parts)


def _call(data: Any) -> ToolCall:
    function = data.get("function", data) if isinstance(data, Mapping) else None
    known: Mapping[str, Any] = function if isinstance(function, Mapping) else {}
    name, arguments = known.get("name"), known.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise FullarcError(
            "A tool call has no function name, or its arguments are not a JSON object.",
            'Send {"function": {"name": …, "arguments": "{…}"}}.',
        )
    return ToolCall(name, arguments, str(data.get("id") or ""))
