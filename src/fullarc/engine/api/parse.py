"""SGLang's routes that read a sampled text: POST /parse_function_call and /separate_reasoning, by GLM's own format."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.messages import dumps
from fullarc.chat.openai import read_tools
from fullarc.chat.parse import parse_assistant
from fullarc.chat.special import END_THINK, THINK
from fullarc.config.errors import FullarcError
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import Service

# the names under which SGLang has this format
TOOL_PARSERS, REASONING_PARSERS = ("glm", "glm45", "glm47"), ("glm45",)


class CallsBody(BaseModel):
    """POST /parse_function_call."""

    model_config = ConfigDict(extra="ignore")
    text: str
    tools: list[Any] | None = None
    tool_call_parser: str | None = None


class ReasoningBody(BaseModel):
    """POST /separate_reasoning."""

    model_config = ConfigDict(extra="ignore")
    text: str
    reasoning_parser: str
    return_blocks: bool = False


class Parse:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/parse_function_call", self.calls, body=CallsBody),
            Endpoint("/separate_reasoning", self.reasoning, body=ReasoningBody),
        ]

    async def calls(self, http: HttpRequest) -> Response:
        """The tool calls of a text, and what is left of it; a malformed one stays text."""
        body = await read_body(http, CallsBody)
        _known(body.tool_call_parser or TOOL_PARSERS[0], TOOL_PARSERS)
        parsed = parse_assistant(
            self.service.text, self.service.encode(body.text), False, read_tools(body.tools)
        )
        broken = any("tool_call" in error and error != "content_after_tool_call" for error in parsed.errors)
        if broken:
            return answer({"normal_text": body.text, "calls": []})
        found = enumerate(parsed.tool_calls)
        calls = [{"tool_index": n, "name": c.name, "parameters": dumps(c.arguments)} for n, c in found]
        return answer({"normal_text": parsed.content, "calls": calls})

    async def reasoning(self, http: HttpRequest) -> Response:
        """What a text thinks and what it says; thinking may begin in the prompt."""
        body = await read_body(http, ReasoningBody)
        _known(body.reasoning_parser, REASONING_PARSERS)
        thinks = THINK in body.text or END_THINK in body.text
        before, _, after = body.text.partition(END_THINK) if thinks else ("", "", body.text)
        told: dict[str, Any] = {"reasoning_text": before.replace(THINK, "", 1).strip(), "text": after.strip()}
        if body.return_blocks:
            blocks = [("reasoning", told["reasoning_text"]), ("text", told["text"])]
            told["blocks"] = [{"type": kind, "text": text} for kind, text in blocks if text]
            told["reasoning_blocks"] = [told["reasoning_text"]] if told["reasoning_text"] else []
            told["text_blocks"] = [told["text"]] if told["text"] else []
        return answer(told)


def _known(parser: str, known: tuple[str, ...]) -> None:
    if parser not in known:
        raise FullarcError(f"There is no parser {parser[:100]!r} here.", f"Known: {', '.join(known)}.")
