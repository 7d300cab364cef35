"""OpenAI's chat dictionaries, checked: what the gateway and the engine's own routes both read and write.

Invariant: whatever a client sends ends as a value of the right type or as a `BadRequest` that names the parameter.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fullarc.chat.messages import Message
from fullarc.config.errors import FullarcError

_MESSAGE_FIELDS = ("role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id")


class BadRequest(Exception):
    """The client's mistake, as OpenAI's error object: status 4xx, message, the parameter, a code."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, param, code)


def error_body(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"'{name}' must be true or false.", name)
    return default if value is None else value


def number(
    body: Mapping[str, Any], name: str, default: Any, low: float, high: float, whole: bool = False
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or (whole and not isinstance(value, int)) or not (whole or math.isfinite(value)):
        raise BadRequest(f"'{name}' must be {'an integer' if whole else 'a number'}.", name)
    if not low <= value <= high:
        raise BadRequest(f"'{name}' must be between {low} and {high}.", name)
    return value


def read_message(data: Any, where: str) -> Message:
    """One message of a request; `where` names it in errors."""
    if not isinstance(data, dict) or not isinstance(data.get("role"), str):
        raise BadRequest(f"{where} must be an object with a role.", where)
    known = {name: data[name] for name in _MESSAGE_FIELDS if name in data}
    if known["role"] != "assistant":
        known = {name: known[name] for name in ("role", "content", "tool_call_id") if name in known}
    for name, kind in (("reasoning_content", str), ("reasoning", str), ("tool_calls", list)):
        if known.get(name) is not None and not isinstance(known[name], kind):
            raise BadRequest(f"{where}.{name} has the wrong type.", where)
    try:
        return Message.from_openai(known)
    except FullarcError as error:
        raise BadRequest(f"{where}: {error}", where) from None


def read_messages(messages: Any) -> list[Message]:
    """The conversation of a request: at least one message, and the last one not the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("'messages' must be a list with at least one message.", "messages")
    found = [read_message(data, f"messages[{number}]") for number, data in enumerate(messages)]
    if found[-1].role == "assistant":
        raise BadRequest("The last message must come from the user, a tool or the system.", "messages")
    return found


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise BadRequest("'tools' must be a list.", "tools")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        parameters = function.get("parameters") or {} if isinstance(function, dict) else None
        named = (
            isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])
        )
        if (
            not named
            or not isinstance(parameters, dict)
            or not isinstance(parameters.get("properties") or {}, dict)
        ):
            raise BadRequest(f"tools[{number}] is not an OpenAI function tool.", f"tools[{number}]")
    return tools


def read_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> list[str] | None:
    """The functions of which one must be called; None for "auto" and "none"."""
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if choice in (None, "auto", "none"):
        return None
    names = [tool["function"]["name"] for tool in tools or ()]
    if choice != "required":
        name = named.get("name") if isinstance(named, dict) else None
        if not isinstance(name, str):
            raise BadRequest("'tool_choice' must be auto, none, required or a function.", "tool_choice")
        names = [known for known in names if known == name]
    if not names or not all(name.strip() for name in names):
        raise BadRequest("'tool_choice' asks for a function that 'tools' does not have.", "tool_choice")
    return names


def message_json(message: Message) -> dict[str, Any]:
    """The assistant message as OpenAI writes it (content is null beside tool calls without text)."""
    data = message.to_openai()
    if not data["content"] and message.tool_calls:
        data["content"] = None
    return data


def dump(value: Any) -> bytes:
    """ASCII JSON: survives any text a model or client can produce, lone surrogates included."""
    return json.dumps(value, separators=(",", ":")).encode()


def dump_in_parts(value: Any) -> bytes:
    """The same of something large: the encoder lets no other thread run, so no call of it may be long."""
    return b"".join(_parts(value))


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
        for number, (name, part) in enumerate(value.items()):
            yield (b"," if number else b"{") + dump(str(name)) + b":"
            yield from _parts(part)
        yield b"}"
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        for number, part in enumerate(value):
            yield b"," if number else b"["
            yield from _parts(part)
        yield b"]"
    else:
        yield dump(value)


class GrowingList:
    """A list in JSON whose rows are written once, in blocks, for the same reason."""

    def __init__(self) -> None:
        self.rows, self._blocks = 0, list[bytes]()

    def add(self, rows: list[Any]) -> None:
        """Write more rows."""
        if rows:
            self.rows += len(rows)
            self._blocks.append(dump(rows)[1:-1])

    def json(self) -> bytes:
        """All of it."""
        return b"[" + b",".join(self._blocks) + b"]"
