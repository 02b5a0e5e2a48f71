"""Statements 18 to 26: Galaxy's model-side object, by compat's name."""

import asyncio
import contextlib
import contextvars
import gc
import logging
import threading
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import NullPool, create_engine, event, orm, select, text
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session, sessionmaker

from dbscope import Database, Loop, scope
from dbscope.compat import RequestSessions, check_database_connection, scoped_session
from dbscope.integrations import asgi, wsgi
from tests.compat.conftest import Payment, in_thread
from tests.support import needs
from tests.support.web import call_asgi, call_wsgi, environ, http_scope

ROLLED_BACK = "Database transaction rolled back due to inactive session transaction or invalid connection"


@pytest.fixture(autouse=True)
def _own_context(monkeypatch):
    """Each test begins without a request id."""
    variable = contextvars.ContextVar("test", default=())
    monkeypatch.setattr("dbscope.compat.galaxy._ids", variable)


@pytest.fixture
def model(factory):
    """Galaxy's `app.model`; no session may be left in it but the main thread's."""
    model = RequestSessions(factory)
    yield model
    model.session.remove()
    assert model.scoped_registry.registry == {}


def sessions(model):
    """The dictionary that Galaxy's code reaches into."""
    return model.scoped_registry.registry


def test_statement_18_one_registry_by_three_names(model, factory):
    """`session`, `context` and `Session` are one `scoped_session`; its registry has a name of its own."""
    assert model.session is model.context is model.Session
    assert isinstance(model.session, orm.scoped_session)
    assert model.scoped_registry is model.session.registry
    assert type(sessions(model)) is dict
    assert model.scoped_registry.scopefunc == model.request_scopefunc
    assert model.session.session_factory is factory


def test_statement_18_a_new_session_is_registered_nowhere(model):
    """`new_session()` gives a session that is its caller's alone."""
    session = model.new_session()
    assert isinstance(session, Session)
    assert sessions(model) == {}
    assert model.session() is not session


def test_statement_19_the_default_key_is_the_thread(model):
    """Outside of requests each thread has its own session, kept under the thread's number."""
    assert model.request_scopefunc() == threading.get_ident()
    assert sessions(model) == {threading.get_ident(): model.session()}
    assert in_thread(model.session) is not model.session()


def test_statement_14_and_19_a_dead_threads_session_is_nobodys(model, engine):
    """A thread's session goes with it, connection and all, and no thread of the same number finds it."""
    found = []

    def work():
        found.append(model.session())
        model.session.execute(text("SELECT 1"))

    for _ in range(50):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(set(map(id, found))) == 50
    assert sessions(model) == {}
    assert engine.pool.checkedout() == 0


def test_statement_20_setting_the_id(model):
    """The id is set without an instance, for every model; the token is the ContextVar's; a falsy id is the thread."""
    token = RequestSessions.set_request_id("a")
    assert isinstance(token, contextvars.Token)
    assert model.request_scopefunc() == "a"
    model.set_request_id(None)
    assert model.request_scopefunc() == threading.get_ident()
    model.set_request_id("")
    assert model.request_scopefunc() == threading.get_ident()
    token.var.reset(token)
    assert model.request_scopefunc() == threading.get_ident()


async def test_statement_21_who_inherits_the_id(model):
    """Tasks and worker threads that are started later inherit the id; a bare thread and the parent do not."""
    model.set_request_id("parent")

    async def child():
        inherited = model.request_scopefunc()
        model.set_request_id("child")
        return inherited, model.request_scopefunc()

    assert await asyncio.create_task(child()) == ("parent", "child")
    assert model.request_scopefunc() == "parent"
    assert await asyncio.to_thread(model.request_scopefunc) == "parent"
    keys = []
    thread = threading.Thread(target=lambda: keys.append(model.request_scopefunc()))
    thread.start()
    thread.join()
    assert keys == [thread.ident]


