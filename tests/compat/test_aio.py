"""Statements 15 to 17: `async_scoped_session`, by compat's name."""

import asyncio

import pytest
from sqlalchemy import select, text

from tests.compat.conftest import Base, Payment
from tests.support import needs

needs.module("greenlet", extra="async")
needs.module("aiosqlite", extra="aiosqlite")

from sqlalchemy.ext import asyncio as sqlalchemy_asyncio  # noqa: E402
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine  # noqa: E402

from dbscope.compat import async_scoped_session, scoped_session  # noqa: E402


@pytest.fixture
async def aengine(tmp_path):
    """An async engine over a SQLite file with the table; nothing may be checked out when the test is over."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/payments.sqlite")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    held = engine.pool.checkedout()
    await engine.dispose()
    assert held == 0


@pytest.fixture
async def S(aengine):
    """A registry of the tasks' sessions."""
    registry = async_scoped_session(async_sessionmaker(aengine), asyncio.current_task)
    yield registry
    for session in registry.registry.registry.values():
        await session.close()


def test_statement_15_the_constructor_and_what_it_exposes():
    """A scopefunc is required; the class is SQLAlchemy's async registry, and not the sync one."""
    factory = async_sessionmaker()
    with pytest.raises(TypeError, match="scopefunc"):
        async_scoped_session(factory)
    S = async_scoped_session(factory, scopefunc=lambda: 1)
    assert S._support_async is True
    assert S.session_factory is factory
    assert isinstance(S, sqlalchemy_asyncio.async_scoped_session)
    assert not isinstance(S, scoped_session.__mro__[1])
    assert S() is S() is S._proxied is S.registry.registry[1]
    assert isinstance(S.registry.registry, dict)


async def test_statement_15_each_task_has_its_own(S):
    """With the task as the key, two tasks never share a session."""
    assert await asyncio.create_task(session_of(S)) is not S()


async def test_statement_16_remove_closes_and_then_forgets(S, aengine):
    """`await remove()` rolls back, gives the connection back, and the next call makes a new session."""
    await S.remove()
    assert not S.registry.has()
    first = S()
    S.add(Payment(id=1))
    await S.flush()
    assert aengine.pool.checkedout() == 1
    await S.remove()
    assert aengine.pool.checkedout() == 0
    assert S() is not first
    assert await S.get(Payment, 1) is None


async def test_statement_16_a_session_that_fails_to_close_is_forgotten(aengine):
    """A raising `close()` is raised by `await remove()`, and its session is not handed out again."""

    class BadClose(AsyncSession):
        async def close(self):
            raise OSError("closing failed")

    S = async_scoped_session(async_sessionmaker(aengine, class_=BadClose), asyncio.current_task)
    S()
    with pytest.raises(OSError, match="closing failed"):
        await S.remove()
    assert S.registry.registry == {}


async def test_statement_16_empty_sessions_of_finished_tasks_go(S):
    """A hundred tasks that closed their sessions, and did not remove them, leave no hundred entries."""
    for way in (session_of, closed, given):
        for _ in range(100):
            await asyncio.create_task(way(S))
        assert len(S.registry.registry) < 10


async def test_statement_16_what_may_be_needed_of_a_finished_task_stays(S):
    """A session whose object is alive, or whose transaction is open, is still there when its task is done."""
    payment = await asyncio.create_task(loaded(S))
    sessions = list(S.registry.registry.values())
    held = await asyncio.create_task(session_of(S))
    await held.execute(text("SELECT 1"))
    for _ in range(100):
        await asyncio.create_task(closed(S))
    entries = list(S.registry.registry.values())
    assert held in entries
    assert sessions[0] in entries
    assert S.object_session(payment) is sessions[0].sync_session
    await held.close()
    await sessions[0].close()
    for _ in range(20):
        await asyncio.create_task(closed(S))
    assert held not in S.registry.registry.values()


async def test_statement_16_what_was_removed_is_not_looked_for(S):
    """Tasks that did remove their sessions leave nothing behind, in the dictionary and beside it."""
    for _ in range(30):
        await asyncio.create_task(removed(S))
    assert S.registry.registry == {}
    assert len(S.registry._done) <= 2


async def test_statement_16_other_keys_stay_as_they_are(aengine):
    """An entry whose key is no task is its application's to remove, as in SQLAlchemy."""
    key = 0
    S = async_scoped_session(async_sessionmaker(aengine), lambda: key)
    for number in range(30):
        key = number
        S()
    assert len(S.registry.registry) == 30


async def test_statement_17_what_is_added_and_what_is_not(S, aengine):
    """The registry streams, and begins, as an `AsyncSession`; what that lacks, it lacks too."""
    async with S.begin():
        S.add_all([Payment(id=1), Payment(id=2)])
    result = await S.stream(select(Payment.id).order_by(Payment.id))
    assert [row.id async for row in result] == [1, 2]
    assert [id async for id in await S.stream_scalars(select(Payment.id).order_by(Payment.id))] == [1, 2]
    await S.invalidate()
    await S.aclose()
    for name in ("close_all", "object_session", "identity_key"):
        assert getattr(async_scoped_session, name).__self__ is not None
    for name in ("query", "query_property", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"):
        assert not hasattr(S, name)


async def test_statement_17_every_public_member_of_a_session_is_there(S):
    """Nothing public of an `AsyncSession` is missing on the registry, and it is the current session's."""
    public = {name for name in {*dir(S()), *vars(S())} if not name.startswith("_")}
    assert [name for name in sorted(public) if not hasattr(S, name)] == []
    assert S.sync_session is S().sync_session
    assert not S.in_transaction()
    await S.execute(text("SELECT 1"))
    assert S.in_transaction()
    await S.remove()


async def session_of(S):
    """The task's session."""
    return S()


async def closed(S):
    """Use the task's session, and close it."""
    async with S() as session:
        await session.execute(text("SELECT 1"))


async def given(S):
    """Put a session into the registry by hand, and close it."""
    S(autoflush=False)
    await S.execute(text("SELECT 1"))
    await S.close()


async def loaded(S):
    """An object that was loaded by the task's session, its transaction being over."""
    payment = Payment()
    S.add(payment)
    await S.commit()
    return payment


async def removed(S):
    """Use the task's session, and remove it."""
    await S.execute(text("SELECT 1"))
    await S.remove()
