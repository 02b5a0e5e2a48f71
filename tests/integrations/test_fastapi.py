"""Starlette and FastAPI: the middleware, `Depends(db.session)`, and what runs beside and after an endpoint."""

import asyncio
import contextlib
import functools
import http.client
import inspect
import json
import threading
from collections.abc import AsyncIterable
from importlib import metadata
from typing import Annotated, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from dbscope import ConfigurationError, NoScopeError, ScopeEndedError, ScopeMisuseError, current_scope, scope
from dbscope.conformance import Conformance, Outcome
from dbscope.integrations.asgi import ScopeMiddleware
from tests.support import needs
from tests.support.kits import LIMIT, Account, Payment, SyncKit, make_kit
from tests.support.web import fetch, fetch_together, serve_asgi, wait_for

fastapi: Any = needs.module("fastapi", extra="fastapi")
starlette: Any = needs.module("starlette.applications", extra="starlette")
responses: Any = needs.module("starlette.responses", extra="starlette")
base: Any = needs.module("starlette.middleware.base", extra="starlette")
routing: Any = needs.module("starlette.routing", extra="starlette")
httpx: Any = needs.module("httpx", extra="demo")
aio: Any = needs.module("sqlalchemy.ext.asyncio", extra="async")
sqlmodel: Any = needs.module("sqlmodel", extra="fastapi")
asyncs: Any = needs.module("sqlmodel.ext.asyncio.session", extra="fastapi")
needs.module("aiosqlite", extra="aiosqlite")