async def test_statement_21_anyio_worker_threads_inherit_it_too(model):
    """A worker thread of AnyIO's sees the request's id, and so its session."""
    anyio = needs.module("anyio", extra="async")
    model.set_request_id("request")
    assert await anyio.to_thread.run_sync(model.request_scopefunc) == "request"


def test_statement_22_unset_from_any_thread(model, engine):
    """Unsetting closes and drops that id's session, whichever thread does it, and no other's."""
    model.set_request_id("other")
    other = model.session()
    model.set_request_id("a")
    model.session.execute(text("SELECT 1"))
    assert engine.pool.checkedout() == 1
    in_thread(model.unset_request_id, "a")
    assert engine.pool.checkedout() == 0
    assert sessions(model) == {"other": other}
    model.unset_request_id("other")


def test_statement_22_unknown_and_repeated_ids(model):
    """An id that is unknown, or unset before, is no mistake, and no session is ever made for it."""
    made = []
    event.listen(model.session, "after_begin", lambda *_: made.append(1))
    model.unset_request_id("never")
    model.set_request_id("unused")
    model.unset_request_id("unused")
    model.unset_request_id("unused")
    model.unset_request_id(None)
    assert sessions(model) == {}


def test_statement_23_a_session_that_fails_to_close_is_dropped(engine):
    """A raising `close()` is raised, and the entry is gone all the same."""

    class BadClose(Session):
        def close(self):
            super().close()
            raise OSError("closing failed")

    model = RequestSessions(sessionmaker(engine, class_=BadClose))
    model.set_request_id("a")
    model.session()
    with pytest.raises(OSError, match="closing failed"):
        model.unset_request_id("a")
    assert sessions(model) == {}


def test_statement_23_unsetting_makes_the_id_before_it_current(model):
    """Nested ids are left in any order, and a later access finds the outer one, or the thread, and not a dead id."""
    model.set_request_id("outer")
    outer = model.session()
    model.set_request_id("middle")
    model.set_request_id("inner")
    model.unset_request_id("middle")
    assert model.request_scopefunc() == "inner"
    model.unset_request_id("inner")
    assert model.session() is outer
    model.unset_request_id("outer")
    assert model.request_scopefunc() == threading.get_ident()
    assert sessions(model) == {}


def test_statement_23_ids_that_others_unset_do_not_pile_up(model):
    """A thread whose ids are always unset by another one keeps few of them in its context."""
    for number in range(1, 100):
        token = model.set_request_id(number)
        in_thread(model.unset_request_id, number)
        assert model.request_scopefunc() == number
    assert len(token.var.get()) <= 16


def test_statement_23_dbscopes_own_scopes_leave_nothing():
    """The core's scopes restore the outer one, and a session is never made again under one that is over."""
    with Database("sqlite://") as db:
        with scope("outer"):
            outer = db.session()
            with scope("inner"):
                db.session.execute(text("SELECT 1"))
            assert db.session() is outer
        assert db.engine.pool.checkedout() == 0


def test_statement_24_nothing_to_mend(model, engine, caplog):
    """Where no transaction is open, no session is made, no connection taken and nothing logged."""
    check_database_connection(model.session)
    assert sessions(model) == {}
    check_database_connection(model.session())
    assert engine.pool.checkedout() == 0
    model.session.execute(text("SELECT 1"))
    check_database_connection(model.session)
    assert model.session().in_transaction()
    assert caplog.records == []


@pytest.mark.parametrize("through", ["session", "registry"])
def test_statement_24_an_inactive_transaction(model, caplog, through):
    """After a failed flush the session is rolled back, the error logged, and the session works again."""
    with pytest.raises(IntegrityError):
        corrupt(model.session())
    with pytest.raises(PendingRollbackError):
        model.session.execute(text("SELECT 1"))
    check_database_connection(model.session() if through == "session" else model.session)
    assert [(r.levelno, r.getMessage(), r.name) for r in caplog.records] == [
        (logging.ERROR, ROLLED_BACK, "dbscope.compat.galaxy")
    ]
    assert model.session.scalar(text("SELECT 42")) == 42


