"""A transaction that PostgreSQL has aborted cannot be committed without anybody noticing (failures 2 and 28)."""

import contextlib

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from dbscope import TransactionAbortedError
from tests.support.kits import AsyncKit, Payment, make_kit, twice
from tests.support.lines import marked

BROKEN = "SELECT broken"
CLIENT_SIDE = select(func.abs(text("CAST(:number AS integer)").bindparams(number=object())))  # no driver can send it


class AsyncPsycopgKit(AsyncKit):
    """Async, by psycopg."""

    drivers = {"postgresql": "postgresql+psycopg"}


@pytest.fixture(params=["psycopg", "psycopg, async", "asyncpg"])
def server_kit(request, postgres_url):
    """PostgreSQL by each driver: psycopg knows how a transaction stands, asyncpg has to ask."""
    if request.param == "psycopg":
        return make_kit("sync", postgres_url)
    kit = make_kit("async", postgres_url)
    return AsyncPsycopgKit(postgres_url) if "psycopg" in request.param else kit


async def fail(kit, session, statement=BROKEN):
    """Execute a statement that fails, and swallow the error; the line that ran it."""
    with pytest.raises(DBAPIError):
        await kit.done(session.execute(text(statement) if isinstance(statement, str) else statement))  # fails
    return marked("fails")


@twice
async def test_a_block_that_swallowed_an_error_cannot_commit(server_kit):
    """Leaving the block raises, and quotes the statement that failed, its error and the line that ran it."""
    kit = server_kit
    hooks = []
    with pytest.raises(TransactionAbortedError) as caught:
        async with kit.transaction() as session:
            session.add(Payment())
            kit.db.on_commit(hooks.append, "committed")
            kit.db.on_rollback(hooks.append, "rolled back")
            await kit.done(session.flush())
            place = await fail(kit, session)
    said = str(caught.value)
    assert f"since the statement at tests/{place} failed: 'SELECT broken', UndefinedColumn" in said
    assert 'column "broken" does not exist.\n' in said
    assert said.startswith("the commit of the transaction (begun at tests/")
    assert (kit.count(), hooks, kit.checked_out()) == (0, ["rolled back"], 0)


@twice
async def test_the_users_own_commit_cannot_either(server_kit):
    """In a plain scope `session.commit()` raises, as do the commits of its transaction and of its connection."""
    kit = server_kit
    async with kit.scope():
        session = kit.session()
        for commit in ("session", "transaction", "connection"):
            session.add(Payment())
            await kit.done(session.flush())
            await fail(kit, session)
            of = {"session": session, "transaction": session.get_transaction()}
            with pytest.raises(TransactionAbortedError, match=f"^the commit at tests/test_aborted.py:.*{BROKEN}"):
                await kit.done((of.get(commit) or await kit.done(session.connection())).commit())
            await kit.done(session.rollback())
        session.add(Payment())
        await kit.done(session.commit())
    assert kit.count() == 1


@twice
async def test_an_on_success_scope_cannot_either(server_kit):
    """The end of the scope raises, and nothing is left checked out."""
    kit = server_kit
    with pytest.raises(TransactionAbortedError, match=BROKEN):
        async with kit.scope(commit="on-success"):
            session = kit.session()
            session.add(Payment())
            await kit.done(session.flush())
            await fail(kit, session)
    assert (kit.count(), kit.checked_out()) == (0, 0)


@twice
async def test_a_savepoint_around_the_failure_mends_it(server_kit):
    """Where the failing part was rolled back to a savepoint, the rest is committed."""
    kit = server_kit
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        await kit.done(session.flush())
        with pytest.raises(DBAPIError):
            async with kit.transaction(nested=True):
                await kit.done(session.execute(text(BROKEN)))
        savepoint = await kit.done(session.begin_nested())
        await fail(kit, session)
        await kit.done(savepoint.rollback())
        await kit.done(session.execute(text("SAVEPOINT by_hand")))
        await fail(kit, session)
        await kit.done(session.execute(text("ROLLBACK TO SAVEPOINT by_hand")))
        session.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]


@twice
async def test_a_failure_after_a_mended_one_counts(server_kit):
    """A rolled-back savepoint mends what failed inside of it, and nothing that fails later."""
    kit = server_kit
    with pytest.raises(TransactionAbortedError, match="SELECT later"):
        async with kit.transaction() as session:
            with pytest.raises(DBAPIError):
                async with kit.transaction(nested=True):
                    await kit.done(session.execute(text(BROKEN)))
            await fail(kit, session, "SELECT later")


