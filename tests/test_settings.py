"""What a block asks of the server, and that nothing of it is left to anybody: DESIGN's Transactions 7, FAILURES 34."""

import math
import time
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from dbscope import ConfigurationError, Database, ReadOnlyError, TransactionInProgress
from dbscope.settings import Settings, settings_of
from dbscope.testing import sandbox
from tests.support.kits import Account, Kit, Payment, twice

ONE = {"pool_size": 1, "max_overflow": 0}  # so that whoever comes next gets the very same connection

# What is asked for, what the server calls it, and what it then says.
TOLD: dict[str, tuple[Any, str, str]] = {
    "isolation": ("SERIALIZABLE", "transaction_isolation", "serializable"),
    "read_only": (True, "transaction_read_only", "on"),
    "deferrable": (True, "transaction_deferrable", "on"),
    "statement_timeout": (60, "statement_timeout", "1min"),
    "lock_timeout": (1.5, "lock_timeout", "1500ms"),
    "idle_timeout": (timedelta(seconds=90), "idle_in_transaction_session_timeout", "90s"),
    "timeout": (0.7504, "transaction_timeout", "751ms"),
}
ALL = {name: value for name, (value, _, _) in TOLD.items()} | {"timeout": 300}
WRITING = {"isolation": "REPEATABLE READ", "lock_timeout": 5}


async def shown(kit: Kit, session: Any) -> dict[str, str]:
    """All that a block can ask for, as the server has it now."""
    columns = ", ".join(f"current_setting('{name}')" for _, name, _ in TOLD.values())
    row = (await kit.done(session.execute(text(f"SELECT {columns}")))).one()
    return dict(zip(TOLD, row, strict=True))


async def outside(kit: Kit) -> dict[str, str]:
    """The same, for the connection's next user."""
    async with kit.scope():
        return await shown(kit, kit.session())


# -- what is asked for holds, and ends with the transaction -----------------------------------------------------------


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("where", ["alone", "after a read", "new"])
@twice
async def test_transactions_7_the_server_is_told_and_nobody_else_finds_it(
    server_kit: Kit, name: str, where: str
) -> None:
    """An option holds inside of its block, wherever that begins its transaction, and not on the next one's."""
    kit = server_kit
    kit.database(**ONE)
    before = await outside(kit)
    value, _, told = TOLD[name]
    options = {"isolation": "SERIALIZABLE", "read_only": True} if name == "deferrable" else {}
    options[name] = value
    async with kit.scope():
        if where == "after a read":
            await shown(kit, kit.session())
        async with kit.transaction(new=where == "new", **options) as session:
            inside = await shown(kit, session)
        assert inside == before | {option: TOLD[option][2] for option in options}
        assert inside[name] == told
        assert await shown(kit, kit.session()) == before
        await kit.done(kit.session().rollback())
        async with kit.transaction() as session:
            assert await shown(kit, session) == before
    assert await outside(kit) == before


@twice
async def test_transactions_7_a_block_that_fails_leaves_nothing(server_kit: Kit) -> None:
    """An error that ends the block, and one of the server's, take the settings with them."""
    kit = server_kit
    kit.database(**ONE)
    before = await outside(kit)
    for statement in ("SELECT 1", "SELECT 1 / 0"):
        with pytest.raises((KeyError, DBAPIError)):
            async with kit.transaction(**ALL) as session:
                await kit.done(session.execute(text(statement)))
                raise KeyError
        assert await outside(kit) == before


@twice
async def test_transactions_7_a_decorated_function_asks_too(server_kit: Kit) -> None:
    """`transactional` takes the same options."""
    kit = server_kit

    async def work() -> None:
        assert (await shown(kit, kit.session()))["isolation"] == "repeatable read"

    if kit.colour == "async":
        await kit.db.transactional(isolation="REPEATABLE READ")(work)()
    else:

        @kit.db.transactional(isolation="REPEATABLE READ")
        def plain() -> Any:
            return kit.session().scalar(text("SHOW transaction_isolation"))

        assert plain() == "repeatable read"


