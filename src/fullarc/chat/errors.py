"""The error objects of both dialects: Anthropic's on its routes, OpenAI's everywhere else. Servers of all rooms use
them."""

from typing import Any

from pydantic import ValidationError

from fullarc.chat.openai import BadRequest, error_body

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# what a server answers without a key: the page at / has a field for one, and monitors have none
OPEN_PATHS = ("/", "/health", "/ping", "/liveness", "/ready")


def error_object(
    path: str, status: int, message: str, param: str | None = None, code: str | None = None, kind: str = ""
) -> dict[str, Any]:
    """An error in the form that the clients of `path` read."""
    kind = kind or KINDS.get(status, "invalid_request_error")
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": message}}
    return error_body(message, param, code or str(status), kind)


def refusal(error: ValidationError) -> BadRequest:
    """The first problem of a body in one sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [str(part)[:200] for part in first["loc"]]
    return BadRequest(f"{'.'.join(places)[:200] or 'body'}: {first['msg']}.", places[0] if places else None)
