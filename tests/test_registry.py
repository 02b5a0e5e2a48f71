"""`db.session`: a drop-in for SQLAlchemy's registries, over scopes (the statements about these, 1 to 12)."""

import asyncio
import contextvars
import inspect
import itertools
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, orm, select, text
from sqlalchemy.exc import InvalidRequestError, SAWarning
from sqlalchemy.orm import Query, Session

from dbscope import ConfigurationError, Database, OverlapError, ScopeEndedError, scope
from tests.support.kits import LIMIT, Payment, twice


@twice
async def test_statement_01_what_it_exposes(kit):
    """The registry has the attributes that integrations look at, and its factory makes such sessions as it does."""
    S = kit.db.session
    assert S._support_async is kit.db.is_async
    async with kit.scope():
        assert S() is S._proxied is S.registry()
        loose = S.session_factory()
        assert type(loose) is type(S())
        assert loose is not S()


@twice
async def test_frameworks_take_it_for_a_coroutine_function(kit):
    """Without parameters, and with the session's class; what a program calls gives the session, as it always did."""
    S = kit.db.session
    seen = S.__call__  # as an attribute, which is not where a call looks
    assert inspect.iscoroutinefunction(seen)
    assert not inspect.iscoroutinefunction(type(S).__call__)
    assert not inspect.signature(S).parameters
    async with kit.scope():
        session = S()
        assert isinstance(session, inspect.signature(S).return_annotation)
        assert await session is session  # as a framework does with what it has called
        assert await seen() is session
    beside = kit.db.apart("migration")
    assert inspect.iscoroutinefunction(beside.session.__call__)
    await kit.done(beside.dispose())


@twice
async def test_statement_02_one_session_for_each_scope(kit):
    """The session is made at the first call in a scope, and is the same until the scope ends."""
    S = kit.db.session
    async with kit.scope():
        assert not S.registry.has()
        first = S()
        assert S() is first
        async with kit.scope():
            assert S() is not first
        assert S() is first
    async with kit.scope():
        assert S() is not first


@twice
async def test_statement_03_options_for_the_first_call(kit):
    """Options go to the factory where the call makes the session, and are refused where it is there."""
    S = kit.db.session
    async with kit.scope():
        session = S(autoflush=False)
        assert session.autoflush is False
        assert S() is session
        with pytest.raises(InvalidRequestError, match=r"^Scoped session is already present; no new arguments"):
            S(autoflush=True)


@twice
async def test_statement_05_configure(kit):
    """`configure` reaches the sessions made later, and says so where one is there already."""
    S = kit.db.session
    async with kit.scope():
        S.configure(autoflush=False)
        assert S().autoflush is False
        with pytest.warns(SAWarning, match=r"already present.  configure\(\) can not affect"):
            S.configure(autoflush=True)
        assert S().autoflush is False
    async with kit.scope():
        assert S().autoflush is True


@twice
async def test_statement_06_remove(kit):
    """`remove()` makes nothing; where there is a session it rolls back, and the next call makes a new one."""
    S = kit.db.session
    async with kit.scope():
        await kit.done(S.remove())
        assert not S.registry.has()
        first = S()
        first.add(Payment())
        await kit.done(first.flush())
        assert kit.checked_out() == 1
        await kit.done(S.remove())
        assert kit.checked_out() == 0
        assert not S.registry.has()
        assert S() is not first
        await kit.done(first.close())
        with pytest.raises(ScopeEndedError, match=r"it was removed .* at .*test_registry.py"):
            await kit.done(first.execute(text("SELECT 1")))
    assert kit.count() == 0


@twice
async def test_statement_06_a_session_that_fails_to_close_is_forgotten(kit):
    """A raising `close()` is raised by `remove()`; its connection is back, and it is not handed out again."""
    db = kit.database()
    tries = itertools.count(1)
    if db.is_async:
        from sqlalchemy.ext.asyncio import AsyncSession

        class BadClose(AsyncSession):
            async def close(self):
                raise OSError(f"closing failed, {next(tries)}")

    else:

        class BadClose(Session):
            def close(self):
                raise OSError(f"closing failed, {next(tries)}")

    S = kit.database(db.engine, session_class=BadClose).session
    async with kit.scope():
        broken = S()
        await kit.done(broken.execute(text("SELECT 1")))
        with pytest.raises(OSError, match="closing failed, 1"):
            await kit.done(S.remove())
        assert not S.registry.has()
        assert kit.checked_out() == 0
        with pytest.raises(ScopeEndedError):
            await kit.done(broken.execute(text("SELECT 1")))