def test_statement_24_an_invalidated_connection(model, caplog):
    """A session whose connection was invalidated is rolled back, and works again."""
    model.session.connection().invalidate()
    check_database_connection(model.session)
    assert [r.getMessage() for r in caplog.records] == [ROLLED_BACK]
    assert model.session.scalar(text("SELECT 42")) == 42


def test_statement_24_a_connection_that_the_server_ended(postgres_url, caplog):
    """A session whose connection PostgreSQL has terminated is rolled back, and works again."""
    engine = create_engine(postgres_url)
    model = RequestSessions(sessionmaker(engine))
    pid = model.session.scalar(text("SELECT pg_backend_pid()"))
    with engine.connect() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    with pytest.raises(OperationalError):
        model.session.execute(text("SELECT 1"))
    check_database_connection(model.session)
    assert ROLLED_BACK in [r.getMessage() for r in caplog.records]
    assert model.session.scalar(text("SELECT 42")) == 42
    model.session.remove()
    engine.dispose()


def corrupt(session):
    """Leave a session as a failing flush in the business logic does."""
    for _ in range(2):
        session.add(Payment(id=7))
        session.flush()
        session.expunge_all()


def test_statement_25_the_job_handlers_loop(model, engine, caplog):
    """Each pass has a fresh id and session, a failing one is logged at the top, and the next one works."""
    seen = []

    def passes(work):
        request_id = str(uuid.uuid4())
        model.set_request_id(request_id)
        try:
            check_database_connection(model.session)
            seen.append(model.session())
            work(model.session())
        except Exception:
            logging.getLogger("jobs").exception("a pass failed")
        finally:
            model.unset_request_id(request_id)

    def book(session):
        session.add(Payment(amount=1))
        session.commit()

    for work in (book, corrupt, book):
        passes(work)
        assert sessions(model) == {}
        assert engine.pool.checkedout() == 0
    assert len(set(map(id, seen))) == 3
    assert [r.getMessage() for r in caplog.records] == ["a pass failed"]
    assert len(model.session.scalars(select(Payment)).all()) == 2


def test_statement_25_the_loop_outlives_the_servers_connections(postgres_url):
    """The server ends a connection in the middle of a pass: that one fails, and the next has a session that works."""
    engine, outside = create_engine(postgres_url), create_engine(postgres_url, poolclass=NullPool)
    model = RequestSessions(sessionmaker(engine))
    found = []

    def end_connection():
        pid = model.session.scalar(text("SELECT pg_backend_pid()"))
        with outside.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})

    def passes(work):
        request_id = str(uuid.uuid4())
        model.set_request_id(request_id)
        try:
            check_database_connection(model.session)
            work()
            found.append(model.session.scalar(text("SELECT 42")))
        except OperationalError:
            found.append("the server has gone")
        finally:
            model.unset_request_id(request_id)

    for work in (lambda: None, end_connection, lambda: None):
        passes(work)
        assert sessions(model) == {}
        assert engine.pool.checkedout() == 0
    assert found == [42, "the server has gone", 42]
    engine.dispose()


def test_statement_25_dbscopes_own_loop(engine, caplog):
    """A pass of `dbscope.Loop` that corrupts its session is logged, and the next one has a new session."""
    db = Database(engine)
    seen = []

    def work():
        seen.append(db.session())
        if loop.passes == 2:
            corrupt(db.session())
        with db.transaction() as session:
            session.add(Payment(amount=1))
        if loop.passes == 3:
            loop.stop()

    loop = Loop(work, interval=0, name="jobs")
    loop.run()
    assert len(set(map(id, seen))) == 3
    assert [r.getMessage() for r in caplog.records] == ["pass 2 of jobs failed; the next starts clean"]
    with db.reader() as session:
        assert len(session.scalars(select(Payment)).all()) == 2


# -- 26: requests, tasks, and threads beside them --------------------------------------------------------------