@twice
async def test_transactions_7_what_was_read_and_is_pending_when_the_block_begins_anew(server_kit: Kit) -> None:
    """A transaction that has only read is ended for another: what is pending stays, what was read is read again."""
    kit = server_kit
    kit.database(expire_on_commit=True)
    async with kit.transaction() as session:
        session.add(Account(id=1, name="Ada", balance=1))
    async with kit.scope():
        session = kit.session()
        account = await kit.done(session.get(Account, 1))
        session.add(Payment(amount=7))
        with kit.outside.begin() as other:
            other.execute(text("UPDATE accounts SET balance = 2"))
        async with kit.transaction(**WRITING):
            again = await kit.done(session.get(Account, 1))
            assert again is account
            assert again.balance == 2
    assert kit.amounts() == [7]


@pytest.mark.parametrize("read_first", [False, True])
@twice
async def test_transactions_7_a_block_without_sql_takes_no_connection(server_kit: Kit, read_first: bool) -> None:
    """Options alone send nothing: a connection is taken by the first statement."""
    kit = server_kit
    taken: list[Any] = []
    pool = getattr(kit.db.engine, "sync_engine", kit.db.engine).pool
    event.listen(pool, "checkout", lambda *checkout: taken.append(checkout))
    async with kit.scope():
        if read_first:
            await shown(kit, kit.session())
        async with kit.transaction(**ALL):
            assert kit.checked_out() == 0
        async with kit.transaction(new=True, **ALL):
            assert kit.checked_out() == 0
    async with kit.transaction(**ALL):
        pass
    assert len(taken) == read_first


# -- joining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["required", "nested", "mandatory"])
@twice
async def test_transactions_7_an_open_transaction_is_not_changed(server_kit: Kit, kind: str) -> None:
    """Joining with what the outer has not is refused, and says what it has; with the same, or nothing, it joins."""
    kit = server_kit
    async with kit.transaction(**WRITING) as outer:
        refused: dict[str, Any]
        for refused in (
            {"isolation": "SERIALIZABLE"},
            {"lock_timeout": 4},
            {"read_only": True},
            WRITING | {"timeout": 9},
        ):
            with pytest.raises(TransactionInProgress, match=r"which has isolation='REPEATABLE READ', lock_timeout=5.0"):
                async with kit.transaction(kind=kind, **refused):
                    pytest.fail("entered")
        for accepted in (WRITING, {"lock_timeout": timedelta(seconds=5)}, {}):
            async with kit.transaction(kind=kind, **accepted) as session:
                assert session is outer
                session.add(Payment())
    for around in (kit.transaction(), kit.scope(commit="on-success")):
        async with around:
            with pytest.raises(TransactionInProgress, match="which has none of the like"):
                async with kit.transaction(kind=kind, **WRITING):
                    pytest.fail("entered")
    assert kit.count() == 3


# -- read-only --------------------------------------------------------------------------------------------------------

INSERT = text("INSERT INTO payments (amount) VALUES (1)")


async def write_all_ways(kit: Kit, block: Any) -> None:
    """By the ORM, in a flush and in the flush of the commit, by Core and by text."""
    with pytest.raises(ReadOnlyError, match=r"inside the transaction .begun at"):
        async with block() as session:
            session.add(Payment())
    for statement in (INSERT, insert(Payment).values(amount=1)):
        with pytest.raises(ReadOnlyError):
            async with block() as session:
                await kit.done(session.execute(statement))
    with pytest.raises(ReadOnlyError):
        async with block() as session:
            session.add(Payment())
            await kit.done(session.flush())
    assert kit.count() == 0


@twice
async def test_transactions_7_read_only_on_sqlite(kit: Kit) -> None:
    """Writes are refused, below the session by SQLite; no write lock is taken, and the next block writes."""
    kit.database(**ONE)
    await write_all_ways(kit, lambda: kit.transaction(read_only=True))
    with kit.outside.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        async with kit.transaction(read_only=True) as session:
            await kit.done(session.scalars(select(Payment)))
            connection = await kit.done(session.connection())
            cursor = getattr(connection, "sync_connection", connection).connection.cursor
            if kit.colour == "sync":
                with pytest.raises(Exception, match="readonly"):
                    cursor().execute("INSERT INTO payments (amount) VALUES (1)")
    async with kit.transaction() as session:
        session.add(Payment(amount=3))
    assert kit.amounts() == [3]


