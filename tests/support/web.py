"""Requests without a server, in both colours: a kit's endpoint behind its middleware, driven as servers drive it.

An endpoint is an async generator that is written once. It yields the status, which starts the response, and then the
chunks of the body:

    async def endpoint():
        kit.session().add(Payment())
        yield 201
        yield b"done"

    answer = await get(kit, endpoint, commit="on-success")

With the sync kit it runs as a WSGI application (PEP 3333's own checker on both sides of the middleware), with the
async kit as an ASGI application. `serve_wsgi`, `serve_asgi` run applications on real servers.
"""

import asyncio
import contextlib
import http.client
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from dbscope.integrations import asgi, wsgi
from tests.support import needs
from tests.support.kits import LIMIT, Kit, drive

Endpoint = Callable[[], AsyncGenerator[int | bytes, None]]
Messages = list[MutableMapping[str, Any]]


@dataclass
class Answer:
    """What a client gets: a status, 500 if the application failed before its headers left; and that error."""

    status: int = 500
    chunks: list[bytes] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks)


async def get(kit: Kit, endpoint: Endpoint, path: str = "/", *, method: str = "GET", **options: Any) -> Answer:
    """The answer to one request, through a middleware with these options."""
    return await ask(kit, wrapped(kit, endpoint, **options), path, method=method)


def wrapped(kit: Kit, endpoint: Endpoint, **options: Any) -> Any:
    """The endpoint as an application of the kit's colour, in its middleware."""
    if kit.colour == "sync":
        return validator(wsgi.ScopeMiddleware(validator(wsgi_app(endpoint)), **options))
    return asgi.ScopeMiddleware(asgi_app(endpoint), **options)


async def ask(kit: Kit, app: Any, path: str = "/", *, method: str = "GET") -> Answer:
    """The answer of an application of the kit's colour."""
    if kit.colour == "sync":
        return call_wsgi(app, environ(method, path))
    return await call_asgi(app, http_scope(method, path))


# -- WSGI --------------------------------------------------------------------------------------------------------------


def wsgi_app(endpoint: Endpoint) -> WSGIApplication:
    """The endpoint as a WSGI application that starts its response while its body is iterated."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        parts = endpoint()
        try:
            while True:
                try:
                    part = drive(anext(parts))
                except StopAsyncIteration:
                    return
                if isinstance(part, int):
                    start_response(f"{part} Said", [("Content-Type", "text/plain")])
                    yield b""
                else:
                    yield part
        finally:
            drive(parts.aclose())

    return app


def environ(method: str = "GET", path: str = "/") -> WSGIEnvironment:
    """What a WSGI server tells of a request."""
    made: WSGIEnvironment = {"REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": ""}
    setup_testing_defaults(made)
    return made


class WsgiServer:
    """One exchange as a WSGI server has it: headers leave with the first byte of the body, and not before."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.told: str | None = None
        self.sent = False

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """Note the headers; PEP 3333's rules on a second call."""
        if exc_info is not None and self.sent:
            raise exc_info[1].with_traceback(exc_info[2])
        assert self.told is None or exc_info is not None, "headers were set already"
        self.told = status
        return self.write

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        assert self.told is not None, "write() before start_response()"
        if data:
            self.send_headers()
            self.answer.chunks.append(data)

    def send_headers(self) -> None:
        """Send the headers, unless they have left."""
        assert self.told is not None
        self.sent = True
        self.answer.status = int(self.told[:3])

    def run(self, app: WSGIApplication, environ: WSGIEnvironment) -> Answer:
        """The whole exchange."""
        try:
            body: Any = app(environ, self.start_response)
            try:
                for chunk in body:
                    self.write(chunk)
                assert self.told is not None, "no response was started"
                self.send_headers()
            finally:
                if hasattr(body, "close"):
                    body.close()
        except Exception as error:
            self.answer.error = error
        return self.answer


def call_wsgi(app: WSGIApplication, environ: WSGIEnvironment) -> Answer:
    """The answer of a WSGI application."""
    return WsgiServer().run(app, environ)


# -- ASGI --------------------------------------------------------------------------------------------------------------


def asgi_app(endpoint: Endpoint) -> asgi.App:
    """The endpoint as an ASGI application."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with contextlib.aclosing(endpoint()) as parts:
            async for part in parts:
                if isinstance(part, int):
                    await send({"type": "http.response.start", "status": part, "headers": []})
                else:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})

    return app


def http_scope(method: str = "GET", path: str = "/") -> dict[str, Any]:
    """What an ASGI server tells of a request."""
    return {"type": "http", "asgi": {"version": "3.0"}, "method": method, "path": path, "headers": [], "root_path": ""}


async def call_asgi(app: asgi.App, scope: dict[str, Any]) -> Answer:
    """The answer of an ASGI application."""
    answer, started = Answer(), False

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal started
        if message["type"] == "http.response.start":
            assert not started, "the response was started twice"
            started = True
            answer.status = message["status"]
        else:
            assert started, "the response was not started"
            answer.chunks += [message["body"]] if message.get("body") else []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b""}

    try:
        await app(scope, receive, send)
        assert started, "no response was started"
    except Exception as error:
        answer.error = error
    return answer


# -- real servers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_asgi(app: asgi.App, *, ws: Any = "none") -> Iterator[int]:
    """Serve an ASGI application on uvicorn, in a thread; gives the port. `ws` is its implementation of websockets."""
    uvicorn = needs.module("uvicorn", extra="demo")
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws=ws)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="uvicorn")
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(LIMIT)
        assert not thread.is_alive(), "the server hangs"


@contextlib.contextmanager
def serve_waitress(app: WSGIApplication) -> Iterator[int]:
    """Serve a WSGI application on waitress, in threads; gives the port."""
    waitress = needs.module("waitress", extra="demo")
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=4)
    thread = threading.Thread(target=server.run, name="waitress")
    thread.start()
    try:
        yield server.effective_port
    finally:
        server.trigger.pull_trigger(server.close)
        server.task_dispatcher.shutdown()
        thread.join(LIMIT)
        assert not thread.is_alive(), "the server hangs"


@contextlib.contextmanager
def serve_wsgiref(app: WSGIApplication) -> Iterator[int]:
    """Serve a WSGI application on the standard library's server, a thread for each request; gives the port."""
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Server(ThreadingMixIn, WSGIServer):
        pass

    class Handler(WSGIRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def get_stderr(self) -> Any:
            return Discard()

    with Server(("127.0.0.1", 0), Handler) as server:
        server.set_app(app)
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), name="wsgiref")
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(LIMIT)


class Discard:
    """A file that keeps nothing: where servers print the tracebacks that a test provokes."""

    def write(self, text: str) -> int:
        """Keep nothing."""
        return len(text)

    def flush(self) -> None:
        """Nothing to do."""


def fetch(port: int, path: str = "/", *, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, bytes]:
    """The status and body of a request over HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=LIMIT)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def fetch_together(port: int, paths: Iterable[str], *, host: str = "127.0.0.1") -> dict[str, tuple[int, bytes]]:
    """POST to all paths at the same time, each in a thread; returns status and body of each."""
    answers: dict[str, tuple[int, bytes]] = {}

    def client(path: str) -> None:
        answers[path] = fetch(port, path, method="POST", host=host)

    threads = [threading.Thread(target=client, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    return answers


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until something outside of this thread's reach has happened."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.005)