class Hero(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str


@pytest.fixture(params=["sync", "async"])
def any_kit(request, tmp_path):
    """A kit of each colour, whose database an application on a server's loop uses."""
    kit = make_kit(request.param, f"sqlite:///{tmp_path / 'test.db'}")
    assert kit.db
    yield kit
    close(kit)


@pytest.fixture
def kits(tmp_path):
    """A kit of each colour at once, on a file each."""
    both = [make_kit(colour, f"sqlite:///{tmp_path / colour}.db") for colour in ("sync", "async")]
    assert all(kit.db for kit in both)
    yield both
    for kit in both:
        close(kit)


def close(kit):
    """Dispose of what a server's loop has left in the pool."""
    if isinstance(kit, SyncKit):
        kit.close()
    else:
        asyncio.run(kit.aclose())


def new_app(**options):
    """An application with the middleware."""
    app = fastapi.FastAPI()
    app.add_middleware(ScopeMiddleware, **options)
    return app


async def ask(app, path, *, method="GET", raising=True):
    """An answer in process."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=raising)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        return await client.request(method, path)


def asked(kit, app, *paths, raising=True):
    """Answers in process, and what the async database has left in its pool closed on their loop."""

    async def main():
        try:
            return [await ask(app, path, raising=raising) for path in paths]
        finally:
            await kit.done(kit.db.dispose())

    return asyncio.run(main())


# -- Depends(db.session) -----------------------------------------------------------------------------------------------


async def test_depends_gives_the_scopes_session_without_a_thread(async_kit, tmp_path):
    """The very one that `db.session()` finds, of both colours, asked for on the loop; nothing is added to the query."""
    sync = SyncKit(f"sqlite:///{tmp_path / 'sync.db'}")
    asked_in = []

    class Noting(Session):
        def __init__(self, *args, **options):
            asked_in.append(threading.current_thread())
            super().__init__(*args, **options)

    db = sync.database(session_class=Noting)
    app = new_app()

    @app.get("/sync")
    def plain(session: Annotated[Session, fastapi.Depends(db.session)]):
        assert isinstance(session, Noting)
        assert session is db.session()
        return [session.scalar(text("SELECT 1")), threading.current_thread() is threading.main_thread()]

    @app.get("/async")
    async def coroutine(
        session: Annotated[aio.AsyncSession, fastapi.Depends(async_kit.db.session)],
        other: Annotated[Session, fastapi.Depends(db.session)],
    ):
        assert session is async_kit.session()
        assert other is db.session()
        return [await session.scalar(text("SELECT 1")), threading.current_thread() is threading.main_thread()]

    assert (await ask(app, "/sync?kw=1")).json() == [1, False]
    assert (await ask(app, "/async")).json() == [1, True]
    assert asked_in == [threading.main_thread()] * 2
    assert ["parameters" in at["get"] for at in app.openapi()["paths"].values()] == [False, False]
    sync.close()


async def test_failures_21_depends_asks_for_no_thread(sync_kit):
    """It does not wait where all threads are busy, perhaps waiting for the connection that this request holds."""
    app = new_app()
    anyio: Any = needs.module("anyio", extra="fastapi")

    @app.get("/")
    async def endpoint(session: Annotated[Session, fastapi.Depends(sync_kit.db.session)]):
        return session.scalar(text("SELECT 1"))

    limiter = anyio.to_thread.current_default_thread_limiter()
    borrowers = [object() for _ in range(int(limiter.total_tokens))]
    for borrower in borrowers:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        assert (await asyncio.wait_for(ask(app, "/"), LIMIT)).json() == 1
    finally:
        for borrower in borrowers:
            limiter.release_on_behalf_of(borrower)


async def test_depends_can_be_overridden(sync_kit):
    """As FastAPI's tests do, by the very object that stands in `Depends`."""
    app = new_app()

    @app.get("/")
    async def endpoint(session: Annotated[Any, fastapi.Depends(sync_kit.db.session)]):
        return session

    app.dependency_overrides[sync_kit.db.session] = lambda: "another"
    assert (await ask(app, "/")).json() == "another"


async def test_failures_22_two_requests_on_one_thread_have_two_sessions(sync_kit):
    """Sync sessions on the loop: what one request has pending is neither seen nor rolled back by the other."""
    app, both = new_app(commit="on-success"), asyncio.Barrier(2)
    seen = []

    @app.post("/{status}")
    async def endpoint(status: int, session: Annotated[Session, fastapi.Depends(sync_kit.db.session)]):
        session.add(Payment(amount=status))
        await both.wait()
        seen.append((session, threading.current_thread(), [payment.amount for payment in session.new]))
        return responses.Response(status_code=status)

    await asyncio.gather(*(ask(app, f"/{status}", method="POST") for status in (200, 409)))
    (one, thread, _), (other, same_thread, _) = seen
    assert one is not other
    assert thread is same_thread
    assert sorted(pending for _, _, pending in seen) == [[200], [409]]
    assert sync_kit.amounts() == [200]


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_failures_22_without_the_middleware_the_error_names_it(tmp_path, colour):
    """No session of the loop's thread is handed to whichever request comes."""
    kit = make_kit(colour, f"sqlite:///{tmp_path / 'x.db'}")
    app = fastapi.FastAPI()

    @app.get("/")
    async def endpoint(session: Annotated[Any, fastapi.Depends(kit.db.session)]): ...

    with pytest.raises(NoScopeError, match=r"outside of every scope.*\n.*dbscope\.integrations\.asgi\.ScopeMiddleware"):
        asked(kit, app, "/")


def test_a_sync_generator_dependency_that_opens_a_scope_is_told(sync_kit):
    """FastAPI runs its halves in threads of their own: the error names the middleware."""
    app = fastapi.FastAPI()

    def opened():
        with scope("request"):
            yield

    @app.get("/", dependencies=[fastapi.Depends(opened)])
    async def endpoint(): ...

    with pytest.raises(ScopeMisuseError, match=r"integrations\.asgi\.ScopeMiddleware"):
        asked(sync_kit, app, "/")


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_sqlmodel(tmp_path, colour):
    """Its own session class comes out of `Depends`, with its `exec`, and its models are answers."""
    kit = make_kit(colour, f"sqlite:///{tmp_path / 'x.db'}")
    session_class = sqlmodel.Session if colour == "sync" else asyncs.AsyncSession
    db = kit.database(session_class=session_class)

    Hero.__table__.create(kit.outside)
    app = new_app(commit="on-success")
    given = Annotated[session_class, fastapi.Depends(db.session)]

    @app.get("/write")
    async def write(session: given) -> Hero:
        assert isinstance(session, session_class)
        hero = Hero(name="Deadpond")
        session.add(hero)
        await kit.done(session.flush())
        return hero

    @app.get("/read")
    async def read(session: given) -> list[Hero]:
        return list((await kit.done(session.exec(sqlmodel.select(Hero)))).all())

    write_answer, read_answer = asked(kit, app, "/write", "/read")
    assert write_answer.json() == {"id": 1, "name": "Deadpond"}
    assert read_answer.json() == [write_answer.json()]


# -- a real server: both colours in one application --------------------------------------------------------------------


def test_on_uvicorn(kits):
    """Sync and async endpoints side by side: each request commits its own work, failures are 500s, nothing is left."""
    sync, asynchronous = kits
    app = new_app(commit="on-success")

    @app.post("/sync/{amount}")
    def plain(amount: int, session: Annotated[Session, fastapi.Depends(sync.db.session)]):
        session.add(Payment(amount=amount))
        session.flush()
        return current_scope().name

    @app.post("/async/{amount}")
    async def coroutine(amount: int, session: Annotated[Any, fastapi.Depends(asynchronous.db.session)]):
        session.add(Payment(amount=amount))
        await session.flush()
        if amount == 9:
            raise ZeroDivisionError
        return current_scope().name

    @app.post("/refused")
    def refused(session: Annotated[Session, fastapi.Depends(sync.db.session)]):
        session.add(Payment(amount=99))
        session.flush()
        raise fastapi.HTTPException(409)

    @app.post("/same/{kind}")
    async def same(kind: str):
        (sync if kind == "sync" else asynchronous).session().add_all([Account(name="same"), Account(name="same")])
        return "saved"

    @app.post("/held")
    async def held():
        return [kit.checked_out() for kit in kits]

    with serve_asgi(app) as port:
        paths = [f"/{kind}/{number}" for kind in ("sync", "async") for number in range(10)]
        failing = ["/same/sync", "/same/async", "/refused"]
        answers = fetch_together(port, [*paths, *failing])
        assert json.loads(fetch(port, "/held", method="POST")[1]) == [0, 0]
    assert {path: status for path, (status, _) in answers.items() if status != 200} == {
        "/async/9": 500,
        "/same/sync": 500,
        "/same/async": 500,
        "/refused": 409,
    }
    assert json.loads(answers["/sync/3"][1]) == "POST /sync/{amount}"
    assert json.loads(answers["/async/3"][1]) == "POST /async/{amount}"
    assert sync.amounts() == list(range(10))
    assert asynchronous.amounts() == list(range(9))
    assert sync.count(Account) == asynchronous.count(Account) == 0


def test_failures_5_a_failed_commit_is_for_the_applications_error_handler(any_kit):
    """The handler for `Exception` answers it, and the view's own answer is never sent."""
    app = new_app(commit="on-success")

    @app.get("/")
    async def endpoint():
        any_kit.session().add_all([Account(name="same"), Account(name="same")])
        return "saved"

    @app.exception_handler(Exception)
    async def failed(request, error):
        return responses.PlainTextResponse(f"not saved: {type(error).__name__}", 500)

    (answer,) = asked(any_kit, app, "/", raising=False)
    assert (answer.status_code, answer.text, any_kit.count(Account)) == (500, "not saved: IntegrityError", 0)


def test_failures_5_a_dependency_that_commits_after_the_response_finds_nothing_to_do(any_kit):
    """As templates have it, after `yield`: the request was committed before, and its clean-up is harmless."""
    app = new_app(commit="on-success")
    order = []

    async def dependency():
        session = any_kit.session()
        yield session
        order.append(any_kit.count())
        await any_kit.done(session.commit())
        await any_kit.done(session.close())

    @app.get("/")
    async def endpoint(session: Annotated[Any, fastapi.Depends(dependency)]):
        session.add(Payment())
        order.append(any_kit.count())

    (answer,) = asked(any_kit, app, "/")
    assert (answer.status_code, order) == (200, [0, 1])


# -- streams, background tasks, websockets -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["StreamingResponse", "generator endpoint"])
def test_failures_3_server_sent_events_hold_no_connection(any_kit, kind):
    """With a pool of one and two streams open, a third request answers; each event opens a scope of its own."""
    app = new_app(commit="on-success")
    small = any_kit.database(
        f"{any_kit.drivers['sqlite']}:///{any_kit.url.database}.small", pool_size=1, max_overflow=0, pool_timeout=0.5
    )
    go_on: list[asyncio.Event] = []

    def one_in_a_thread():
        with scope("event"):
            return small.session.scalar(text("SELECT 1"))

    async def one():
        if any_kit.colour == "sync":  # waiting for a connection on the loop would stop whoever holds it
            return await asyncio.to_thread(one_in_a_thread)
        async with scope("event"):
            return await small.session.scalar(text("SELECT 1"))

    async def events() -> AsyncIterable[str]:
        yield f"data: {await one()}\n\n"
        go_on.append(asyncio.Event())
        await go_on[-1].wait()
        with pytest.raises(ScopeEndedError, match="ended with the start of its response"):
            small.session()
        yield f"data: {await one()}\n\n"

    if kind == "StreamingResponse":

        @app.get("/events")
        async def stream(session: Annotated[Any, fastapi.Depends(small.session)]):
            await any_kit.done(session.scalar(text("SELECT 1")))
            return responses.StreamingResponse(events(), media_type="text/event-stream")

    else:

        @app.get("/events")
        async def generated(session: Annotated[Any, fastapi.Depends(small.session)]) -> AsyncIterable[str]:
            async for event in events():
                yield event

    @app.get("/third")
    async def third(session: Annotated[Any, fastapi.Depends(small.session)]):
        for event in go_on:
            event.set()
        return await any_kit.done(session.scalar(text("SELECT 1")))

    @app.get("/dispose")
    async def dispose():
        await any_kit.done(small.dispose())

    with serve_asgi(app) as port:
        clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT) for _ in range(2)]
        streams = []
        for client in clients:
            client.request("GET", "/events")
            streams.append(client.getresponse())
            assert b"data: 1" in streams[-1].readline()
        wait_for(lambda: len(go_on) == 2)
        assert fetch(port, "/third") == (200, b"1")
        assert [stream.read().count(b"data: 1") for stream in streams] == [1, 1]
        for client in clients:
            client.close()
        assert fetch(port, "/dispose")[0] == 200


