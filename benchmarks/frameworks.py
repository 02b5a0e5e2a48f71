"""The rows about frameworks: the same endpoint with dbscope, with the other libraries, and by hand.

Applications are called in this process, without a server and without an HTTP client. Each contender has to answer
right once before it is measured: one that fails fast would look quick.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import Any

from sqlalchemy.orm import Session

from benchmarks import peers
from benchmarks.measure import Contender, Row, needs
from benchmarks.rows import BALANCE, Place, Server, on_sqlite
from dbscope.integrations import asgi

Names = dict[str, Any]
BALANCE_OF = "/accounts/1"  # an endpoint with one SELECT
SEVEN = "/seven"  # an endpoint that uses no database
ANSWERS = {BALANCE_OF: b"100", SEVEN: b"7"}

# -- a server, which has nothing to do ---------------------------------------------------------------------------------

ENVIRON = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "QUERY_STRING": "",
    "SERVER_NAME": "bank.example",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "HTTP_HOST": "bank.example",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.input": BytesIO(),
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
}
SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.4"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "root_path": "",
    "query_string": b"",
    "headers": [(b"host", b"bank.example")],
    "client": ("192.0.2.1", 1024),
    "server": ("bank.example", 80),
}


def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
    """A server's."""


async def receive() -> Any:
    """A server's: the whole of a request without a body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Any) -> None:
    """A server's."""


def serve(app: Any, environ: Any) -> None:
    """Answer a request as a WSGI server does: to the end of the response, which is closed."""
    body = app(environ, start_response)
    for _ in body:
        pass
    body.close()


def get(path: str) -> Any:
    """The environment of a WSGI request."""
    return ENVIRON | {"PATH_INFO": path}


def aget(path: str) -> Any:
    """The connection scope of an ASGI request."""
    return SCOPE | {"path": path, "raw_path": path.encode()}


def check(app: Any, path: str) -> None:
    """Raise unless a WSGI application gives the right answer."""
    statuses: list[str] = []
    body = app(get(path), lambda status, headers, exc_info=None: statuses.append(status))
    right(path, statuses[-1][:3], b"".join(body))
    body.close()


async def acheck(app: Any, path: str) -> None:
    """Raise unless an ASGI application gives the right answer."""
    messages: list[Any] = []

    async def keep(message: Any) -> None:
        messages.append(message)

    await app(aget(path), receive, keep)
    right(path, str(messages[0]["status"]), b"".join(one.get("body", b"") for one in messages))


def right(path: str, status: str, body: bytes) -> None:
    if (status, body) != ("200", ANSWERS[path]):
        raise AssertionError(f"{path} was answered with {status} {body!r}")


# -- the same application, many times ----------------------------------------------------------------------------------


def flask(app: Any, balance: Callable[[], Any]) -> Any:
    """Give a Flask application its endpoints; the view of the one is `balance`."""
    app.add_url_rule(BALANCE_OF, "balance", lambda: str(balance()))
    app.add_url_rule(SEVEN, "seven", lambda: "7")
    return app


def flask_dbscope(names: Names) -> Any:
    from flask import Flask

    from dbscope.integrations.flask import Scopes

    app, db = Flask("bank"), names["db"]
    Scopes(app)
    return flask(app, lambda: db.session.scalar(BALANCE))


def flask_sqlalchemy(names: Names) -> Any:
    app, database = peers.flask_sqlalchemy(names["path"])
    return flask(app, lambda: database.session.scalar(BALANCE))


def flask_sqlalchemy_lite(names: Names) -> Any:
    app, database = peers.flask_sqlalchemy_lite(names["path"])
    return flask(app, lambda: database.session.scalar(BALANCE))


def flask_advanced_alchemy(names: Names) -> Any:
    app, alchemy = peers.advanced_alchemy_flask(names["engine"])
    return flask(app, lambda: alchemy.get_sync_session().scalar(BALANCE))


def flask_raw(names: Names) -> Any:
    from flask import Flask

    engine = names["engine"]

    def balance() -> Any:
        with Session(engine) as session:
            return session.scalar(BALANCE)

    return flask(Flask("bank"), balance)


def fastapi(app: Any, balance: Callable[..., Any]) -> Any:
    """Give a FastAPI application its endpoints, of which `balance` is one."""

    async def seven() -> int:
        return 7

    app.add_api_route(BALANCE_OF, balance)
    app.add_api_route(SEVEN, seven)
    return app


def async_dbscope(names: Names) -> Any:
    from fastapi import FastAPI

    app, session = FastAPI(), names["asession"]
    app.add_middleware(asgi.ScopeMiddleware)

    async def balance() -> int:
        return await session.scalar(BALANCE)

    return fastapi(app, balance)


