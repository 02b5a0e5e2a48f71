"""Scopes in generators: refused where they would leak, allowed where somebody always closes them (DESIGN, Scopes 3)."""

import asyncio
import contextlib
import contextvars
import re
import threading

import pytest
from sqlalchemy import text

from dbscope import ScopeEndedError, ScopeMisuseError, current_scope, scope
from tests.support import needs
from tests.support.kits import Payment, twice

# -- plain generators --------------------------------------------------------------------------------------------


def rows(kit):
    """A generator that opens a scope for its consumer."""
    with scope("rows"):
        yield from kit.session().scalars(text("SELECT 1"))


def test_scopes_3_a_plain_generator_is_refused(sync_kit):
    """A scope in a generator's frame is refused before it is current for anybody, with what to do instead."""
    generator = rows(sync_kit)
    with pytest.raises(ScopeMisuseError) as caught:
        next(generator)
    line = rows.__code__.co_firstlineno + 2
    assert re.search(rf"test_generators.py:{line}, in the frame of generator rows\(\)", str(caught.value))
    assert "`break` would leave it open" in str(caught.value)
    assert "@contextmanager" in str(caught.value)
    assert current_scope() is None


@pytest.mark.parametrize("opens", [lambda: scope("rows"), None], ids=["scope", "transaction"])
def test_scopes_3_a_stack_and_a_transaction_in_a_generator_are_refused_too(sync_kit, opens):
    """Whatever opens a scope in a generator's frame is refused: a transaction, an ExitStack in it."""
    make = opens or sync_kit.db.transaction

    def by_stack():
        with contextlib.ExitStack() as stack:
            yield stack.enter_context(make())

    def plainly():
        with make():
            yield 1

    for function in (by_stack, plainly):
        with pytest.raises(ScopeMisuseError, match=rf"in the frame of generator {function.__name__}\(\)"):
            list(function())
    assert current_scope() is None
    assert sync_kit.checked_out() == 0


async def test_scopes_3_a_plain_generator_is_refused_in_a_worker_thread_too(sync_kit):
    """Who drives a plain generator by hand is a loop, in whichever thread."""
    with pytest.raises(ScopeMisuseError, match=r"in the frame of generator rows\(\)"):
        await asyncio.to_thread(next, rows(sync_kit))


def test_scopes_3_the_first_frame_of_a_greenlet(sync_kit):
    """Above the first frame of a greenlet, such as gevent's, stands nobody: it is refused or allowed as elsewhere."""
    greenlet = needs.module("greenlet", extra="async").greenlet
    with pytest.raises(ScopeMisuseError, match=r"in the frame of generator rows\(\)"):
        greenlet(next).switch(rows(sync_kit))
    with contextlib.ExitStack() as stack:
        assert greenlet(stack.enter_context).switch(scope("work")).name == "work"
    manager = contextlib.contextmanager(rows)(sync_kit)
    assert greenlet(manager.__enter__).switch() == 1
    manager.__exit__(None, None, None)


@pytest.mark.parametrize("driver", ["async for", "anext", "task"])
async def test_scopes_3_an_async_generator_is_refused(async_kit, driver):
    """An async generator's scope is refused, however it is driven."""

    async def stream():
        async with scope("stream"):
            yield await async_kit.session().scalar(text("SELECT 1"))

    with pytest.raises(ScopeMisuseError, match=r"in the frame of generator stream\(\)"):
        if driver == "async for":
            async for _ in stream():
                break
        elif driver == "anext":
            await anext(stream())
        else:
            await asyncio.create_task(anext(stream()))
    assert current_scope() is None
    assert async_kit.checked_out() == 0


def test_scopes_3_a_generator_inside_of_a_scope_is_fine(sync_kit):
    """A generator that uses its consumer's scope, and opens none, works."""

    def numbers():
        yield from sync_kit.session().scalars(text("SELECT 1"))

    with scope("outer"):
        assert list(numbers()) == [1]


def test_scopes_3_a_function_that_a_generator_calls_is_fine(sync_kit):
    """A scope that is over before the generator yields is the function's own, and leaks to nobody."""

    def fetch():
        with scope():
            return sync_kit.session().scalar(text("SELECT 1"))

    def numbers():
        yield fetch()
        yield fetch()

    assert list(numbers()) == [1, 1]


# -- FAILURES 10 and 11: the two ways in which generators leak today ---------------------------------------------


def get_db(kit):
    """The dependency that everybody writes."""
    with kit.db.session() as session:
        yield session


def test_failures_10_next_of_a_dependency(sync_kit):
    """`next(get_db())`: the generator is collected and closes the session, which then works on in the scope, and is
    dead, and its connection back, when the scope is over."""
    with scope("request"):
        session = next(get_db(sync_kit))
        assert session.scalar(text("SELECT 1")) == 1
        assert sync_kit.checked_out() == 1
    assert sync_kit.checked_out() == 0
    with pytest.raises(ScopeEndedError, match="'request'"):
        session.scalar(text("SELECT 1"))


