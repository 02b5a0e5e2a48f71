"""A session that goes on after a failure: FAILURES 8, 28."""

import logging
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError

from dbscope import guards
from dbscope.guards.policy import Found
from tests.support.kits import Account, Kit, Payment, SyncKit, twice

HERE = Path(__file__).name


async def fail(kit: Kit, session: Any) -> None:
    """Insert a duplicate, and swallow the error."""
    async with kit.transaction(kit.db, new=True) as other:
        other.add(Account(id=1, name="a"))
    session.add(Account(id=1, name="b"))
    with pytest.raises(IntegrityError):
        await kit.done(session.flush())


async def pending(kit: Kit, session: Any) -> PendingRollbackError:
    """The error of who goes on."""
    with pytest.raises(PendingRollbackError) as caught:
        await kit.done(session.scalar(text("SELECT 42")))
    return caught.value


@twice
async def test_failures_8_the_error_quotes_the_first_failure(kit: Kit, found: list[Found]) -> None:
    """Statement, line and what the server said; in a plain scope, and not the parameters."""
    async with kit.scope():
        session = kit.session()
        await fail(kit, session)
        error = await pending(kit, session)
        (note,) = error.__notes__
        for part in (
            f"The first failure: the statement at tests/guards/{HERE}:",
            "'INSERT INTO accounts ",
            "IntegrityError: UNIQUE constraint failed: accounts.id",
            "`session.rollback()`",
        ):
            assert part in note
        again = await pending(kit, session)
        assert again.__notes__ == [note]
        await kit.done(session.rollback())
        assert await kit.done(session.scalar(text("SELECT 42"))) == 42
    assert [fact.guard for fact in found] == ["pending_rollback"] * 2


@twice
async def test_failures_8_the_next_pass_works(kit: Kit) -> None:
    """With a scope for each pass, what fails in one is over in the next."""
    with pytest.raises(PendingRollbackError):
        async with kit.scope():
            session = kit.session()
            await fail(kit, session)
            await kit.done(session.commit())
    async with kit.scope():
        assert await kit.done(kit.session().scalar(text("SELECT 42"))) == 42


@twice
async def test_failures_8_each_transaction_has_its_own_first_failure(kit: Kit) -> None:
    """What was rolled back is forgotten, be it a whole transaction or a savepoint."""
    async with kit.scope():
        session = kit.session()
        await fail(kit, session)
        await kit.done(session.rollback())
        nested = await kit.done(session.begin_nested())
        session.add(Account(id=1, name="c"))
        with pytest.raises(IntegrityError):
            await kit.done(session.flush())
        assert "accounts.id" in (await pending(kit, session)).__notes__[0]
        await kit.done(nested.rollback())
        session.add(Payment(id=1))
        session.add(Account(id=2, name="a"))
        with pytest.raises(IntegrityError):
            await kit.done(session.flush())
        (note,) = (await pending(kit, session)).__notes__
        assert "accounts.name" in note
        assert "accounts.id" not in note.partition("IntegrityError")[2]
        await kit.done(session.rollback())


@twice
async def test_failures_8_a_flush_that_fails_in_python(kit: Kit) -> None:
    """No statement failed: the line of the flush, and the error."""

    def refuse(mapper: Any, connection: Any, target: Any) -> None:
        raise ValueError("not today")

    event.listen(Payment, "before_insert", refuse)
    try:
        async with kit.scope():
            session = kit.session()
            session.add(Payment())
            with pytest.raises(ValueError, match="not today"):
                await kit.done(session.flush())
            (note,) = (await pending(kit, session)).__notes__
            assert f"the flush at tests/guards/{HERE}:" in note
            assert "failed: ValueError: not today" in note
    finally:
        event.remove(Payment, "before_insert", refuse)


@twice
async def test_failures_8_in_a_block_its_owner_is_named_besides(kit: Kit) -> None:
    """There nobody but the block rolls back: the note does not ask for it."""
    with pytest.raises(PendingRollbackError) as caught:
        async with kit.transaction() as session:
            session.add(Account(id=1, name="a"))
            await kit.done(session.flush())
            session.add(Account(id=2, name="a"))
            with pytest.raises(IntegrityError):
                await kit.done(session.flush())
            await kit.done(session.scalar(text("SELECT 42")))
    notes = "\n".join(caught.value.__notes__)
    assert "The first failure: the statement at " in notes
    assert "Inside the transaction (begun at " in notes
    assert "`session.rollback()`" not in notes
    assert kit.count(Account) == 0


@twice
async def test_failures_8_off_and_log(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """Off leaves the error as it is; "log" says it besides."""
    async with kit.scope():
        session = kit.session()
        await fail(kit, session)
        guards.configure(pending_rollback="off")
        assert not getattr(await pending(kit, session), "__notes__", [])
        guards.configure(pending_rollback="log")
        with caplog.at_level(logging.WARNING, "dbscope.guards"):
            await pending(kit, session)
        await kit.done(session.rollback())
    assert "pending_rollback: The first failure: " in caplog.text


@twice
async def test_failures_28_on_postgresql_an_error_without_a_savepoint(server_kit: Kit) -> None:
    """A duplicate that was flushed: the session refuses, and quotes it."""
    kit = server_kit
    async with kit.scope():
        session = kit.session()
        await fail(kit, session)
        (note,) = (await pending(kit, session)).__notes__
        await kit.done(session.rollback())
    assert "'INSERT INTO accounts " in note
    assert "duplicate key value violates unique constraint" in note


@twice
async def test_failures_8_a_lost_connection(server_kit: Kit) -> None:
    """The statement during which it was lost is quoted to those who go on."""
    kit = server_kit
    async with kit.scope():
        session = kit.session()
        backend = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
        with kit.outside.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:backend, 5000)"), {"backend": backend})
        with pytest.raises(DBAPIError):
            await kit.done(session.scalar(text("SELECT 41")))
        (note,) = (await pending(kit, session)).__notes__
        assert f"The first failure: the statement at tests/guards/{HERE}:" in note
        assert "'SELECT 41'" in note


def test_failures_8_the_line_is_that_of_the_autoflush(sync_kit: SyncKit) -> None:
    """A query flushes before it is sent: its line failed."""
    kit = sync_kit
    with kit.db.transaction() as session:
        session.add(Account(id=1, name="a"))
    with kit.db.new_session() as session:
        session.add(Account(id=1, name="b"))
        with pytest.raises(IntegrityError):
            session.query(Account).all()
        with pytest.raises(PendingRollbackError) as caught:
            session.query(Payment).all()
        session.rollback()
    assert "'INSERT INTO accounts " in caught.value.__notes__[0]