def async_dependency(names: Names) -> Any:
    from fastapi import Depends, FastAPI

    engine, session_of = names["aengine"], names["AsyncSession"]

    async def own() -> Any:
        async with session_of(engine) as session:
            yield session

    async def balance(session: Any = Depends(own)) -> int:  # noqa: B008
        return await session.scalar(BALANCE)

    return fastapi(FastAPI(), balance)


def async_advanced_alchemy(names: Names) -> Any:
    from fastapi import Request

    app, alchemy = peers.advanced_alchemy_fastapi(names["aengine"])

    async def balance(request: Request) -> int:
        return await alchemy.get_async_session(request).scalar(BALANCE)

    return fastapi(app, balance)


def async_advanced_alchemy_depends(names: Names) -> Any:
    from fastapi import Depends

    app, alchemy = peers.advanced_alchemy_fastapi(names["aengine"])

    async def balance(session: Any = Depends(alchemy.provide_async_session())) -> int:  # noqa: B008
        return await session.scalar(BALANCE)

    return fastapi(app, balance)


def async_raw(names: Names) -> Any:
    from fastapi import FastAPI

    engine, session_of = names["aengine"], names["AsyncSession"]

    async def balance() -> int:
        async with session_of(engine) as session:
            return await session.scalar(BALANCE)

    return fastapi(FastAPI(), balance)


def thread_dbscope(names: Names) -> Any:
    from fastapi import FastAPI

    app, db = FastAPI(), names["db"]
    app.add_middleware(asgi.ScopeMiddleware)

    def balance() -> int:
        return db.session.scalar(BALANCE)

    return fastapi(app, balance)


def thread_dependency(names: Names) -> Any:
    from fastapi import Depends, FastAPI

    engine = names["engine"]

    def own() -> Any:
        with Session(engine) as session:
            yield session

    def balance(session: Any = Depends(own)) -> int:  # noqa: B008
        return session.scalar(BALANCE)

    return fastapi(FastAPI(), balance)


def thread_fastapi_sqlalchemy(names: Names) -> Any:
    from fastapi import FastAPI
    from fastapi_sqlalchemy import DBSessionMiddleware, db

    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, custom_engine=names["engine"])

    def balance() -> int:
        return db.session.scalar(BALANCE)

    return fastapi(app, balance)


def thread_advanced_alchemy(names: Names) -> Any:
    from fastapi import Request

    app, alchemy = peers.advanced_alchemy_fastapi(names["engine"])

    def balance(request: Request) -> int:
        return alchemy.get_sync_session(request).scalar(BALANCE)

    return fastapi(app, balance)


def thread_raw(names: Names) -> Any:
    from fastapi import FastAPI

    engine = names["engine"]

    def balance() -> int:
        with Session(engine) as session:
            return session.scalar(BALANCE)

    return fastapi(FastAPI(), balance)


# -- the rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One way to write the application; what it does at the end of a request with a SELECT, and of one without."""

    name: str
    make: Callable[[Names], Any]
    ends: str
    idle: str = "nothing"
    needs: tuple[str, ...] = ()


