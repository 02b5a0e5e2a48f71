"""What both middlewares promise, as WSGI with sync sessions and as ASGI with async ones."""

import contextlib
import sqlite3

import pytest
from sqlalchemy import event, select, text

from dbscope import (
    ConfigurationError,
    NoScopeError,
    NotTheOwnerError,
    ScopeEndedError,
    UncommittedWrites,
    UncommittedWritesError,
    current_scope,
    scope,
)
from dbscope.integrations import asgi, wsgi
from tests.support.kits import Account, Payment, twice
from tests.support.web import Answer, ask, get, wrapped

MIDDLEWARES = pytest.mark.parametrize("module", [asgi, wsgi], ids=["asgi", "wsgi"])


def finish(kit, work, **options):
    """End a scope in the kit's colour."""
    return kit.done(work.finish(**options) if kit.colour == "sync" else work.afinish(**options))


# -- one scope for each request ----------------------------------------------------------------------------------------


@twice
async def test_each_request_has_a_scope_of_its_own(kit):
    """It is named by method and path, its session is new, and nothing is current after it."""
    seen = []

    async def endpoint():
        seen.append((current_scope().name, current_scope(), kit.session()))
        assert await kit.done(kit.session().scalar(text("SELECT 1"))) == 1
        yield 200

    assert (await get(kit, endpoint, "/orders/7")).status == 200
    assert current_scope() is None
    assert (await get(kit, endpoint, "/orders", method="POST")).status == 200
    (first, *one), (second, *other) = seen
    assert (first, second) == ("GET /orders/7", "POST /orders")
    assert one[0] is not other[0]
    assert one[1] is not other[1]


@twice
async def test_the_application_may_name_its_work(kit):
    """The name that errors use can be set; the error of an ended scope uses it, too."""

    async def endpoint():
        current_scope().name = "checkout"
        assert "scope 'checkout'" in repr(current_scope())
        yield 200
        kit.session()

    assert "scope 'checkout'" in str((await get(kit, endpoint)).error)


@twice
async def test_what_was_current_before_is_so_again(kit):
    """A request inside other work, as a test client makes it: its scope is an inner one, and the outer goes on."""

    async def endpoint():
        assert kit.session() is not outside
        yield 200
        yield b"x"

    async with kit.scope("outer") as outer:
        outside = kit.session()
        assert (await get(kit, endpoint)).status == 200
        assert current_scope() is outer
        assert kit.session() is outside
        await finish(kit, outer)
        assert (await get(kit, endpoint_without_database)).status == 200
        with pytest.raises(ScopeEndedError, match="'outer'"):
            kit.session()


async def endpoint_without_database():
    """Answers by itself."""
    yield 200
    yield b"hello"


@twice
async def test_a_request_without_database_needs_none(kit):
    """The answer is the application's, chunk by chunk."""
    assert await get(kit, endpoint_without_database, commit="on-success") == Answer(200, [b"hello"])


@twice
async def test_installed_twice_where_it_cannot_be_seen(kit):
    """As in a mounted application: the inner one does nothing, and what the outer one says about commits holds."""
    scopes = []

    async def endpoint():
        scopes.append(current_scope())
        kit.session().add(Payment())
        yield 201
        assert kit.count() == 1

    def hidden(app):
        return lambda *args: app(*args)

    module = wsgi if kit.colour == "sync" else asgi
    wrapped_twice = module.ScopeMiddleware(hidden(wrapped(kit, endpoint)), commit="on-success")
    assert (await ask(kit, wrapped_twice)).error is None
    wrapped_again = module.ScopeMiddleware(hidden(wrapped_twice))
    assert (await ask(kit, wrapped_again)).error is not None  # the outermost does not commit
    assert all(work._outer is None for work in scopes)


