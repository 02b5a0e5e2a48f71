"""The ASGI middleware: what passes through, how sync sessions end off the loop, trio, a real server."""

import asyncio
import http.client
import threading
import weakref

import pytest
from sqlalchemy import event, select, text, update

from dbscope import NoScopeError, ScopeEndedError, current_scope
from dbscope.integrations.asgi import ScopeMiddleware
from tests.support import needs
from tests.support.kits import LIMIT, Account, Payment, SyncKit
from tests.support.web import call_asgi, fetch, fetch_together, http_scope, serve_asgi, wait_for

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"x"}


async def answer(send, status=200):
    """A whole response."""
    await send({**START, "status": status})
    await send(END)


@pytest.fixture
def sync(tmp_path):
    """A sync kit, for tests with a loop."""
    kit = SyncKit(f"sqlite:///{tmp_path / 'sync.db'}")
    yield kit
    kit.close()


# -- what passes through -----------------------------------------------------------------------------------------------


async def test_messages_are_the_applications_own(sync):
    """Each object that is sent or received reaches the other side as it is, extensions included."""
    sent = [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.push", "path": "/x", "headers": []},
        {**START, "trailers": True},
        {"type": "http.response.body", "body": b"1", "more_body": True},
        {"type": "http.response.pathsend", "path": "/file"},
        {"type": "http.response.trailers", "headers": [], "more_trailers": False},
    ]
    told, request = {"type": "http.request", "body": b""}, http_scope()
    got = []

    async def app(scope, receive, send):
        assert scope is request
        assert await receive() is told
        for message in sent:
            await send(message)

    async def receive():
        return told

    async def send(message):
        got.append(message)

    await ScopeMiddleware(app)(request, receive, send)
    assert list(map(id, got)) == list(map(id, sent))


async def test_early_messages_do_not_end_the_request(sync):
    """Only the start of the response does."""

    async def app(scope, receive, send):
        await send({"type": "http.response.push", "path": "/x", "headers": []})
        sync.session().add(Payment())
        await answer(send)

    async def send(message):
        assert (message["type"] == "http.response.push") is (sync.count() == 0)

    assert sync.db
    await ScopeMiddleware(app, "on-success")(http_scope("POST"), None, send)
    assert sync.count() == 1


@pytest.mark.parametrize("type", ["websocket", "lifespan"])
async def test_websockets_and_the_lifespan_pass_through(sync, type):
    """They get no scope and the very callables of the server; a handler that forgets to open one is told so."""
    seen = []

    async def app(*given):
        seen.append(given)
        assert current_scope() is None
        with pytest.raises(NoScopeError, match=r"test_asgi.py:\d+, outside of every scope.*\n.*async with scope"):
            sync.db.session()

    async def receive(): ...

    async def send(message): ...

    given = ({"type": type}, receive, send)
    await ScopeMiddleware(app, "on-success")(*given)
    assert list(map(id, seen[0])) == list(map(id, given))
    assert given[0] == {"type": type}


async def test_failures_9_a_websocket_handler_opens_its_own_scope(async_kit):
    """One for each message it works on, as for each pass of a loop."""
    from dbscope import scope as open_scope

    messages = [{"type": "websocket.receive", "text": str(number)} for number in range(3)]

    async def app(scope, receive, send):
        while message := await receive():
            async with open_scope(f"message {message['text']}", commit="on-success"):
                async_kit.session().add(Payment(amount=int(message["text"])))

    async def receive():
        return messages.pop() if messages else None

    assert async_kit.db
    await ScopeMiddleware(app)({"type": "websocket"}, receive, None)
    assert async_kit.amounts() == [0, 1, 2]


async def test_failures_24_the_scope_reaches_an_application_in_another_task(async_kit):
    """A middleware between them may run the application in a task of its own, and send from there."""

    async def app(scope, receive, send):
        assert current_scope().name == "POST /"
        async_kit.session().add(Payment())
        await answer(send, 201)

    async def other_task(scope, receive, send):
        await asyncio.create_task(app(scope, receive, send))

    assert async_kit.db
    got = await call_asgi(ScopeMiddleware(other_task, "on-success"), http_scope("POST"))
    assert (got.status, got.error, async_kit.count()) == (201, None, 1)