def test_statement_06_what_another_thread_is_using_stays(sync_kit):
    """`remove()` is refused while another thread uses the session, which stays, with its work."""
    S = sync_kit.db.session
    flushing, tried = threading.Event(), threading.Event()

    @event.listens_for(S, "before_flush")
    def wait(*_):
        flushing.set()
        tried.wait(LIMIT)

    def write():
        S.add(Payment())
        S.commit()

    with scope(), ThreadPoolExecutor(1) as threads:
        session = S()
        writing = threads.submit(contextvars.copy_context().run, write)
        assert flushing.wait(LIMIT)
        try:
            with pytest.raises(OverlapError, match=r"session\.close\(\) was called"):
                S.remove()
            assert S() is session
        finally:
            tried.set()
        writing.result()
    assert sync_kit.count() == 1


async def test_statement_06_what_another_task_has_written_stays(async_kit):
    """`remove()` is refused while a task that wrote in the session still runs; the session stays, with its work."""
    S = async_kit.db.session
    wrote, tried = asyncio.Event(), asyncio.Event()

    async def write():
        S.add(Payment())
        await S.flush()
        wrote.set()
        await tried.wait()
        await S.commit()

    async with scope():
        session = S()
        writing = asyncio.create_task(write())
        await wrote.wait()
        try:
            with pytest.raises(OverlapError, match=r"is still running"):
                await S.remove()
            assert S() is session
        finally:
            tried.set()
        await writing
    assert async_kit.count() == 1


@twice
async def test_statement_06_remove_in_a_managed_transaction(kit):
    """Inside a block of somebody's, `remove()` waits: the owner's work is committed."""
    S = kit.db.session
    async with kit.transaction():
        S.add(Payment())
        await kit.done(S.remove())
        S.add(Payment())
    assert kit.count() == 2


def test_statement_07_query_property(sync_kit):
    """`query_property` gives mapped classes a query of the current scope's session."""

    class Mine(Query):
        pass

    class Model(Payment):
        query = sync_kit.db.session.query_property()
        mine = sync_kit.db.session.query_property(Mine)

    with scope():
        assert Model.query.session is sync_kit.session()
        assert isinstance(Model.mine, Mine)
        assert Model.query.all() == []


@twice
async def test_statement_08_methods_reach_the_session(kit):
    """What is called on the registry happens in the current scope's session."""
    S = kit.db.session
    async with kit.scope():
        payment = Payment(id=1)
        S.add(payment)
        assert payment in S
        assert list(S) == [payment]
        await kit.done(S.flush())
        assert await kit.done(S.scalar(select(Payment.amount))) == 500
        assert await kit.done(S.get(Payment, 1)) is payment
        await kit.done(S.rollback())
        assert payment not in S


@twice
async def test_statement_09_attributes_can_be_read_and_set(kit):
    """Attributes are the current session's; what a session lets be set can be set, and nothing else."""
    S = kit.db.session
    async with kit.scope():
        assert S.bind is kit.db.engine
        S.autoflush = False
        assert S().autoflush is False
        payment = Payment()
        S.add(payment)
        assert list(S.new) == [payment]
        assert not S.dirty
        assert not S.deleted
        assert S.is_active
        assert S.info is S().info
        with S.no_autoflush:
            pass
        for name in ("dirty", "deleted", "new", "is_active", "no_autoflush", "info"):
            with pytest.raises(AttributeError):
                setattr(S, name, None)
        assert type(S).object_session(payment) is getattr(S(), "sync_session", S())
        assert type(S).identity_key(Payment, 1) == Session.identity_key(Payment, 1)
        S.expunge(payment)