@contextlib.contextmanager
def request(model):
    """What Galaxy does around each WSGI and ASGI request."""
    request_id = uuid.uuid4().hex
    assert request_id not in sessions(model)
    model.set_request_id(request_id)
    try:
        yield
    finally:
        model.unset_request_id(request_id)


def task_prerun(model, task_id):
    """Celery's signal before a task."""
    model.set_request_id(task_id)


def task_postrun(model, task_id):
    """Celery's signal after a task."""
    model.unset_request_id(task_id)


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
@pytest.mark.parametrize("kind", ["wsgi", "celery"])
def test_statement_26_concurrent_threads(model, engine, kind, fails):
    """Ten WSGI requests, or Celery tasks, at once have ten sessions, and leave nothing, whatever their end."""
    barrier = threading.Barrier(10)
    beside = Beside(model)

    def work():
        session = model.session()
        session.execute(text("SELECT 1"))
        barrier.wait(30)
        assert model.session() is session
        found.append(session)
        if fails:
            raise KeyError("the work's")

    def wsgi(_):
        with request(model):
            work()

    def celery(number):
        task_prerun(model, f"task {number}")
        try:
            work()
        finally:
            task_postrun(model, f"task {number}")

    found = []
    with beside:
        before = dict(sessions(model))
        with ThreadPoolExecutor(10) as threads:
            done = [threads.submit(wsgi if kind == "wsgi" else celery, number) for number in range(10)]
            assert [type(one.exception()) for one in done] == [KeyError if fails else type(None)] * 10
            assert len(set(map(id, found))) == 10
            assert sessions(model) == before == {beside.thread.ident: beside.session}
            assert engine.pool.checkedout() == 1
    assert sessions(model) == {}


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
@pytest.mark.parametrize("endpoint", ["async", "in a worker thread"])
async def test_statement_26_concurrent_asgi_requests(model, engine, endpoint, fails):
    """Ten ASGI requests at once have ten sessions, with async and with sync endpoints, and leave nothing."""
    loop_barrier, barrier = asyncio.Barrier(10), threading.Barrier(10)
    found = []

    def work():
        session = model.session()
        session.execute(text("SELECT 1"))
        found.append(session)
        return session

    async def asynchronous():
        session = work()
        await loop_barrier.wait()
        assert model.session() is session

    def synchronous():
        session = work()
        barrier.wait(30)
        assert model.session() is session

    async def serve(threads):
        with request(model):
            if endpoint == "async":
                await asynchronous()
            else:
                context = contextvars.copy_context()
                await asyncio.get_running_loop().run_in_executor(threads, context.run, synchronous)
            if fails:
                raise KeyError("the endpoint's")

    with Beside(model) as beside, ThreadPoolExecutor(10) as threads:
        ends = await asyncio.gather(*(serve(threads) for _ in range(10)), return_exceptions=True)
        assert [type(end) for end in ends] == [KeyError if fails else type(None)] * 10
        assert len(set(map(id, found))) == 10
        assert sessions(model) == {beside.thread.ident: beside.session}
        assert engine.pool.checkedout() == 1
    assert sessions(model) == {}


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
def test_statement_26_wsgi_requests_under_the_middleware(model, engine, fails):
    """Nobody sets an id: the scope of a request is one, for ten at once; the registry is empty before and after."""
    barrier = threading.Barrier(10)
    found = []

    def app(environ, start_response):
        session = model.session()
        session.execute(text("SELECT 1"))
        found.append(session)
        barrier.wait(30)
        assert model.session() is session
        if fails:
            raise KeyError("the application's")
        start_response("200 OK", [])
        return []

    wrapped = wsgi.ScopeMiddleware(app)
    with Beside(model) as beside:
        with ThreadPoolExecutor(10) as threads:
            answers = [*threads.map(lambda _: call_wsgi(wrapped, environ()), range(10))]
        assert [type(answer.error) for answer in answers] == [KeyError if fails else type(None)] * 10
        assert len(set(map(id, found))) == 10
        assert sessions(model) == {beside.thread.ident: beside.session}
        assert engine.pool.checkedout() == 1
    assert sessions(model) == {}


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
@pytest.mark.parametrize("endpoint", ["async", "in a worker thread"])
async def test_statement_26_asgi_requests_under_the_middleware(model, engine, endpoint, fails):
    """The same, with async and with sync endpoints."""
    loop_barrier, barrier = asyncio.Barrier(10), threading.Barrier(10)
    found = []

    def work():
        session = model.session()
        session.execute(text("SELECT 1"))
        found.append(session)
        return session

    def synchronous():
        session = work()
        barrier.wait(30)
        assert model.session() is session

    async def app(request, receive, send):
        if endpoint == "async":
            session = work()
            await loop_barrier.wait()
            assert model.session() is session
        else:
            context = contextvars.copy_context()
            await asyncio.get_running_loop().run_in_executor(threads, context.run, synchronous)
        if fails:
            raise KeyError("the endpoint's")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    wrapped = asgi.ScopeMiddleware(app)
    with Beside(model) as beside, ThreadPoolExecutor(10) as threads:
        answers = await asyncio.gather(*(call_asgi(wrapped, http_scope()) for _ in range(10)))
        assert [type(answer.error) for answer in answers] == [KeyError if fails else type(None)] * 10
        assert len(set(map(id, found))) == 10
        assert sessions(model) == {beside.thread.ident: beside.session}
        assert engine.pool.checkedout() == 1
    assert sessions(model) == {}