def test_failures_9_background_tasks_open_their_own_scope(any_kit):
    """They find what the request has committed; with the request's session or object they are told whose it was."""
    app = new_app(commit="on-success")
    told, found = [], []
    done = threading.Event()

    async def receipt(id, session, payment):
        async with scope(f"receipt {id}"):
            mine = await any_kit.done(any_kit.session().get_one(Payment, id))
            found.append(mine.amount)
        for use in (lambda: any_kit.db.session(), lambda: session.scalars(select(Payment))):
            with pytest.raises(ScopeEndedError) as error:
                await any_kit.done(use())
            told.append(str(error.value))
        done.set()

    @app.post("/orders")
    async def order(
        tasks: fastapi.BackgroundTasks, session: Annotated[Any, fastapi.Depends(any_kit.db.session)]
    ):  # fmt: skip
        payment = Payment(amount=7)
        session.add(payment)
        await any_kit.done(session.flush())
        tasks.add_task(receipt, payment.id, session, payment)
        return "accepted"

    with serve_asgi(app) as port:
        assert fetch(port, "/orders", method="POST")[0] == 200
        assert done.wait(LIMIT)
    assert found == [7]
    for story in told:
        assert "scope 'POST /orders'" in story


def test_failures_9_a_websocket_opens_a_scope_for_each_message(any_kit):
    """Between its messages it holds no connection; one that asks for a session without is told what to open."""
    client: Any = needs.module("websockets.sync.client", extra="fastapi")
    app = new_app(commit="on-success")
    told = []

    @app.websocket("/payments")
    async def payments(socket: fastapi.WebSocket):
        await socket.accept()
        try:
            any_kit.db.session()
        except NoScopeError as error:
            told.append(str(error))
        async for message in socket.iter_text():
            async with scope(f"payment of {message}", commit="on-success"):
                any_kit.session().add(Payment(amount=int(message)))
            await socket.send_json([any_kit.count(), any_kit.checked_out()])

    @app.websocket("/depends")
    async def depends(socket: fastapi.WebSocket, session: Annotated[Any, fastapi.Depends(any_kit.db.session)]): ...

    with serve_asgi(app, ws="websockets-sansio") as port:
        with client.connect(f"ws://127.0.0.1:{port}/payments") as socket:
            for number in (1, 2):
                socket.send(str(number))
                assert json.loads(socket.recv(LIMIT)) == [number, 0]
        with pytest.raises(Exception, match="HTTP 500"):
            client.connect(f"ws://127.0.0.1:{port}/depends")
    assert "`async with scope(): ...`, for each message of a websocket" in told[0]
    assert any_kit.amounts() == [1, 2]