def test_failures_10_next_of_a_dependency_that_opens_a_scope(sync_kit):
    """`next(get_db())` where the dependency opens the scope itself: refused, with what to do."""

    def get_scoped_db():
        with scope():
            yield sync_kit.session()

    with pytest.raises(ScopeMisuseError, match="@contextmanager"):
        next(get_scoped_db())


@pytest.mark.parametrize("leaves", ["raise", "break"])
async def test_failures_11_async_for_over_a_dependency(async_kit, leaves):
    """`async for s in get_session()` never closes the generator where the body raises or breaks: the scope releases."""

    async def get_session():
        async with async_kit.db.session() as session:
            yield session

    kept = []
    with contextlib.suppress(KeyError):
        async with scope("request"):
            generator = get_session()
            kept.append(generator)  # as a traceback keeps it
            async for session in generator:
                kept.append(session)
                await session.scalar(text("SELECT 1"))
                if leaves == "raise":
                    raise KeyError
                break
            assert async_kit.checked_out() == 1
    assert async_kit.checked_out() == 0
    with pytest.raises(ScopeEndedError, match="'request'"):
        await kept[1].scalar(text("SELECT 1"))
    await generator.aclose()  # late, and harmless


@pytest.mark.parametrize("leaves", ["raise", "break"])
async def test_failures_11_async_for_over_a_dependency_that_opens_a_scope(async_kit, leaves):
    """The same where the dependency opens the scope: refused at its first step."""

    async def get_session():
        async with scope():
            yield async_kit.session()

    with pytest.raises(ScopeMisuseError, match="@asynccontextmanager"):
        async for _ in get_session():
            pytest.fail("the body ran")


# -- where somebody always closes --------------------------------------------------------------------------------


@twice
async def test_scopes_3_contextmanager(kit):
    """Under @contextmanager and @asynccontextmanager a scope is its block's, is left with it, and sees its errors."""

    if kit.colour == "sync":

        @contextlib.contextmanager
        def work():
            with scope("work", commit="on-success"):
                yield kit.session()
    else:

        @contextlib.asynccontextmanager
        async def work():
            async with scope("work", commit="on-success"):
                yield kit.session()

    async with kit.block(work()) as session:
        assert kit.session() is session
        session.add(Payment(amount=1))
    assert current_scope() is None
    with pytest.raises(KeyError):
        async with kit.block(work()) as session:
            session.add(Payment(amount=2))
            await kit.done(session.flush())
            raise KeyError
    assert kit.amounts() == [1]
    assert current_scope() is None


@twice
async def test_scopes_3_exit_stacks(kit):
    """ExitStack and AsyncExitStack may enter a scope, directly and by @contextmanager, and leave in reverse order."""

    @contextlib.contextmanager
    def work():
        with scope("inner"):
            yield

    if kit.colour == "sync":
        with contextlib.ExitStack() as stack:
            outer = stack.enter_context(scope("outer"))
            assert "test_generators.py" in outer.describe()
            stack.enter_context(work())
            kit.session().execute(text("SELECT 1"))
            assert current_scope().name == "inner"
    else:
        async with contextlib.AsyncExitStack() as stack:
            outer = await stack.enter_async_context(scope("outer"))
            assert "test_generators.py" in outer.describe()
            stack.enter_context(work())
            assert current_scope().name == "inner"
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(scope("outer"))
            await kit.session().execute(text("SELECT 1"))
    assert current_scope() is None
    assert kit.checked_out() == 0


@pytest.fixture
def scoped(sync_kit):
    """A sync generator fixture that opens a scope for its test."""
    with scope("fixture"):
        yield sync_kit.session()


def test_scopes_3_a_fixture_opens_its_tests_scope(sync_kit, scoped):
    """pytest's generator fixtures may open the scope that the test then runs in."""
    assert current_scope().name == "fixture"
    assert sync_kit.session() is scoped


@pytest.fixture
async def async_scoped(async_kit):
    """An async generator fixture, run by pytest-asyncio."""
    async with scope("async fixture"):
        yield async_kit.session()


async def test_scopes_3_a_fixture_of_pytest_asyncio(async_kit, async_scoped):
    """pytest-asyncio's async generator fixtures may open a scope, and the session works in the test."""
    assert await async_scoped.scalar(text("SELECT 1")) == 1


ANYIO = """
import pytest
from dbscope import AsyncDatabase, current_scope, scope
from sqlalchemy import text

@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param

@pytest.fixture
async def session(anyio_backend, tmp_path):
    async with AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}") as db:
        async with scope("fixture"):
            yield db.session()
        assert db.engine.pool.checkedout() == 0

@pytest.mark.anyio
async def test_it(session):
    assert await session.scalar(text("SELECT 1")) == 1
    assert current_scope().name == "fixture"
"""