ON_FLASK = [
    Entry("dbscope", flask_dbscope, "start of the response: rolls back"),
    Entry(
        "Flask-SQLAlchemy",
        flask_sqlalchemy,
        "teardown: close: rolls back",
        "teardown: looks for a session",
        ("flask_sqlalchemy",),
    ),
    Entry(
        "Flask-SQLAlchemy-Lite",
        flask_sqlalchemy_lite,
        "teardown, and an event loop for its async half: close: rolls back",
        "teardown, and an event loop for its async half: looks for sessions",
        ("flask_sqlalchemy_lite",),
    ),
    Entry(
        "Advanced Alchemy",
        flask_advanced_alchemy,
        "teardown: close: rolls back",
        "teardown: looks for sessions",
        ("advanced_alchemy",),
    ),
    Entry("with Session", flask_raw, "close, in the endpoint: rolls back"),
]
ON_ASYNC_FASTAPI = [
    Entry("dbscope", async_dbscope, "start of the response: rolls back; a cancelled end gives back all"),
    Entry("yield dependency", async_dependency, "after the response: close, shielded once: rolls back"),
    Entry(
        "Advanced Alchemy",
        async_advanced_alchemy,
        "after the response: rollback, close; an error there is logged at DEBUG",
        needs=("advanced_alchemy",),
    ),
    Entry(
        "Advanced Alchemy, Depends",
        async_advanced_alchemy_depends,
        "the same; its dependency runs in a thread",
        needs=("advanced_alchemy",),
    ),
    Entry("async with AsyncSession", async_raw, "close, shielded once, in the endpoint: rolls back"),
]
ON_THREADED_FASTAPI = [
    Entry("dbscope", thread_dbscope, "start of the response: rolls back, off the loop"),
    Entry("yield dependency", thread_dependency, "after the response: close, off the loop: rolls back"),
    Entry(
        "fastapi-sqlalchemy",
        thread_fastapi_sqlalchemy,
        "start of the response: close, on the loop: rolls back",
        "start of the response: close of a session that nobody asked for",
        ("fastapi_sqlalchemy",),
    ),
    Entry(
        "Advanced Alchemy",
        thread_advanced_alchemy,
        "after the response: rollback, close, each off the loop; an error there is logged at DEBUG",
        "after the response: looks for a session",
        ("advanced_alchemy",),
    ),
    Entry("with Session", thread_raw, "close, in the endpoint: rolls back"),
]
# A dependency costs nothing where it is not asked for; and without a session, by hand is without anything.
FLASK_INSTALLED = [*ON_FLASK[:-1], Entry("without", flask_raw, "")]
FASTAPI_INSTALLED = [
    *(one for one in ON_THREADED_FASTAPI[:-1] if one.make is not thread_dependency),
    Entry("without", thread_raw, ""),
]


def wsgi_contenders(entries: list[Entry], path: str) -> list[Contender]:
    """Requests for `path` of WSGI applications."""
    return [
        Contender(
            one.name,
            "serve(app, request.copy())",
            one.ends if path == BALANCE_OF else one.idle,
            f"global app, request\napp, request = {one.make.__name__}(names), get({path!r})\ncheck(app, {path!r})",
            needs=one.needs,
        )
        for one in entries
    ]


def asgi_contenders(entries: list[Entry], path: str) -> list[Contender]:
    """Requests for `path` of ASGI applications."""
    return [
        Contender(
            one.name,
            "await app(request.copy(), receive, send)",
            one.ends if path == BALANCE_OF else one.idle,
            f"global app, request\napp, request = {one.make.__name__}(names), aget({path!r})\n"
            f"await acheck(app, {path!r})",
            is_async=True,
            needs=one.needs,
        )
        for one in entries
    ]


def versions(*packages: str) -> str:
    """What was compared, for the row's note."""
    found = []
    for package in packages:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def framework_rows(server: Server) -> list[tuple[Row, Place]]:
    """All rows about frameworks, each with what makes the names that its code uses."""

    def served(database: Place, *modules: str) -> Place:
        """The names of a database and of the server, for contenders that make their application themselves."""

        @contextmanager
        def place() -> Iterator[Names]:
            needs(*modules)
            with database() as names:
                yield names | globals() | {"names": names}

        return place

    on_flask = versions("Flask", "Flask-SQLAlchemy", "Flask-SQLAlchemy-Lite", "advanced-alchemy")
    on_fastapi = versions("fastapi", "starlette", "fastapi-sqlalchemy", "advanced-alchemy")
    return [
        (
            Row(
                "Flask endpoint with a SELECT, SQLite",
                wsgi_contenders(ON_FLASK, BALANCE_OF),
                1.04,
                sql=True,
                threads=True,
                note=on_flask,
            ),
            served(on_sqlite, "flask"),
        ),
        (
            Row(
                "FastAPI `async def` endpoint with a SELECT, PostgreSQL",
                asgi_contenders(ON_ASYNC_FASTAPI, BALANCE_OF),
                1.0,
                sql=True,
                waits=True,
                note=on_fastapi,
            ),
            served(server.asynchronous, "fastapi"),
        ),
        (
            Row(
                "FastAPI `def` endpoint with a SELECT, SQLite",
                asgi_contenders(ON_THREADED_FASTAPI, BALANCE_OF),
                1.15,
                sql=True,
                threads=True,
                note=on_fastapi,
            ),
            served(on_sqlite, "fastapi"),
        ),
        (
            Row(
                "installed, a Flask endpoint without database",
                wsgi_contenders(FLASK_INSTALLED, SEVEN),
                1.5,
                adds=True,
                threads=True,
                note=on_flask,
            ),
            served(on_sqlite, "flask"),
        ),
        (
            Row(
                "installed, a FastAPI endpoint without database",
                asgi_contenders(FASTAPI_INSTALLED, SEVEN),
                2.5,
                adds=True,
                note=on_fastapi,
            ),
            served(on_sqlite, "fastapi"),
        ),
    ]