# -- other middlewares, and applications in applications ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["outside", "inside", "both"])
def test_failures_24_base_http_middleware(any_kit, place):
    """Outside and inside: the endpoint has its scope and commits; inside, its dispatch has the same session."""
    dispatched: list[Any] = []

    async def dispatch(request, call_next):
        work = current_scope()
        dispatched.append(work and any_kit.session())
        response = await call_next(request)
        dispatched.append(work)
        return response

    app = fastapi.FastAPI()
    if place != "outside":
        app.add_middleware(base.BaseHTTPMiddleware, dispatch=dispatch)
    app.add_middleware(ScopeMiddleware, commit="on-success")
    if place != "inside":
        app.add_middleware(base.BaseHTTPMiddleware, dispatch=dispatch)
    seen = []

    @app.post("/{amount}")
    async def endpoint(amount: int, session: Annotated[Any, fastapi.Depends(any_kit.db.session)]):
        seen.append((current_scope().name, session))
        session.add_all([Payment(amount=amount), *(Account(name="same") for _ in range(2 * (amount == 2)))])
        if amount == 3:
            raise ZeroDivisionError
        return any_kit.checked_out()

    with serve_asgi(app) as port:
        statuses = [fetch(port, f"/{amount}", method="POST")[0] for amount in (1, 2, 3)]
    assert statuses == [200, 500, 500]
    assert any_kit.amounts() == [1]
    assert [name for name, _ in seen] == ["POST /{amount}"] * 3
    if place == "inside":
        assert [each for each in dispatched if each in [session for _, session in seen]] == [s for _, s in seen]
    if place == "outside":
        assert set(dispatched) == {None}


