"""The rows about requests: WSGI and ASGI applications in this process, without a server or a framework."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.measure import Contender, Row
from benchmarks.rows import BALANCE, Place, Server, on_sqlite
from dbscope.integrations import asgi, wsgi

HEADERS = [("Content-Type", "text/plain")]
ENVIRON = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/accounts/1", "QUERY_STRING": ""}
SCOPE = {"type": "http", "method": "GET", "path": "/accounts/1", "root_path": "", "headers": []}


def request(endpoint: Any) -> Any:
    """A WSGI application around an endpoint that returns a balance."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = b"%d" % endpoint()
        start_response("200 OK", HEADERS)
        return [body]

    return app


def arequest(endpoint: Any) -> Any:
    """An ASGI application around a coroutine function that returns a balance."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b"%d" % await endpoint()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
    """A server's, which has nothing to do."""


async def send(message: Any) -> None:
    """A server's, which has nothing to do."""


COMMON = {
    "environ": ENVIRON.copy,
    "http": SCOPE.copy,
    "send": send,
    "start_response": start_response,
}


@contextmanager
def on_wsgi() -> Iterator[dict[str, Any]]:
    """An endpoint that uses a sync session, behind the middleware and by hand; and one that uses none."""
    with on_sqlite() as names:
        db, engine, session_of = names["db"], names["engine"], names["Session"]

        def by_scope() -> Any:
            return db.session.scalar(BALANCE)

        def by_hand() -> Any:
            with session_of(engine) as session:
                return session.scalar(BALANCE)

        def in_thread(function: Any) -> Any:
            return arequest(lambda: asyncio.to_thread(function))

        yield COMMON | {
            "app": wsgi.ScopeMiddleware(request(by_scope)),
            "raw": request(by_hand),
            "thread_app": asgi.ScopeMiddleware(in_thread(by_scope)),
            "thread_raw": in_thread(by_hand),
        }


@contextmanager
def without_database() -> Iterator[dict[str, Any]]:
    """Endpoints that use no database."""

    async def seven() -> int:
        return 7

    plain, aplain = request(lambda: 7), arequest(seven)
    yield COMMON | {
        "app": wsgi.ScopeMiddleware(plain),
        "raw": plain,
        "aapp": asgi.ScopeMiddleware(aplain),
        "araw": aplain,
    }


def web_rows(server: Server) -> list[tuple[Row, Place]]:
    """All rows about requests, each with what makes the names that its code uses."""

    @contextmanager
    def on_asgi() -> Iterator[dict[str, Any]]:
        with server.asynchronous() as names:
            db, engine, session_of = names["adb"], names["aengine"], names["AsyncSession"]

            async def by_scope() -> Any:
                return await db.session.scalar(BALANCE)

            async def by_hand() -> Any:
                async with session_of(engine) as session:
                    return await session.scalar(BALANCE)

            yield COMMON | {
                "app": asgi.ScopeMiddleware(arequest(by_scope)),
                "dispose": names["dispose"],
                "raw": arequest(by_hand),
            }

    return [
        (
            Row(
                "WSGI endpoint with a SELECT, SQLite",
                [
                    Contender("dbscope", "app(environ(), start_response)", "start of the response: rolls back"),
                    Contender("with Session", "raw(environ(), start_response)", "close: rolls back"),
                ],
                1.04,
                sql=True,
            ),
            on_wsgi,
        ),
        (
            Row(
                "ASGI endpoint with a SELECT, PostgreSQL",
                [
                    Contender(
                        "dbscope",
                        "await app(http(), None, send)",
                        "start of the response: rolls back; a cancelled end gives back all",
                        is_async=True,
                    ),
                    Contender(
                        "async with AsyncSession",
                        "await raw(http(), None, send)",
                        "close, shielded once: rolls back",
                        is_async=True,
                    ),
                ],
                1.0,
                sql=True,
                waits=True,
            ),
            on_asgi,
        ),
        (
            Row(
                "ASGI endpoint in a worker thread with a SELECT, SQLite",
                [
                    Contender(
                        "dbscope",
                        "await thread_app(http(), None, send)",
                        "start of the response: rolls back, off the loop",
                        is_async=True,
                    ),
                    Contender(
                        "with Session", "await thread_raw(http(), None, send)", "close: rolls back", is_async=True
                    ),
                ],
                1.15,
                sql=True,
                waits=True,
            ),
            on_wsgi,
        ),
        (
            Row(
                "installed, a WSGI endpoint without database",
                [
                    Contender("dbscope", "app(environ(), start_response)", "nothing"),
                    Contender("without", "raw(environ(), start_response)", "nothing"),
                ],
                1.5,
                adds=True,
            ),
            without_database,
        ),
        (
            Row(
                "installed, an ASGI endpoint without database",
                [
                    Contender("dbscope", "await aapp(http(), None, send)", "nothing", is_async=True),
                    Contender("without", "await araw(http(), None, send)", "nothing", is_async=True),
                ],
                2.5,
                adds=True,
            ),
            without_database,
        ),
    ]
