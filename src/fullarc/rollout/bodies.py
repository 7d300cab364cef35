"""Bodies of requests, of bounded size: a client can neither fill the memory nor nest too deep for the parser."""

import json
from typing import Any

from starlette.requests import Request

from fullarc.chat.openai import BadRequest


async def json_body(http: Request, limit: int) -> Any:
    """The JSON value. Raises BadRequest for more than `limit` bytes, without reading on, and for what is not JSON."""
    size = 0
    parts = []
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise BadRequest(f"The body is larger than {limit} bytes.", status=413)
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise BadRequest("The body is not JSON.") from None