@twice
async def test_transactions_7_read_only_on_postgresql(server_kit: Kit) -> None:
    """Writes are refused, those of functions by the server."""
    kit = server_kit
    await write_all_ways(kit, lambda: kit.transaction(read_only=True))
    with pytest.raises(DBAPIError, match="read-only transaction"):
        async with kit.transaction(read_only=True) as session:
            await kit.done(session.execute(text("SELECT nextval('payments_id_seq')")))


@twice
async def test_transactions_7_in_a_sandbox_the_shared_connection_is_left_alone(server_kit: Kit) -> None:
    """Tests of code that asks for something run: the session's refusals hold, and the server is told nothing."""
    kit = server_kit
    kit.database()
    async with kit.block(sandbox(kit.db)):
        async with kit.scope():
            before = await shown(kit, kit.session())
            async with kit.transaction(**WRITING) as session:
                session.add(Payment(amount=2))
                assert await shown(kit, session) == before
                with pytest.raises(TransactionInProgress):
                    async with kit.transaction(isolation="SERIALIZABLE"):
                        pytest.fail("entered")
        with pytest.raises(ReadOnlyError):
            async with kit.transaction(**ALL) as session:
                await kit.done(session.execute(INSERT))
        async with kit.reader(autocommit=True) as session:
            assert await kit.done(session.scalar(select(Payment.amount))) == 2
    assert kit.count() == 0


# -- time-outs --------------------------------------------------------------------------------------------------------


def notes(error: BaseException) -> str:
    """What was added to an error."""
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize("name", ["statement_timeout", "timeout"])
@twice
async def test_transactions_7_a_statement_that_takes_too_long(server_kit: Kit, name: str) -> None:
    """It is ended by the server, and the error names the block and its option."""
    kit = server_kit
    with pytest.raises(DBAPIError) as raised:
        async with kit.transaction(**{name: 0.05}) as session:
            await kit.done(session.execute(text("SELECT pg_sleep(60)")))
    assert f"{name}=0.05 of the transaction (begun at" in notes(raised.value)
    async with kit.transaction(**{name: 60}) as session:
        assert await kit.done(session.scalar(text("SELECT 1"))) == 1


@twice
async def test_transactions_7_a_lock_that_is_not_had_in_time(server_kit: Kit) -> None:
    """Waiting for a lock ends with an error that names the option; a cancel by hand does not name one."""
    kit = server_kit
    kit.database()
    with kit.outside.begin() as holder:
        holder.execute(text("LOCK TABLE payments"))
        with pytest.raises(DBAPIError) as raised:
            async with kit.transaction(lock_timeout=0.05, statement_timeout=60) as session:
                await kit.done(session.execute(text("SELECT * FROM payments")))
    assert "This is lock_timeout=0.05 of the transaction (begun at" in notes(raised.value)
    with pytest.raises(DBAPIError) as raised:
        async with kit.transaction(lock_timeout=60, statement_timeout=60) as session:
            await kit.done(session.execute(text("SELECT pg_cancel_backend(pg_backend_pid())")))
    assert "_timeout" not in notes(raised.value)


@twice
async def test_transactions_7_a_transaction_that_does_nothing_for_too_long(server_kit: Kit) -> None:
    """The server ends it, and with it what it holds; the next statement's error names the option."""
    kit = server_kit
    kit.database()
    with pytest.raises(DBAPIError) as raised:
        async with kit.transaction(idle_timeout=0.05) as session:
            pid = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
            with kit.outside.execution_options(isolation_level="AUTOCOMMIT").connect() as other:
                deadline = time.monotonic() + 30
                while other.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}):
                    assert time.monotonic() < deadline, "the server did not end it"
            await kit.done(session.execute(text("SELECT 1")))
    assert "idle_timeout=0.05 of the transaction (begun at" in notes(raised.value)
    async with kit.transaction() as session:
        assert await kit.done(session.scalar(text("SELECT 1"))) == 1