@MIDDLEWARES
def test_installed_twice_is_refused(module):
    """Where it is put together: what it says about commits would not hold. Also with another middleware between."""

    class Between:
        def __init__(self, app):
            self.app = app

        def __call__(self, *args): ...

    def app(*args): ...

    inner = module.ScopeMiddleware(app)
    for visible in (inner, Between(inner)):
        with pytest.raises(ConfigurationError, match="has scopes already"):
            module.ScopeMiddleware(visible)


def wsgi_application(environ, start_response):
    """One that nobody calls."""


async def asgi_application(scope, receive, send):
    """Another one."""


@pytest.mark.parametrize(
    ("module", "app", "other"), [(asgi, wsgi_application, "wsgi"), (wsgi, asgi_application, "asgi")]
)
def test_the_middleware_of_the_other_kind_is_refused(module, app, other):
    """They have one name: which one is meant is told where it is put together, and not by a request's TypeError."""
    with pytest.raises(ConfigurationError, match=rf"application.*\n.*dbscope\.integrations\.{other}\.ScopeMiddleware"):
        module.ScopeMiddleware(app)
    module.ScopeMiddleware(lambda: None)  # which is neither: its error is the server's, or the framework's


# -- who commits -------------------------------------------------------------------------------------------------------


@twice
async def test_by_default_the_application_commits(kit):
    """Its own commits stay, and what it did not commit is rolled back and reported."""

    async def careful():
        kit.session().add(Payment(amount=1))
        await kit.done(kit.session().commit())
        yield 200

    async def forgetful():
        kit.session().add(Payment(amount=2))
        await kit.done(kit.session().flush())
        yield 200

    assert (await get(kit, careful)).status == 200
    with pytest.warns(UncommittedWrites, match=r"scope 'POST /' ended with writes .*test_requests.py:\d+"):
        assert (await get(kit, forgetful, method="POST")).status == 200
    assert kit.amounts() == [1]


@twice
async def test_a_forgotten_commit_can_be_a_500(kit):
    """Where the database is told to raise for lost writes, the client hears of it."""
    kit.database(uncommitted="raise")

    async def forgetful():
        kit.session().add(Payment())
        await kit.done(kit.session().flush())
        yield 200

    answer = await get(kit, forgetful)
    assert answer.status == 500
    assert isinstance(answer.error, UncommittedWritesError)
    assert kit.checked_out() == 0


@twice
@pytest.mark.parametrize(("status", "kept"), [(200, 1), (302, 1), (399, 1), (400, 0), (404, 0), (500, 0)])
async def test_on_success_a_status_below_400_commits(kit, status, kept):
    """The request is one managed transaction; from 400 on it is rolled back, and the answer is sent all the same."""

    async def endpoint():
        kit.session().add(Payment())
        await kit.done(kit.session().flush())
        yield status
        assert kit.count() == kept
        yield b"x"

    answer = await get(kit, endpoint, method="POST", commit="on-success")
    assert (answer.status, answer.body, answer.error) == (status, b"x", None)


@twice
async def test_on_success_an_error_rolls_back(kit):
    """What the application raises reaches the server, and nothing is committed."""

    async def endpoint():
        kit.session().add(Payment())
        await kit.done(kit.session().flush())
        raise ZeroDivisionError
        yield 200

    answer = await get(kit, endpoint, method="POST", commit="on-success")
    assert answer.status == 500
    assert isinstance(answer.error, ZeroDivisionError)
    assert (kit.count(), kit.checked_out(), current_scope()) == (0, 0, None)


@twice
async def test_a_veto_decides_instead_of_the_status(kit):
    """It is asked with the status of each response: one can keep what a failed login wrote, or refuse redirects."""
    asked = []

    def veto(status):
        asked.append(status)
        return status == 302

    for status in (401, 302, 200):

        async def endpoint(status=status):
            kit.session().add(Payment(amount=status))
            yield status

        assert (await get(kit, endpoint, method="POST", commit="on-success", veto=veto)).status == status
    assert asked == [401, 302, 200]
    assert kit.amounts() == [200, 401]