def test_failures_24_a_middleware_outside_that_asks_for_a_session_is_told(any_kit):
    """It runs before the scope is opened: the error names the middleware that it has to be inside of."""
    app = new_app()

    async def dispatch(request, call_next):
        any_kit.db.session()

    app.add_middleware(base.BaseHTTPMiddleware, dispatch=dispatch)
    with pytest.raises(NoScopeError, match="ScopeMiddleware"):
        asked(any_kit, app, "/")


@pytest.mark.parametrize("own", [False, True])
def test_a_mounted_application_works_in_the_outer_scope(any_kit, own):
    """Named by the whole route; with a middleware of its own, for when it is served alone, it is still one scope."""
    app, sub = new_app(commit="on-success"), fastapi.FastAPI()
    if own:
        sub.add_middleware(ScopeMiddleware)
    seen = []

    @sub.get("/orders/{id}")
    async def order(id: int, session: Annotated[Any, fastapi.Depends(any_kit.db.session)]):
        seen.append((current_scope().name, current_scope().is_inside))
        session.add(Payment(amount=id))

    app.mount("/shop", sub)
    paths = ("/shop/orders/1", "/shop/orders/2")
    assert [answer.status_code for answer in asked(any_kit, app, *paths)] == [200, 200]
    assert seen == [("GET /shop/orders/{id}", False)] * 2
    assert any_kit.amounts() == [1, 2]


# -- Starlette by itself -----------------------------------------------------------------------------------------------


