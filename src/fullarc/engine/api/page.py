"""GET /: a page to talk to the model. One file, nothing fetched from anywhere else (a policy header enforces it)."""

from importlib.resources import files

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from fullarc.engine.api.guard import Endpoint
from fullarc.engine.api.service import Service

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Page:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/", self.page, ("GET",))]

    async def page(self, _http: HttpRequest) -> Response:
        """A page to talk to the model."""
        html = files("fullarc.engine.api").joinpath("page.html").read_text()
        return HTMLResponse(
            html, headers={"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        )
