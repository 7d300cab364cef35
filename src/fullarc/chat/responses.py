"""OpenAI's Responses as data: input items, tools and choices in; output items and their events out.

Reasoning, messages and function calls that follow each other are one turn of the assistant. What is known of a turn is
written anew in every event that holds an item, so the items of a stream's events are those of the whole answer.

Invariant: whatever a client sends ends as a value of the right type or as a `BadRequest` that names the parameter.
"""

from collections.abc import Iterator
from typing import Any

from fullarc.chat.messages import Message, ToolCall, dumps
from fullarc.chat.openai import BadRequest, read_message, read_tools

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def read_input(instructions: str | None, given: str | list[Any]) -> list[Message]:
    """The conversation of a request; the last message is not the assistant's."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    for number, item in enumerate(items):
        _add(turns, item, f"input[{number}]")
    found = [read_message(turn, "input") for turn in turns]
    if not found or found[-1].role == "assistant":
        raise BadRequest("The last item of 'input' must come from the user or a tool.", "input")
    return found


def _add(turns: list[dict[str, Any]], item: Any, where: str) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    own = bool(turns) and turns[-1]["role"] == "assistant"
    if kind == "reasoning":
        turns.append({"role": "assistant", "content": "", "tool_calls": []})
        turns[-1]["reasoning_content"] = _text(item.get("content") or item.get("summary"), where)
    elif kind == "function_call":
        if not own:
            turns.append({"role": "assistant", "content": "", "tool_calls": []})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        turns[-1]["tool_calls"].append({"id": item.get("call_id"), "type": "function", "function": function})
    elif kind == "function_call_output":
        text = _text(item.get("output"), where)
        turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    elif kind == "message" and item.get("role") == "assistant":
        if not own or turns[-1]["content"] or turns[-1]["tool_calls"]:
            turns.append({"role": "assistant", "tool_calls": []})
        turns[-1]["content"] = _text(item.get("content"), where)
    elif kind == "message" and item.get("role") in ("user", "system", "developer"):
        turns.append({"role": item["role"], "content": _text(item.get("content"), where)})
    else:
        raise BadRequest(
            f"{where} must be a message, reasoning, a function_call or a function_call_output.", where
        )


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[Any] = content if isinstance(content, list) else [None]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") in _TEXTS and isinstance(part.get("text"), str)):
            raise BadRequest(f"{where}: only text is supported.", where)
    return "".join(part["text"] for part in parts)


def read_functions(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The tools as chat completions have them."""
    found = []
    for number, tool in enumerate(tools or ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise BadRequest(f"tools[{number}]: only functions are supported.", f"tools[{number}]")
        named = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
        found.append({"type": "function", "function": named})
    return read_tools(found)


def read_choice(choice: Any) -> Any:
    """`tool_choice` as chat completions have it."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def output_items(message: Message, name: str, status: str) -> list[dict[str, Any]]:
    """What a turn says; `status` is that of the last item, the others are completed."""
    items = []
    if message.reasoning:
        items.append(_reasoning(name, message.reasoning))
    if message.content or not (message.reasoning or message.tool_calls):
        items.append(_message(name, message.content))
    items += [_call(name, number, call) for number, call in enumerate(message.tool_calls)]
    items[-1]["status"] = status
    return items


def _reasoning(name: str, text: str) -> dict[str, Any]:
    parts = [{"type": "reasoning_text", "text": text}] if text else []
    return {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": parts, "status": "completed"}


def _message(name: str, text: str) -> dict[str, Any]:
    return {"type": "message", "id": f"msg_{name}", "role": "assistant", "status": "completed",
            "content": [_part(text)]}  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(name: str, number: int, call: ToolCall) -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{name}_{number}", "call_id": call.id, "name": call.name,
            "arguments": dumps(call.arguments), "status": "completed"}  # fmt: skip


class ItemEvents:
    """The events of output items in the order in which they open; one is open at a time."""

    def __init__(self, name: str) -> None:
        self._name, self._index, self._kind = name, -1, ""
        self._sent = {"reasoning": "", "message": ""}

    def grow(self, reasoning: str, content: str) -> Iterator[dict[str, Any]]:
        """What the two texts have gained."""
        yield from self._more("reasoning", reasoning)
        yield from self._more("message", content)

    def end(self, message: Message, status: str) -> Iterator[dict[str, Any]]:
        """The rest of the turn, item by item."""
        yield from self.grow(message.reasoning, message.content)
        items = output_items(message, self._name, status)
        done = {item["type"]: item for item in items if item["type"] != "function_call"}
        if self._kind:
            yield from self._close(done[self._kind])
        elif "message" in done:  # nothing at all was said
            yield from self._open("message")
            yield from self._close(done["message"])
        for item in items:
            if item["type"] == "function_call":
                self._index += 1
                yield self._item("added", item | {"arguments": "", "status": "in_progress"})
                place = {"item_id": item["id"], "output_index": self._index}
                kind = "response.function_call_arguments"
                yield {"type": f"{kind}.delta", "delta": item["arguments"]} | place
                yield {"type": f"{kind}.done", "arguments": item["arguments"], "name": item["name"]} | place
                yield self._item("done", item)

    def _more(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        new = text[len(self._sent[kind]) :]
        if not new:
            return
        if self._kind != kind:
            if self._kind:
                yield from self._close(_reasoning(self._name, self._sent["reasoning"]))
            yield from self._open(kind)
        self._sent[kind] = text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield {"type": f"response.{_SAYS[kind]}.delta", "delta": new} | self._place() | more

    def _open(self, kind: str) -> Iterator[dict[str, Any]]:
        self._index, self._kind = self._index + 1, kind
        empty = (
            _reasoning(self._name, "") if kind == "reasoning" else _message(self._name, "") | {"content": []}
        )
        yield self._item("added", empty | {"status": "in_progress"})
        part = _part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
        yield {"type": "response.content_part.added", "part": part} | self._place()

    def _close(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind, part = _SAYS[self._kind], item["content"][0]
        more: dict[str, Any] = {"logprobs": []} if self._kind == "message" else {}
        yield {"type": f"response.{kind}.done", "text": part["text"]} | self._place() | more
        yield {"type": "response.content_part.done", "part": part} | self._place()
        yield self._item("done", item)
        self._kind = ""

    def _item(self, what: str, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": f"response.output_item.{what}", "output_index": self._index, "item": item}

    def _place(self) -> dict[str, Any]:
        start = "rs" if self._kind == "reasoning" else "msg"
        return {"item_id": f"{start}_{self._name}", "output_index": self._index, "content_index": 0}


_SAYS = {"reasoning": "reasoning_text", "message": "output_text"}
