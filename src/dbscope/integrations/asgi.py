"""A scope for each HTTP request of an ASGI application, whichever framework it is written with."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dbscope.errors import ConfigurationError
from dbscope.integrations._requests import KEY, Policy, RequestScope, Veto, refuse_other, refuse_twice
from dbscope.integrations._starlette import refuse
from dbscope.scope import Colour, Commit
from dbscope.where import running_loop

__all__ = ["ScopeMiddleware"]

_ASYNC = Colour.ASYNC  # bound once: reading a member through its Enum is not free

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class ScopeMiddleware:
    """An ASGI application that runs each HTTP request of `app` in a scope of its own.

    The scope ends when the response starts, before its first byte leaves: sessions are released, and with
    `commit="on-success"` the request is committed first, so that a failed commit raises out of the application's
    `send()` and becomes a 500. What runs later (a stream, a background task) opens a scope of its own, and so does
    the handler of a websocket. Websockets, the lifespan and all messages pass through untouched.

    Args:
        app: the application. In one that is mounted in another, and has its own, the inner one does nothing.
        commit: None, and the application commits by itself; `"on-success"`, and each request is one managed
            transaction for each database that it uses: committed if nothing was raised and the status is below 400.
        veto: with `"on-success"`, called with the status instead of comparing it with 400; true rolls back.

    Raises:
        ConfigurationError: an option is not one of these, `app` is wrapped already, or is none of ASGI's. Where a
            framework makes it, and for what is wrong with a Starlette or FastAPI application: when the server starts.

    >>> async def app(scope, receive, send): ...
    >>> app = ScopeMiddleware(app, commit="on-success")
    """

    def __init__(self, app: App, commit: Commit = None, *, veto: Veto | None = None) -> None:
        self.app = app
        self._checked = False
        self._mistake: ConfigurationError | None = None
        try:
            self.policy = Policy(app, commit, veto)
            refuse_twice(app, ScopeMiddleware)
            refuse_other(app, "ASGI")
        except ConfigurationError as error:
            if running_loop() is None:
                raise
            # A framework makes its middlewares when the server starts it, and servers take an exception there for an
            # application that needs no start: they are told in their own words.
            self._mistake = error

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if not self._checked:
            await self._check(scope, receive, send)
        if scope["type"] != "http" or (KEY in scope and not scope[KEY].ended):
            await self.app(scope, receive, send)
            return
        work = scope[KEY] = RequestScope(scope.get("method", ""), scope.get("path", ""), scope, self.policy)

        async def finish_then_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                veto = work.starts(message["status"])
                if veto is not None:
                    await work.afinish(veto=veto)
            await send(message)

        work.enter(_ASYNC)
        try:
            await self.app(scope, receive, finish_then_send)
            if not work.ended:
                await work.afinish(veto=work.commit is not None)  # there never was a response
        except BaseException as error:
            await work.__aexit__(type(error), error, None)
            raise
        finally:
            work.forget_request()
        work.suspend()

    async def _check(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Refuse to start an application that could not work: at the lifespan; where there is none, at each request."""
        try:
            if self._mistake is not None:
                raise self._mistake
            refuse(scope.get("app"), ScopeMiddleware)
        except ConfigurationError as error:
            if scope["type"] == "lifespan":
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        self._checked = True