@twice
async def test_statement_10_every_public_member_of_a_session_is_there(kit):
    """Nothing public of a session is missing on the registry, or differs from the current session's."""
    S = kit.db.session
    async with kit.scope():
        session = S()
        public = {name for name in {*dir(session), *vars(session)} if not name.startswith("_")}
        assert [name for name in sorted(public) if not hasattr(S, name)] == []
        assert not S.in_transaction()
        await kit.done(session.connection())
        assert S.in_transaction()
        assert S.get_transaction() is session.get_transaction()
        if not kit.db.is_async:
            S.expire_on_commit = False
            assert session.expire_on_commit is False


@twice
async def test_statement_10_begin_is_the_sessions(kit):
    """`S.begin()` begins, commits and rolls back as the session's does."""
    S = kit.db.session
    async with kit.scope():
        async with kit.block(S.begin()):
            S.add(Payment())
        with pytest.raises(KeyError):
            async with kit.block(S.begin()):
                S.add(Payment())
                raise KeyError("the work's")
    assert kit.count() == 1


@twice
async def test_statement_11_a_closed_session_stays_registered(kit):
    """`with S() as session`, twice in one scope, gives the same session, which works again."""
    S = kit.db.session
    async with kit.scope():
        async with kit.block(S()) as first:
            await kit.done(first.execute(text("SELECT 1")))
            assert kit.checked_out() == 1
        assert kit.checked_out() == 0
        async with kit.block(S()) as second:
            assert second is first
            await kit.done(second.execute(text("SELECT 1")))


def test_statement_12_it_is_a_scoped_session(sync_kit):
    """What checks `isinstance`, or listens to events on the registry, works with a database's."""
    S = sync_kit.db.session
    assert isinstance(S, orm.scoped_session)
    seen = []
    event.listen(S, "before_commit", seen.append)
    with scope():
        S.execute(text("SELECT 1"))
        S.commit()
        assert seen == [S()]


async def test_statement_15_its_async_twin_is_an_async_scoped_session(async_kit):
    """An async database's registry is one of SQLAlchemy's async registries."""
    from sqlalchemy.ext.asyncio import async_scoped_session

    assert isinstance(async_kit.db.session, async_scoped_session)


@twice
async def test_statement_13_the_look_up_has_a_registrys_methods(kit):
    """`registry.has`, `set` and `clear` act on the current scope; a stranger's session is refused."""
    S = kit.db.session
    async with kit.scope():
        mine = kit.db.new_session()
        S.registry.set(mine)
        assert S() is mine
        S.registry.clear()
        S.registry.clear()
        assert not S.registry.has()
        await kit.done(mine.close())
        with pytest.raises(ConfigurationError, match="was not made by"):
            S.registry.set(Session())


def test_the_twins_have_the_same_members():
    """What one registry defines by itself, the other does too."""
    from dbscope.registry import SessionRegistry
    from tests.support import needs

    needs.module("greenlet", extra="async")
    from dbscope.aio import AsyncSessionRegistry

    own = ("__init__", "__call__", "remove", "__repr__")
    for name in own:
        one, other = getattr(SessionRegistry, name), getattr(AsyncSessionRegistry, name)
        assert list(inspect.signature(one).parameters) == list(inspect.signature(other).parameters)
    assert inspect.iscoroutinefunction(AsyncSessionRegistry.remove)


def test_a_database_says_whose_session_it_is():
    """The registry's `repr` names the database, and opens no session."""
    with Database("sqlite://", name="the ledger") as db:
        assert repr(db.session) == "<the session of the ledger in the current scope>"
        assert not db.session.registry.has()


@pytest.mark.parametrize(
    "use", [lambda db: db.session.add(Payment()), lambda db: db.session.new, lambda db: db.session()]
)
@twice
async def test_tracebacks_quote_nothing_that_is_not_there(kit, use):
    """The members are generated: neither a line of another file's is shown, nor how the look-up was done."""
    async with kit.scope():
        inherited = contextvars.copy_context()
    with pytest.raises(ScopeEndedError) as caught:
        inherited.run(use, kit.db)
    shown = "".join(traceback.format_exception(caught.value))
    assert "KeyError" not in shown
    generated = [frame for frame in caught.traceback if "(generated)" in str(frame.frame.code.raw.co_filename)]
    assert not any(traceback.FrameSummary(str(frame.path), frame.lineno + 1, "").line for frame in generated)
    assert "import" not in shown