# -- names -------------------------------------------------------------------------------------------------------------


class Route:
    path = "/orders/{id}"


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({}, "GET /orders/7"),
        ({"route": Route()}, "GET /orders/{id}"),
        ({"route": Route(), "root_path": "/shop"}, "GET /shop/orders/{id}"),
        ({"route": object()}, "GET /orders/7"),
    ],
)
async def test_the_name_is_the_route_where_the_framework_tells_it(sync, told, name):
    """Starlette and FastAPI put it into the scope once they know; errors after the response use it, too."""

    async def app(scope, receive, send):
        scope.update(told)
        assert current_scope().name == name
        await answer(send)
        sync.session()

    got = await call_asgi(ScopeMiddleware(app), http_scope(path="/orders/7"))
    assert isinstance(got.error, ScopeEndedError)
    assert f"scope '{name}'" in str(got.error)


async def test_an_ended_scope_keeps_its_name_and_not_the_request():
    """A task that was started in a request and lives on does not keep the request's body, headers and state."""
    kept = []

    class Request(dict): ...

    async def app(scope, receive, send):
        scope["route"] = Route()
        kept.append(current_scope())
        await answer(send)

    request = Request(http_scope(path="/orders/7"))
    await call_asgi(ScopeMiddleware(app), request)
    gone = weakref.ref(request)
    del request
    assert gone() is None
    assert kept[0].name == "GET /orders/{id}"


# -- sync sessions -----------------------------------------------------------------------------------------------------


async def test_a_sync_session_of_a_worker_thread_is_committed_before_the_response(sync):
    """As the `def` endpoints of FastAPI use it: handed over from the thread to the request's end, off the loop."""
    committed_by = []

    def work():
        session = sync.session()
        session.add(Payment())
        session.flush()

    async def app(scope, receive, send):
        await asyncio.to_thread(work)
        await answer(send, 201)

    event.listen(sync.db.engine, "commit", lambda connection: committed_by.append(threading.current_thread()))
    got = await call_asgi(ScopeMiddleware(app, "on-success"), http_scope("POST"))
    assert (got.status, got.error, sync.count(), sync.checked_out()) == (201, None, 1, 0)
    assert threading.current_thread() not in committed_by


async def test_requests_that_wait_for_each_others_row_lock_do_not_stop_the_process(postgres_url):
    """The commits wait in threads: the server sees the deadlock and ends one of them; the loop has gone on."""
    kit = SyncKit(postgres_url)
    # Only a test that fails waits so long: a commit on the loop would wait for ever.
    db = kit.database(connect_args={"options": "-c lock_timeout=10s -c deadlock_timeout=100ms"})
    with db.transaction() as session:
        session.add_all([Account(id=1, name="a"), Account(id=2, name="b")])
    barrier = asyncio.Barrier(2)

    async def app(scope, receive, send):
        first, second = (1, 2) if scope["path"] == "/1" else (2, 1)
        session = db.session()
        session.execute(update(Account).where(Account.id == first).values(balance=first))
        later = session.get_one(Account, second)
        await barrier.wait()
        later.balance = first  # sent by the flush of the commit
        await answer(send, 201)

    wrapped = ScopeMiddleware(app, "on-success")
    beats, over = 0, asyncio.Event()

    async def heart():
        nonlocal beats
        while not over.is_set():
            beats += 1
            await asyncio.sleep(0)

    beating = asyncio.create_task(heart())
    answers = await asyncio.gather(*(call_asgi(wrapped, http_scope("POST", f"/{number}")) for number in (1, 2)))
    over.set()
    await beating
    assert sorted(got.status for got in answers) == [201, 500]
    assert "deadlock detected" in str(next(got.error for got in answers if got.error))
    assert beats > 100
    assert kit.checked_out() == 0
    kit.close()