def test_statement_26_a_scope_and_an_id_inside_of_each_other(model):
    """The inner one has the session, and leaving it gives the outer's back; a falsy id is the thread's all the same."""
    thread = model.session()
    with scope("task"):
        task = model.session()
        model.set_request_id("request")
        request = model.session()
        with scope("inner"):
            inner = model.session()
        assert model.session() is request
        model.unset_request_id("request")
        assert model.session() is task
        model.set_request_id(None)
        assert model.session() is thread
        model.unset_request_id(None)
    assert model.session() is thread
    assert len({thread, task, request, inner}) == 4
    assert list(sessions(model).values()) == [thread]


class Beside:
    """A background thread that works in its own session throughout."""

    def __init__(self, model):
        self.model = model
        self.begun, self.stop = threading.Event(), threading.Event()
        self.kept = False
        self.thread = threading.Thread(target=self.work)

    def work(self):
        self.session = self.model.session()
        self.session.execute(text("SELECT 1"))
        self.begun.set()
        self.stop.wait(30)
        self.kept = self.model.session() is self.session and self.session.in_transaction()
        self.model.session.remove()

    def __enter__(self):
        self.thread.start()
        assert self.begun.wait(30)
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        assert self.kept


def test_statement_26_concurrent_scopes_in_threads(factory, engine):
    """Ten pieces of work at once, each in a dbscope scope, have ten sessions of a registry without a scopefunc."""
    S = scoped_session(factory)
    barrier = threading.Barrier(10)

    def work(number):
        with scope(f"work {number}"):
            session = S()
            session.execute(text("SELECT 1"))
            barrier.wait(30)
            assert S() is session
        assert not S.registry.has()
        return session

    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(work, range(10)))
        assert len(set(map(id, found))) == 10
        assert engine.pool.checkedout() == 0


async def test_statement_26_concurrent_scopes_in_tasks(factory, engine):
    """The same in tasks; what the background thread has is its own throughout."""
    S = scoped_session(factory)
    barrier = asyncio.Barrier(10)
    mine = S()

    async def work(number):
        async with scope(f"work {number}"):
            session = S()
            session.execute(text("SELECT 1"))
            await barrier.wait()
            assert S() is session
        return session

    found = await asyncio.gather(*map(work, range(10)))
    assert len(set(map(id, found))) == 10
    assert engine.pool.checkedout() == 0
    assert S() is mine


def test_a_model_that_is_dropped_is_freed(factory):
    """What a thread keeps for a model does not keep the model."""
    model = RequestSessions(factory)
    model.session()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
