"""Applications as frameworks and servers type them go into the middlewares and come out as such. mypy reads this."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from flask import Flask

from dbscope.integrations import asgi, wsgi
from dbscope.integrations.flask import Scopes

# As Starlette and FastAPI have them.
Message = MutableMapping[str, Any]
ASGIApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Any
]


def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """A WSGI application."""
    start_response("200 OK", [])
    return []


async def asgi_app(scope: MutableMapping[str, Any], receive: asgi.Receive, send: asgi.Send) -> None:
    """An ASGI application."""
    await send({"type": "http.response.start", "status": 200})


served: WSGIApplication = wsgi.ScopeMiddleware(wsgi_app)
served = wsgi.ScopeMiddleware(served, "on-success", veto=lambda status: status >= 500)
aserved: ASGIApp = asgi.ScopeMiddleware(asgi_app, commit="on-success")
aserved = asgi.ScopeMiddleware(aserved, commit=None)

wsgi.ScopeMiddleware(wsgi_app, commit="always")  # type: ignore[arg-type]
asgi.ScopeMiddleware(asgi_app, veto=400)  # type: ignore[arg-type]

app = Flask("shop")
Scopes(app, commit="on-success", veto=lambda status: status >= 500).init_app(app)
served = app.wsgi_app

Scopes(wsgi_app)  # type: ignore[arg-type]
Scopes(app, veto=400)  # type: ignore[arg-type]