@pytest.mark.parametrize("where", ["alone", "after a read"])
@twice
async def test_transactions_7_sqlite_waits_for_its_lock_as_long_as_the_block_says(kit: Kit, where: str) -> None:
    """`lock_timeout` is SQLite's busy time-out for the block, and as before for the next."""
    kit.database(**ONE)
    async with kit.scope():
        before = await kit.done(kit.session().scalar(text("PRAGMA busy_timeout")))
    with kit.outside.connect() as holder:
        holder.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked") as raised:
            async with kit.scope():
                if where == "after a read":
                    await kit.done(kit.session().scalars(select(Payment)))
                async with kit.transaction(lock_timeout=0.05, isolation="SERIALIZABLE") as session:
                    await kit.done(session.execute(INSERT))
    assert "This is lock_timeout=0.05 of the transaction (begun at" in notes(raised.value)
    async with kit.transaction(lock_timeout=1.25) as session:
        assert await kit.done(session.scalar(text("PRAGMA busy_timeout"))) == 1250
        assert before != 1250
    async with kit.scope():
        assert await kit.done(kit.session().scalar(text("PRAGMA busy_timeout"))) == before


# -- what cannot be had -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"isolation": "serializable"}, "isolation is one of 'READ UNCOMMITTED', .* not 'serializable'"),
        ({"isolation": "AUTOCOMMIT"}, "not 'AUTOCOMMIT'"),
        ({"read_only": 1}, "read_only is True or False, not 1"),
        ({"deferrable": True}, "add isolation=.SERIALIZABLE., read_only=True"),
        ({"deferrable": True, "isolation": "SERIALIZABLE"}, "read_only=True"),
        *(
            ({"timeout": value}, "timeout is a number of seconds above 0")
            for value in (0, -1, math.nan, math.inf, True, "5", None, timedelta(0), 10**8)
        ),
    ],
)
def test_bad_input_settings(options: dict[str, Any], says: str) -> None:
    """What cannot be meant is refused where it is written."""
    with pytest.raises(ConfigurationError, match=says):
        settings_of(options)


@pytest.mark.parametrize("kind", ["supports", "not-supported", "never"])
def test_bad_input_settings_of_a_block_that_begins_nothing(kind: Any) -> None:
    """A block that may work without a transaction cannot ask anything of one."""
    with Database("sqlite://") as db, pytest.raises(ConfigurationError, match="read_only=True is asked of"):
        db.transaction(kind=kind, read_only=True)


@pytest.mark.parametrize(
    ("dialect", "options", "says"),
    [
        (
            "sqlite",
            {"statement_timeout": 1},
            "statement_timeout of a block is known on PostgreSQL, and sqlite has none",
        ),
        ("sqlite", {"idle_timeout": 1}, "on sqlite a block may have isolation, lock_timeout, read_only"),
        ("sqlite", {"timeout": 1}, "sqlite has none"),
        ("sqlite", {"isolation": "READ COMMITTED"}, "ask for SERIALIZABLE"),
        ("mysql", {"lock_timeout": 1}, "on mysql a block may have isolation, read_only"),
        ("mariadb", {"read_only": True, "isolation": "SERIALIZABLE", "deferrable": True}, "mariadb has none"),
    ],
)
def test_transactions_7_what_a_database_does_not_know_is_refused(dialect: str, options: Any, says: str) -> None:
    """Nobody goes on without the limit that was asked for."""
    settings = settings_of(options)
    assert settings is not None
    with pytest.raises(ConfigurationError, match=says):
        settings.refuse_unknown(dialect)


def test_transactions_7_the_refusal_comes_where_the_block_is_written() -> None:
    """`transaction()` and the decorator refuse, before anything is entered."""
    with Database("sqlite://") as db:
        for door in (db.transaction, db.transactional):
            with pytest.raises(ConfigurationError, match="sqlite has none"):
                door(statement_timeout=1)
        db.transaction(isolation="REPEATABLE READ", read_only=True, lock_timeout=1)


@twice
async def test_transactions_7_servers_before_17_do_not_limit_a_transaction(server_kit: Kit) -> None:
    """`timeout` is refused by the first statement, where the server is known to be too old for it."""
    kit = server_kit
    async with kit.transaction() as session:
        await kit.done(session.execute(text("SELECT 1")))
    getattr(kit.db.engine, "sync_engine", kit.db.engine).dialect.server_version_info = (16, 4)
    with pytest.raises(ConfigurationError, match="from version 17 on; this is 16"):
        async with kit.transaction(timeout=1) as session:
            await kit.done(session.execute(text("SELECT 1")))
    assert kit.checked_out() == 0


def test_settings_are_shown_as_they_are_written() -> None:
    """Errors quote them."""
    assert str(Settings(isolation="SERIALIZABLE", timeout=2.0)) == "isolation='SERIALIZABLE', timeout=2.0"
