"""The smallest web framework that the demo gets along with: endpoints, and how WSGI and ASGI reach them.

Around each endpoint goes dbscope's middleware, and around that a log of what the server has answered: the audit
compares it with what the clients have received, and with what the database holds.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl

from dbscope.cli.demo.books import Refused
from dbscope.cli.demo.log import name_of, text_of

if TYPE_CHECKING:
    from dbscope.cli.demo.bank import Bank

__dbscope_user_code__ = True  # errors name its lines, as they would those of a user's framework

Behind = Literal["a scope", "an on-success scope", "nothing"]
Headers = list[tuple[str, str]]
_PLAIN = [("Content-Type", "text/plain")]
_JSON = [("Content-Type", "application/json")]


@dataclass(frozen=True)
class Request:
    """What an endpoint is told."""

    id: str
    door: str
    name: str
    arguments: Mapping[str, str]

    @classmethod
    def read(cls, path: str, query: str) -> "Request":
        """The request at a path such as `/wsgi/pay`."""
        door, _, name = path.strip("/").partition("/")
        arguments = dict(parse_qsl(query))
        return cls(arguments.pop("id", ""), door, name, arguments)


@dataclass(frozen=True)
class Reply:
    """What an endpoint answers: an object for JSON, or a stream of text."""

    status: int = 200
    body: Mapping[str, Any] = field(default_factory=dict)
    stream: Iterator[str] | AsyncIterator[str] | None = None

    @property
    def headers(self) -> Headers:
        """The headers, but for the length of a stream, which nobody knows."""
        return _PLAIN if self.stream is not None else [*_JSON, ("Content-Length", str(len(self.encoded)))]

    @property
    def encoded(self) -> bytes:
        """The body of an answer that is no stream."""
        return json.dumps(self.body).encode()


Sync = Callable[["Bank", Request], Reply]
Async = Callable[["Bank", Request], Awaitable[Reply]]


@dataclass(frozen=True)
class Endpoint:
    """A function for requests, in one colour or both, and what stands between it and the server."""

    name: str
    in_thread: Sync | None = None
    on_loop: Async | None = None
    behind: Behind = "a scope"


def apology(error: BaseException) -> Reply:
    """The answer to a request that failed."""
    return Reply(500, {"error": name_of(error), "message": text_of(error)})


def refusal(error: Refused) -> Reply:
    """The answer to a request that the bank refuses."""
    return Reply(409, {"error": "Refused", "message": str(error)})


# -- WSGI --------------------------------------------------------------------------------------------------------


class WSGI:
    """The bank as a WSGI application."""

    def __init__(self, bank: "Bank", endpoints: Mapping[str, Endpoint]) -> None:
        self.bank = bank
        self.endpoints = endpoints
        self.apps: dict[Behind, Any] = {
            "a scope": bank.doors.wsgi(self.serve, None),
            "an on-success scope": bank.doors.wsgi(self.serve, "on-success"),
            "nothing": self.serve,
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        """Log what the application answers, and apologise where it fails."""
        request = environ["demo.request"] = Request.read(environ["PATH_INFO"], environ["QUERY_STRING"])
        answer = self.bank.log.began(request.id, request.door)

        def start(status: str, headers: Headers, exc_info: Any = None) -> Any:
            answer.status = int(status[:3])
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        body: Iterable[bytes] = ()
        sent = False
        try:
            body = self.apps[self.endpoints[request.name].behind](environ, start)
            for part in body:
                sent = True
                yield part
        except Exception as error:
            self.bank.log.failed(request.id, error)
            if sent:
                raise  # the server cuts the connection: the client must not take this for the whole
            reply = apology(error)
            start(_status(reply), reply.headers, sys.exc_info())
            yield reply.encoded
        finally:
            if hasattr(body, "close"):
                body.close()
            self.bank.log.ended(answer)

    def serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The application itself."""
        request: Request = environ["demo.request"]
        function = self.endpoints[request.name].in_thread
        assert function is not None, f"{request.name} has no sync form"
        self.bank.watch.scope()
        try:
            reply = function(self.bank, request)
        except Refused as error:
            reply = refusal(error)
        start_response(_status(reply), reply.headers)
        if reply.stream is None:
            return [reply.encoded]
        assert isinstance(reply.stream, Iterator)
        return (line.encode() for line in reply.stream)


def _status(reply: Reply) -> str:
    return f"{reply.status} {HTTPStatus(reply.status).phrase}"


# -- ASGI --------------------------------------------------------------------------------------------------------


class ASGI:
    """The bank as an ASGI application: async endpoints on the loop, sync ones in threads."""

    def __init__(self, bank: "Bank", endpoints: Mapping[str, Endpoint]) -> None:
        self.bank = bank
        self.endpoints = endpoints
        self.apps: dict[Behind, Any] = {
            "a scope": bank.doors.asgi(self.serve, None),
            "an on-success scope": bank.doors.asgi(self.serve, "on-success"),
            "nothing": self.serve,
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Log what the application answers, and apologise where it fails."""
        request = Request.read(scope["path"], scope["query_string"].decode())
        scope["demo.request"] = request
        answer = self.bank.log.began(request.id, request.door)

        async def note_and_send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
            await send(message)

        try:
            await self.apps[self.endpoints[request.name].behind](scope, receive, note_and_send)
        except Exception as error:
            self.bank.log.failed(request.id, error)
            if answer.status is not None:
                raise  # the server cuts the connection: the client must not take this for the whole
            await _send(apology(error), note_and_send)
        finally:
            self.bank.log.ended(answer)
            answer.over.set()

    async def serve(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The application itself."""
        request: Request = scope["demo.request"]
        endpoint = self.endpoints[request.name]
        self.bank.watch.scope()
        try:
            if request.door == "async":
                assert endpoint.on_loop is not None, f"{request.name} has no async form"
                reply = await endpoint.on_loop(self.bank, request)
            else:
                assert endpoint.in_thread is not None, f"{request.name} has no sync form"
                reply = await asyncio.to_thread(endpoint.in_thread, self.bank, request)
        except Refused as error:
            reply = refusal(error)
        await _send(reply, send)


async def _send(reply: Reply, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    if reply.stream is None:
        await send({"type": "http.response.body", "body": reply.encoded})
        return
    async for line in _lines(reply.stream):
        await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _lines(stream: Iterator[str] | AsyncIterator[str]) -> AsyncIterator[str]:
    if isinstance(stream, AsyncIterator):
        async for line in stream:
            yield line
        return
    while line := await asyncio.to_thread(next, stream, ""):
        yield line