def test_starlette_on_uvicorn(any_kit):
    """Endpoints of both kinds, and background tasks, as with FastAPI."""
    names = []
    background: Any = needs.module("starlette.background", extra="starlette")

    async def later(id):
        async with scope("later", commit="on-success"):
            any_kit.session().add(Payment(amount=id))

    async def book(request):
        names.append(current_scope().name)
        any_kit.session().add(Payment(amount=int(request.path_params["amount"])))
        return responses.PlainTextResponse("booked", background=background.BackgroundTask(later, 99))

    def plain(request):
        names.append(current_scope().name)
        return responses.PlainTextResponse(str(any_kit.count()))

    app = starlette.Starlette(
        routes=[routing.Route("/book/{amount:int}", book, methods=["POST"]), routing.Route("/plain", plain)],
        middleware=[needs.module("starlette.middleware", extra="starlette").Middleware(ScopeMiddleware, "on-success")],
    )
    with serve_asgi(app) as port:
        assert fetch(port, "/book/7", method="POST") == (200, b"booked")
        wait_for(lambda: any_kit.count() == 2)
        assert fetch(port, "/plain") == (200, b"2")
    assert [name.partition(" ")[0] for name in names] == ["POST", "GET"]
    assert any_kit.amounts() == [7, 99]


# -- mistakes, at start-up ---------------------------------------------------------------------------------------------


def startup(app):
    """What a server is told when it starts an application: the messages, and the error that came out."""
    told = []

    async def main():
        sent = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive():
            return {"type": next(sent)}

        async def send(message):
            told.append(message)

        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    try:
        asyncio.run(main())
    except ConfigurationError as error:
        return told, error
    return told, None


def wrong_option():
    """An option that there is not."""
    app = fastapi.FastAPI()
    app.add_middleware(ScopeMiddleware, commit="always")
    return app


def veto_without_commit():
    """A veto that has nothing to say no to."""
    app = fastapi.FastAPI()
    app.add_middleware(ScopeMiddleware, veto=bool)
    return app


def installed_twice():
    """With another middleware between."""
    app = new_app()
    app.add_middleware(base.BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    app.add_middleware(ScopeMiddleware)
    return app


def installed_twice_out_of_sight():
    """With a function between, through which nothing can be seen: but the application knows what was added to it."""
    app = new_app()
    app.add_middleware(lambda inner: lambda *args: inner(*args))
    app.add_middleware(ScopeMiddleware)
    return app


MISTAKES = [
    (installed_twice_out_of_sight, "has scopes already"),
    (wrong_option, "commit is None or"),
    (veto_without_commit, "a veto needs commit"),
    (installed_twice, "has scopes already"),
]


@pytest.mark.parametrize(("make", "complaint"), MISTAKES)
def test_a_mistake_is_told_at_start_up(make, complaint):
    """To the server, in its own words, so that it does not start; without a lifespan, to each request."""
    told, error = startup(make())
    assert [message["type"] for message in told] == ["lifespan.startup.failed"]
    assert told[0]["message"] == str(error)
    assert complaint in str(error)
    app = make()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=complaint):
            asyncio.run(ask(app, "/"))


def test_a_mistake_keeps_uvicorn_from_starting():
    """It says why, and exits."""
    uvicorn: Any = needs.module("uvicorn", extra="demo")
    server = uvicorn.Server(uvicorn.Config(installed_twice(), port=0, log_config=None))
    with pytest.raises(SystemExit):
        asyncio.run(server.serve())
    assert not server.started


def test_wrapped_from_outside_and_inside_is_refused_at_once():
    """Where there is no server yet, the line that does it raises."""
    with pytest.raises(ConfigurationError, match="has scopes already"):
        ScopeMiddleware(new_app())


def partly(function):
    """The same function, behind a partial."""
    return functools.partial(function)


