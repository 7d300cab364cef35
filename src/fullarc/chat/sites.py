"""Requests that pages of other sites make a browser send, refused where a server without a key trusts its machine.

A browser lets any page send to loopback, and says whose page it is: in `Origin`, or, where it sends none (an image, a
link), in `Sec-Fetch-Site`. A page whose own name suddenly means this machine (DNS rebinding) is told by `Host`.
Clients that are no browsers send neither of the first two, and name loopback.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fullarc.chat.errors import error_object
from fullarc.chat.openai import dump


class OwnPages:
    """Lets requests pass that come from no page or from one of this machine; links to the chat page may be anywhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := _problem(scope)):
            said = error_object(scope["path"], 403, f"{problem} Start the server with an API key to open it.")
            await Response(dump(said), 403, media_type="application/json")(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _problem(scope: Scope) -> str:
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = headers.get(b"host", "localhost"), headers.get(b"origin")
    if not _here(f"//{host}"):
        return f"Without a key only loopback's names are answered, not {host[:200]!r}."
    elsewhere = headers.get(b"sec-fetch-site") == "cross-site" and scope["path"] != "/"
    if elsewhere or not (origin is None or _here(origin)):
        return (
            f"Without a key pages of other sites are not answered, such as {(origin or 'this one')[:200]!r}."
        )
    return ""


def _here(url: str) -> bool:
    """Whether the host of `url` is loopback."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