@twice
async def test_a_veto_that_fails_commits_nothing(kit):
    """Its error is the request's, also where the application hides it."""

    def veto(status):
        raise ZeroDivisionError

    async def endpoint():
        kit.session().add(Payment())
        yield 200

    answer = await get(kit, endpoint, method="POST", commit="on-success", veto=veto)
    assert (answer.status, type(answer.error)) == (500, ZeroDivisionError)
    assert (kit.count(), kit.checked_out()) == (0, 0)


@twice
async def test_the_application_may_finish_by_itself(kit):
    """`finish()` commits now, `finish(veto=True)` rolls back although the status is good; the rest does nothing."""

    async def endpoint():
        veto = current_scope().name == "POST /nothing"
        kit.session().add(Payment())
        await finish(kit, current_scope(), veto=veto)
        assert kit.count() == (0 if veto else 1)
        yield 500

    for path in ("/nothing", "/something"):
        answer = await get(kit, endpoint, path, method="POST", commit="on-success")
        assert (answer.status, answer.error) == (500, None)
    assert kit.count() == 1


@twice
async def test_a_session_is_dead_after_the_application_has_finished(kit):
    """It, and the registry, raise an error that names the line which finished; the request is a 500."""

    async def endpoint():
        work, session = current_scope(), kit.session()
        await finish(kit, work)
        with pytest.raises(ScopeEndedError, match=r"it ended \d+\.\d s ago at \S*test_requests.py"):
            await kit.done(session.scalars(select(Payment)))
        kit.session()
        yield 200

    answer = await get(kit, endpoint)
    assert answer.status == 500
    assert isinstance(answer.error, ScopeEndedError)
    assert "which has ended.\n" in str(answer.error)


@twice
async def test_an_application_that_never_starts_a_response_commits_nothing(kit):
    """Whoever asked gets a 500 from the server, so the work did not happen."""

    async def endpoint():
        kit.session().add(Payment())
        await kit.done(kit.session().flush())
        if not kit:
            yield 200

    answer = await get(kit, endpoint, method="POST", commit="on-success")
    assert answer.status == 500
    assert (kit.count(), kit.checked_out(), current_scope()) == (0, 0, None)


@twice
async def test_safe_methods_do_not_queue_for_the_write_lock(kit):
    """On SQLite an on-success GET begins deferred, while another writes; a POST takes the lock when it begins."""
    begun = []
    assert kit.db

    async def endpoint():
        await kit.done(kit.session().scalars(select(Payment)))
        writer = sqlite3.connect(kit.url.database, timeout=0)
        try:
            writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            begun.append((current_scope().name, "immediate"))
        else:
            begun.append((current_scope().name, "deferred"))
        writer.close()
        yield 200

    for method in ("GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "DELETE", "PATCH"):
        assert (await get(kit, endpoint, method=method, commit="on-success")).status == 200
    assert begun == [
        *((f"{safe} /", "deferred") for safe in ("GET", "HEAD", "OPTIONS", "TRACE")),
        *((f"{other} /", "immediate") for other in ("POST", "PUT", "DELETE", "PATCH")),
    ]


# -- the failures ------------------------------------------------------------------------------------------------------


@twice
async def test_failures_3_streams_hold_no_connection(kit):
    """With a pool of one and two streams open, a third request answers: the scope ended as each response started."""
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.3)
    third = []

    async def stream():
        await kit.done(kit.session().scalars(select(Payment)))
        yield 200
        yield b"1"
        if not third:
            third.append(None)
            third[0] = await ask(kit, app)
            assert await get(kit, short) == Answer(200, [b"short"])
        yield b"2"

    async def short():
        await kit.done(kit.session().scalars(select(Payment)))
        yield 200
        yield b"short"

    app = wrapped(kit, stream)
    answer = await ask(kit, app)
    assert (answer.body, answer.error) == (b"12", None)
    assert (third[0].body, third[0].error) == (b"12", None)