@twice
async def test_an_error_on_the_clients_side_aborts_nothing(server_kit):
    """What the driver refused by itself never reached the server: the transaction is committed."""
    kit = server_kit
    async with kit.transaction() as session:
        session.add(Payment())
        await kit.done(session.flush())
        await fail(kit, session, CLIENT_SIDE)
    assert kit.count() == 1


@twice
async def test_the_statement_that_aborted_is_the_one_that_is_quoted(server_kit):
    """Neither what the driver refused before it is quoted, nor what the server refused after it."""
    kit = server_kit
    with pytest.raises(TransactionAbortedError) as caught:
        async with kit.transaction() as session:
            await fail(kit, session, CLIENT_SIDE)
            await fail(kit, session)
            await fail(kit, session, "SELECT 'refused, as all that follows'")
            await fail(kit, session, CLIENT_SIDE)
    assert BROKEN in str(caught.value)


@twice
async def test_a_statement_in_an_aborted_transaction_is_told_why_it_was_refused(server_kit):
    """`current transaction is aborted` carries a note that quotes the first failure."""
    kit = server_kit
    with pytest.raises(TransactionAbortedError):
        async with kit.transaction() as session:
            place = await fail(kit, session)
            with pytest.raises(DBAPIError) as caught:
                await kit.done(session.execute(text("SELECT 1")))
    (note,) = caught.value.__notes__
    assert f"tests/{place} failed: 'SELECT broken'" in note
    assert "`transaction(nested=True)`" in note


@twice
async def test_a_failed_flush_is_a_failure_like_others(server_kit):
    """A duplicate that a Core INSERT ran into, once swallowed, takes the whole transaction with it, and it is said."""
    kit = server_kit
    insert = Payment.__table__.insert().values(id=7, amount=1)
    with pytest.raises(TransactionAbortedError, match=r"INSERT INTO payments .*UniqueViolation"):
        async with kit.transaction() as session:
            await kit.done(session.execute(insert))
            with pytest.raises(IntegrityError):
                await kit.done(session.execute(insert))
    assert kit.count() == 0


@twice
async def test_a_long_statement_is_cut(server_kit):
    """A page of SQL is quoted by its beginning."""
    kit = server_kit
    with pytest.raises(TransactionAbortedError, match=r"'SELECT broken,\s+1, 1, [1, ]{90,99} …', Undefined"):
        async with kit.transaction() as session:
            await fail(kit, session, "SELECT broken,\n    " + ", ".join("1" * 1000))


def test_psycopg_knows_of_what_failed_below_sqlalchemy(sync_server_kit):
    """An error of the driver's own connection is seen by the driver's status; what it refused before is not blamed."""
    kit = sync_server_kit
    with pytest.raises(TransactionAbortedError, match="by an error that was raised below SQLAlchemy"):
        with kit.db.transaction() as session:
            session.add(Payment())
            session.flush()
            with pytest.raises(DBAPIError):
                session.execute(CLIENT_SIDE)
            driver = session.connection().connection.driver_connection
            with pytest.raises(Exception, match="broken"):
                driver.execute(BROKEN)
    assert kit.count() == 0


@pytest.mark.parametrize(("statement", "trips"), [(text("SELECT 1"), 0), (CLIENT_SIDE, 1)], ids=["good", "failed"])
async def test_the_server_is_asked_after_an_error_only(async_server_kit, statement, trips):
    """With asyncpg a commit costs no trip more; after an error that may have aborted it, one."""
    kit = async_server_kit
    sent = []
    async with kit.db.transaction() as session:
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        driver.add_query_logger(lambda record: sent.append(record.query))
        with contextlib.suppress(DBAPIError):
            await session.execute(statement)
        sent.clear()
    assert sent == ["SELECT 1"] * trips + ["COMMIT;"]


async def test_a_question_that_fails_by_itself_aborts_nothing(async_server_kit):
    """Where the connection is lost before the server can be asked, that is the error that comes out."""
    kit = async_server_kit
    with pytest.raises(DBAPIError) as caught:
        async with kit.db.transaction() as session:
            with pytest.raises(DBAPIError):
                await session.execute(CLIENT_SIDE)
            driver = (await (await session.connection()).get_raw_connection()).driver_connection
            driver.terminate()
    assert caught.value.connection_invalidated


@twice
async def test_sqlite_aborts_nothing(kit):
    """SQLite undoes the failed statement alone: what else the transaction did is committed."""
    async with kit.transaction() as session:
        session.add(Payment())
        await kit.done(session.flush())
        await fail(kit, session)
    assert kit.count() == 1