async def test_a_commit_that_waits_for_the_write_lock_does_not_stop_the_process(sync):
    """On SQLite: one request's commit waits, in a thread, until another request has ended on the loop."""
    waits, loop = asyncio.Event(), asyncio.get_running_loop()

    async def app(scope, receive, send):
        session = sync.session()
        if scope["path"] == "/first":
            session.add(Payment(amount=1))
            session.flush()
            asking.set()
            await waits.wait()
        else:
            await asking.wait()
            session.add(Payment(amount=2))
            event.listen(session, "before_flush", lambda *_: loop.call_soon_threadsafe(waits.set))
        await answer(send, 201)

    assert sync.db
    asking, wrapped = asyncio.Event(), ScopeMiddleware(app, "on-success")
    answers = await asyncio.gather(*(call_asgi(wrapped, http_scope("POST", path)) for path in ("/first", "/second")))
    assert [(got.status, got.error) for got in answers] == [(201, None)] * 2
    assert sync.amounts() == [1, 2]


# -- cancels and disconnects -------------------------------------------------------------------------------------------


async def test_a_client_that_disconnects_before_the_response(async_kit):
    """An application that hears of it and gives up has not answered: nothing is committed, everything is released."""

    async def app(scope, receive, send):
        async_kit.session().add(Payment())
        await async_kit.session().flush()
        assert (await receive())["type"] == "http.disconnect"

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    assert async_kit.db
    await ScopeMiddleware(app, "on-success")(http_scope("POST"), receive, send)
    assert (async_kit.count(), async_kit.checked_out(), current_scope()) == (0, 0, None)


async def test_a_client_that_disconnects_in_the_middle_of_a_stream(async_kit):
    """What the server's `send` raises passes through; the work was committed when the response started."""

    async def app(scope, receive, send):
        async_kit.session().add(Payment())
        await answer(send)

    async def send(message):
        if message["type"] == "http.response.body":
            raise OSError("the client is gone")

    assert async_kit.db
    with pytest.raises(OSError, match="the client is gone"):
        await ScopeMiddleware(app, "on-success")(http_scope("POST"), None, send)
    assert (async_kit.count(), async_kit.checked_out(), current_scope()) == (1, 0, None)


@pytest.mark.parametrize("started", [False, True])
async def test_a_cancelled_request_leaves_nothing_behind(async_kit, started):
    """Before its response it is rolled back; in its stream it was committed."""
    reached = asyncio.Event()

    async def app(scope, receive, send):
        async_kit.session().add(Payment())
        await async_kit.session().flush()
        if started:
            await send(START)
        reached.set()
        await asyncio.Event().wait()

    assert async_kit.db
    request = asyncio.create_task(call_asgi(ScopeMiddleware(app, "on-success"), http_scope("POST")))
    await reached.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert (async_kit.count(), async_kit.checked_out()) == (int(started), 0)


async def test_an_application_may_answer_the_failed_commit(async_kit):
    """It catches what `send` raises and sends another start: that one goes out."""

    async def app(scope, receive, send):
        async_kit.session().add_all([Account(name="same"), Account(name="same")])
        try:
            await answer(send, 201)
        except Exception:
            await answer(send, 409)

    assert async_kit.db
    got = await call_asgi(ScopeMiddleware(app, "on-success"), http_scope("POST"))
    assert (got.status, got.error, async_kit.count(Account)) == (409, None, 0)


async def test_a_veto_that_fails_commits_nothing_although_its_error_is_hidden(async_kit):
    """The request never had a response, so its work did not happen."""

    def veto(status):
        raise ZeroDivisionError

    async def app(scope, receive, send):
        async_kit.session().add(Payment())
        with pytest.raises(ZeroDivisionError):
            await answer(send)

    assert async_kit.db
    got = await call_asgi(ScopeMiddleware(app, "on-success", veto=veto), http_scope("POST"))
    assert (got.status, async_kit.count()) == (500, 0)