@twice
async def test_failures_3_a_stream_opens_its_own_scope(kit):
    """What runs after the start of the response may use the database in a scope, a transaction or a reader."""

    async def count():
        async with kit.scope("stream") as own:
            assert current_scope() is own
            return len((await kit.done(kit.session().scalars(select(Payment)))).all())

    async def write():
        async with kit.transaction() as session:
            session.add(Payment(amount=2))

    async def read():
        async with kit.reader() as session:
            return sorted((await kit.done(session.scalars(select(Payment.amount)))).all())

    async def stream():
        kit.session().add(Payment(amount=1))
        yield 200
        yield str(await count()).encode()
        await write()
        yield str(await read()).encode()

    answer = await get(kit, stream, method="POST", commit="on-success")
    assert (answer.body, answer.error) == (b"1[1, 2]", None)


@twice
async def test_failures_5_the_commit_comes_before_the_first_byte(kit):
    """The order is: COMMIT, then the start of the response; the sessions are released by then."""
    order = []
    sync = getattr(kit.db.engine, "sync_engine", kit.db.engine)
    event.listen(sync, "commit", lambda connection: order.append("commit"))

    async def endpoint():
        kit.session().add(Payment())
        yield 201
        yield b"x"

    app = wrapped(kit, endpoint, commit="on-success")
    if kit.colour == "sync":

        def outer(environ, start_response):
            def noting(status, headers, exc_info=None):
                order.append((status, kit.checked_out()))
                return start_response(status, headers)

            return app(environ, noting)

    else:

        async def outer(scope, receive, send):
            async def noting(message):
                if message["type"] == "http.response.start":
                    order.append((f"{message['status']} Said", kit.checked_out()))
                await send(message)

            await app(scope, receive, noting)

    assert (await ask(kit, outer, method="POST")).status == 201
    assert order == ["commit", ("201 Said", 0)]


@twice
async def test_failures_5_a_failed_commit_is_a_500(kit):
    """The response that the application began is never sent, whatever it does about the error."""

    async def endpoint():
        kit.session().add(Account(name="same"))
        kit.session().add(Account(name="same"))
        try:
            yield 201
        except GeneratorExit:
            raise
        except BaseException as error:
            caught.append(error)
            raise
        yield b"done"

    caught = []
    answer = await get(kit, endpoint, method="POST", commit="on-success")
    assert (answer.status, answer.chunks) == (500, [])
    assert "UNIQUE" in str(answer.error)
    assert (kit.count(Account), kit.checked_out(), current_scope()) == (0, 0, None)


@twice
async def test_failures_19_a_commit_by_hand_in_a_request_that_is_committed(kit):
    """The error names the request, and no line where its transaction began: that was the middleware's."""
    told = []

    async def endpoint():
        with pytest.raises(NotTheOwnerError) as error:
            await kit.done(kit.session().commit())
        told.append(str(error.value).splitlines())
        yield 200

    assert (await get(kit, endpoint, "/orders", method="POST", commit="on-success")).status == 200
    assert told[0][0].endswith("inside the transaction of scope 'POST /orders'.")
    assert told[0][1] == "Its owner commits when its work ends without an error."


@twice
async def test_failures_19_a_rollback_by_hand_in_a_request_that_is_committed(kit):
    """The answer is not sent, for its client would take the work for saved; the error says how to mean it."""

    async def by_hand():
        kit.session().add(Payment())
        await kit.done(kit.session().flush())
        await kit.done(kit.session().rollback())
        yield 200

    async def meant():
        kit.session().add(Payment())
        kit.db.set_rollback_only()
        yield 200

    answer = await get(kit, by_hand, method="POST", commit="on-success")
    assert answer.status == 500
    assert "`db.set_rollback_only()`" in str(answer.error)
    answer = await get(kit, meant, method="POST", commit="on-success")
    assert (answer.status, answer.error, kit.count()) == (200, None, 0)