@pytest.mark.parametrize("where", ["app", "router", "mounted", "partial"])
def test_an_async_database_in_a_sync_endpoint_is_refused_at_start_up(tmp_path, where):
    """The error names the endpoint, its line and the database: a plain function cannot await what it is given."""
    kit = make_kit("async", f"sqlite:///{tmp_path / 'x.db'}")
    app, inner = new_app(), fastapi.FastAPI()
    router = fastapi.APIRouter()
    at: Any = {"app": app, "router": router, "mounted": inner, "partial": app}[where]

    def orders(session: Annotated[Any, fastapi.Depends(kit.db.session)]): ...

    at.get("/orders")(functools.partial(orders) if where == "partial" else orders)
    app.include_router(router, prefix="/shop")
    app.mount("/inner", inner)
    told, error = startup(app)
    assert [message["type"] for message in told] == ["lifespan.startup.failed"]
    assert "/orders is served by" in str(error)
    assert "the async sqlite+aiosqlite://" in str(error)
    if where != "partial":
        assert "orders (tests/integrations/test_fastapi.py:" in str(error)
    asyncio.run(kit.aclose())


def test_what_is_no_mistake_starts(tmp_path):
    """Async endpoints, generators and callable objects with an async database; plain ones with a sync one."""
    kits = [make_kit(colour, f"sqlite:///{tmp_path / colour}.db") for colour in ("sync", "async")]
    sync, asynchronous = (Annotated[Any, fastapi.Depends(kit.db.session)] for kit in kits)
    app = new_app()

    class Endpoint:
        async def __call__(self, session: asynchronous): ...

    @app.get("/1")
    def plain(session: sync): ...

    @app.get("/2")
    async def coroutine(session: asynchronous, other: sync): ...

    async def generator(session: asynchronous):
        yield b""

    app.get("/3")(functools.partial(coroutine))
    app.get("/4")(Endpoint())
    app.get("/5", response_class=responses.StreamingResponse)(generator)
    app.websocket("/6")(coroutine)
    told, error = startup(app)
    assert ([message["type"] for message in told], error) == (
        ["lifespan.startup.complete", "lifespan.shutdown.complete"],
        None,
    )
    for kit in kits:
        close(kit)


def test_an_async_session_in_a_worker_thread_is_refused(tmp_path):
    """Where start-up could not know, because the plain endpoint asks by itself: nothing in a thread can be awaited."""
    kit = make_kit("async", f"sqlite:///{tmp_path / 'x.db'}")
    app = new_app()

    @app.get("/")
    def endpoint():
        kit.db.session()

    with pytest.raises(NoScopeError, match=r"in scope 'GET /', in a thread that cannot await.\n.*async def"):
        asked(kit, app, "/")


@pytest.mark.parametrize(("framework", "old"), [("fastapi", "0.99.1"), ("starlette", "0.26.1")])
def test_a_framework_that_is_too_old(monkeypatch, framework, old):
    """The error names both versions."""
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: old if name == framework else version(name))
    _, error = startup(new_app())
    assert f"dbscope needs {framework} 0." in str(error)
    assert f"this is {old}" in str(error)


# -- the conformance kit, on a real server -----------------------------------------------------------------------------


class TestFastapi(Conformance):
    """Plain endpoints in threads, over HTTP."""

    scope_name = "POST /{}"

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        app = new_app(commit=commit, veto=veto)
        raised: dict[str, BaseException] = {}

        def respond(reply):
            if isinstance(reply.body, bytes):
                return responses.Response(reply.body, reply.status)
            return responses.StreamingResponse(reply.body, reply.status)

        def endpoint(handler):
            if inspect.iscoroutinefunction(handler):

                async def respond_later():
                    return respond(await handler())

                return respond_later
            return lambda: respond(handler())

        for name, handler in handlers.items():
            app.post(f"/{name}", response_model=None)(endpoint(handler))

        @app.exception_handler(Exception)
        async def failed(request, error):
            raised[request.url.path] = error
            return responses.PlainTextResponse("failed", 500)

        with serve_asgi(app) as port:

            def send(name):
                raised.pop(f"/{name}", None)
                status, body = fetch(port, f"/{name}", method="POST")
                return Outcome(status < 400, status, body, raised.get(f"/{name}"))

            yield send


class TestFastapiAsync(TestFastapi):
    """Coroutine functions with an async database."""

    database = "async"


class TestFastapiMixed(TestFastapi):
    """Coroutine functions with a sync database."""

    handlers = "async"