def test_scopes_3_a_fixture_of_anyio(async_kit, tmp_path):
    """AnyIO's pytest plugin runs async generator fixtures in a task of its own: they may open a scope, too."""
    import subprocess
    import sys

    needs.module("anyio", extra="async")
    (tmp_path / "test_it.py").write_text(ANYIO)
    unneeded = [f"-pno:{name}" for name in ("cacheprovider", "xdist", "asyncio", "hypothesispytest")]
    options = ["-q", *unneeded, "-W", "error", "test_it.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


# -- FastAPI's dependencies, by the calls that FastAPI makes -----------------------------------------------------


@pytest.fixture
def run_sync():
    """AnyIO's way into a worker thread."""
    return needs.module("anyio.to_thread", extra="async").run_sync


@contextlib.asynccontextmanager
async def contextmanager_in_threadpool(manager, run_sync):
    """What `fastapi.concurrency` does with a sync generator dependency: each half in a worker thread."""
    try:
        yield await run_sync(manager.__enter__)
    except Exception as error:
        if not await run_sync(manager.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await run_sync(manager.__exit__, None, None, None)


async def test_scopes_3_a_sync_dependency_is_told_of_the_middleware(sync_kit, run_sync):
    """FastAPI runs a sync generator dependency in worker threads, each in a copy of the context: no endpoint would see
    its scope. It is refused, and the error names the middleware."""

    def dependency():
        with scope("request"):
            yield sync_kit.session()

    manager = contextlib.contextmanager(dependency)()
    async with contextlib.AsyncExitStack() as stack:
        with pytest.raises(ScopeMisuseError, match=r"dbscope\.integrations\.asgi\.ScopeMiddleware") as caught:
            await stack.enter_async_context(contextmanager_in_threadpool(manager, run_sync))
    assert "async def" in str(caught.value)
    assert current_scope() is None


def dependency():
    """A dependency that opens a scope."""
    with scope("request"):
        yield


async def test_scopes_3_a_sync_dependency_in_the_loops_executor_is_told_too():
    """The same in a thread of asyncio's own."""
    manager = contextlib.contextmanager(dependency)()
    with pytest.raises(ScopeMisuseError, match="ScopeMiddleware"):
        await asyncio.to_thread(manager.__enter__)


def test_scopes_3_a_sync_dependency_in_a_bare_thread_is_told_too(monkeypatch):
    """And in a thread that was made for it."""
    caught = []
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_value))
    thread = threading.Thread(target=contextlib.contextmanager(dependency)().__enter__)
    thread.start()
    thread.join()
    assert isinstance(caught[0], ScopeMisuseError)
    assert "ScopeMiddleware" in str(caught[0])


def test_scopes_3_an_async_context_manager_may_be_entered_by_anyio_itself():
    """What is refused in a worker thread, which copies the context, is allowed in a task, which has its own."""
    anyio = needs.module("anyio", extra="async")

    @contextlib.asynccontextmanager
    async def service():
        async with scope("service") as work:
            yield work

    manager = service()
    assert anyio.run(manager.__aenter__).name == "service"  # the loop's end closes the generator
    assert current_scope() is None


@pytest.mark.parametrize("fails", [False, True])
async def test_scopes_3_an_async_dependency_opens_the_requests_scope(async_kit, run_sync, fails):
    """FastAPI enters an async generator dependency by @asynccontextmanager on an AsyncExitStack: its scope is seen by
    the endpoint, async or in a worker thread, and left with the request's outcome."""

    async def dependency():
        async with scope("request", commit="on-success"):
            yield async_kit.session()

    async def endpoint(session):
        assert async_kit.session() is session
        assert (await run_sync(current_scope)).name == "request"
        session.add(Payment())
        await session.flush()
        if fails:
            raise KeyError

    with contextlib.suppress(KeyError):
        async with contextlib.AsyncExitStack() as stack:
            await endpoint(await stack.enter_async_context(contextlib.asynccontextmanager(dependency)()))
    assert current_scope() is None
    assert async_kit.checked_out() == 0
    assert async_kit.count() == (not fails)


async def test_scopes_3_a_sync_dependency_that_only_takes_the_session(sync_kit, run_sync):
    """A sync dependency that opens no scope, in a request that has one, gives the endpoint the request's session,
    whatever context its halves run in; its late clean-up is harmless."""

    def dependency():
        session = sync_kit.session()
        try:
            yield session
        finally:
            session.close()

    async with scope("request"):
        async with contextmanager_in_threadpool(contextlib.contextmanager(dependency)(), run_sync) as session:
            assert sync_kit.session() is session
            assert await run_sync(session.scalar, text("SELECT 1")) == 1
        late = contextmanager_in_threadpool(contextlib.contextmanager(dependency)(), run_sync)
        await late.__aenter__()
    await late.__aexit__(None, None, None)
    assert sync_kit.checked_out() == 0


def test_scopes_3_a_context_of_its_own_leaves_this_one_alone(sync_kit):
    """A scope that is opened in a copy of the context is not current here, also while it is open."""
    context = contextvars.copy_context()
    work = scope("elsewhere")
    context.run(work.__enter__)
    assert current_scope() is None
    context.run(work.__exit__, None, None, None)
    assert context.run(current_scope) is None