@pytest.mark.parametrize("commit", [None, "on-success"])
@twice
async def test_failures_9_work_after_the_response_is_told(kit, commit):
    """A stream or background task that asks for the request's session learns whose it was and what to do."""
    stories = []

    async def endpoint():
        session = kit.session()
        await kit.done(session.scalars(select(Payment)))
        yield 200
        for use in (session.scalars, lambda statement: kit.db.session().scalars(statement)):
            with pytest.raises(ScopeEndedError) as told:
                await kit.done(use(select(Payment)))
            stories.append(str(told.value))
        yield b"x"

    assert (await get(kit, endpoint, "/orders", commit=commit)).status == 200
    assert kit.checked_out() == 0
    for story in stories:
        assert "ago at" not in story  # no line of the application's ended it: it would be one of the server's
        assert "of scope 'GET /orders'" in story or "in scope 'GET /orders'" in story
        assert "ended with the start of its response" in story
        assert "tests/integrations/test_requests.py:" in story
        assert "`with scope(): ...`" in story


@twice
async def test_failures_9_an_inner_scope_leaves_the_request_ended(kit):
    """After the stream's own scope the request's is current again: forgetting to open one is noticed each time."""

    async def inner():
        async with kit.scope():
            kit.session()

    async def endpoint():
        yield 200
        await inner()
        with pytest.raises(ScopeEndedError):
            kit.session()
        yield b"x"

    assert (await get(kit, endpoint)).error is None


# -- what else may fail ------------------------------------------------------------------------------------------------


@twice
async def test_a_failure_to_begin_is_an_error_of_that_request(kit, tmp_path):
    """The application gets it where it first uses the database, the server answers 500, and the next request works."""
    missing = kit.database(f"{kit.drivers['sqlite']}:///{tmp_path / 'nowhere' / 'x.db'}")

    async def endpoint():
        await kit.done(missing.session.scalars(select(Payment)))
        yield 200

    for _ in range(2):
        answer = await get(kit, endpoint, method="POST", commit="on-success")
        assert answer.status == 500
        assert "unable to open database file" in str(answer.error)
        assert current_scope() is None
    (tmp_path / "nowhere").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "nowhere" / "x.db")) as made:
        made.execute("CREATE TABLE payments (id, amount, account_id)")
    assert (await get(kit, endpoint)).status == 200


@twice
async def test_an_error_after_the_start_of_the_response_passes_through(kit):
    """What was committed with the response stays, the server gets the error, and nothing is left behind."""

    async def endpoint():
        kit.session().add(Payment())
        yield 200
        yield b"1"
        raise ZeroDivisionError

    answer = await get(kit, endpoint, method="POST", commit="on-success")
    assert (answer.status, answer.body, type(answer.error)) == (200, b"1", ZeroDivisionError)
    assert (kit.count(), kit.checked_out(), current_scope()) == (1, 0, None)


@twice
async def test_outside_of_requests_the_middleware_changes_nothing(kit):
    """After a request there is no scope that later work of the thread or task could use."""
    await get(kit, endpoint_without_database)
    assert current_scope() is None
    if kit.colour == "async":
        with pytest.raises(NoScopeError):
            kit.session()
    with scope():
        pass


# -- arguments ---------------------------------------------------------------------------------------------------------


@MIDDLEWARES
def test_options_are_checked_when_the_application_starts(module):
    """A misspelt option is no surprise of the first request."""
    for app, options, story in (
        (None, {}, "a middleware is given the application that it wraps, not None"),
        (print, {"commit": "always"}, "commit is None or \"on-success\", not 'always'"),
        (print, {"commit": True}, 'commit is None or "on-success"'),
        (print, {"commit": "on-success", "veto": 400}, "a veto is a function of the response's status, not 400"),
        (print, {"veto": bool}, 'a veto needs commit="on-success"'),
    ):
        with pytest.raises(ConfigurationError) as told:
            module.ScopeMiddleware(app, **options)
        assert story in str(told.value)


@MIDDLEWARES
def test_commit_may_be_given_by_position(module):
    """As the signature says: the application, then `commit`."""
    assert module.ScopeMiddleware(print, "on-success").app is print