# -- trio --------------------------------------------------------------------------------------------------------------


def under_trio(app, **options):
    """The answer of an application under trio."""
    trio = needs.module("trio", extra="async")
    return trio.run(call_asgi, ScopeMiddleware(app, **options), http_scope("POST"))


@pytest.mark.parametrize("commit", [None, "on-success"])
def test_under_trio_a_request_without_database_works(commit):
    """The middleware asks nothing of the loop; errors and cancels pass through."""
    trio = needs.module("trio", extra="async")

    async def app(scope, receive, send):
        assert current_scope().name == "POST /"
        await trio.lowlevel.checkpoint()
        await answer(send)

    async def failing(scope, receive, send):
        raise ZeroDivisionError

    async def cancelled(scope, receive, send):
        with trio.CancelScope() as cancel:
            cancel.cancel()
            await trio.sleep_forever()
        assert cancel.cancelled_caught
        await answer(send)

    for each in (app, cancelled):
        got = under_trio(each, commit=commit)
        assert (got.status, got.body, got.error) == (200, b"x", None)
    assert isinstance(under_trio(failing, commit=commit).error, ZeroDivisionError)
    assert current_scope() is None


@pytest.mark.parametrize("threaded", [False, True])
def test_under_trio_a_request_with_database_is_refused(sync, threaded):
    """Its end could not be awaited there: the error says so where the database is first used, in a thread too."""
    trio = needs.module("trio", extra="async")

    async def app(scope, receive, send):
        if threaded:
            await trio.to_thread.run_sync(lambda: sync.db.session.scalars(select(Payment)))
        else:
            sync.db.session.scalars(select(Payment))

    error = under_trio(app, commit="on-success").error
    assert isinstance(error, NoScopeError)
    assert "in scope 'POST /', which was opened on an event loop other than asyncio's" in str(error)
    assert "with scope()" in str(error)


def test_under_trio_a_worker_thread_may_open_its_own_scope(sync):
    """As the error says."""
    trio = needs.module("trio", extra="async")
    from dbscope import scope as open_scope

    def work():
        with open_scope("thread", commit="on-success"):
            sync.session().add(Payment())

    async def app(scope, receive, send):
        await trio.to_thread.run_sync(work)
        await answer(send)

    assert under_trio(app).error is None
    assert sync.count() == 1


# -- a real server -----------------------------------------------------------------------------------------------------


def test_on_uvicorn(sync, tmp_path):
    """Concurrent requests commit their own work; errors and failed commits are 500s; a stream holds no connection."""
    needs.module("greenlet", extra="async")
    needs.module("aiosqlite", extra="aiosqlite")
    from dbscope import AsyncDatabase

    assert sync.db
    adb = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'sync.db'}")
    gone = threading.Event()

    async def app(scope, receive, send):
        path = scope["path"]
        if path == "/dispose":
            await adb.dispose()
            await answer(send)
            return
        await adb.session.execute(text("SELECT 1"))
        adb.session.add_all([Account(name=path), *([Account(name=path)] if path == "/same" else [])])
        if path == "/raise":
            raise ZeroDivisionError
        if path != "/stream":
            await answer(send, 201)
            return
        await send(START)
        await send({**END, "body": b"held" if adb.engine.pool.checkedout() else b"free", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with serve_asgi(ScopeMiddleware(app, "on-success")) as port:
        paths = ["/same", "/raise", *(f"/{number}" for number in range(6))]
        answers = fetch_together(port, paths)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        connection.request("POST", "/stream")
        assert connection.getresponse().read(4) == b"free"
        connection.close()
        wait_for(gone.is_set)
        assert fetch(port, "/dispose")[0] == 200
    assert {path: status for path, (status, _) in answers.items()} == {
        path: 500 if path in ("/same", "/raise") else 201 for path in paths
    }
    assert sync.count(Account) == 7
