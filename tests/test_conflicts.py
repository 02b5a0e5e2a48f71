"""Which errors are conflicts: by the codes of real servers, and of drivers that are not installed here."""

import sqlite3
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from dbscope import CommitOutcomeUnknown, PartialCommit, RollbackOnlyError, SelfBlockedError, TransactionAbortedError
from dbscope.conflicts import Conflict, conflict_of, leaves_open, saved_a_part
from tests.support.kits import Account, Kit, twice

RAISE = "DO $$ BEGIN RAISE EXCEPTION 'said so' USING ERRCODE = '{}'; END $$"


def wrapped(orig: BaseException, *, lost: bool = False) -> OperationalError:
    """A driver's error as SQLAlchemy raises it."""
    error = OperationalError("UPDATE accounts", {}, orig, connection_invalidated=lost)
    error.__cause__ = orig
    return error


def from_driver(module: str, *args: Any, **attributes: Any) -> Exception:
    """An error as a driver makes it that is not installed here."""
    error = type("OperationalError", (Exception,), {"__module__": module})(*args)
    vars(error).update(attributes)
    return error  # type: ignore[no-any-return]


def sqlite_error(code: int | None) -> sqlite3.OperationalError:
    """What sqlite3 raises with an extended result code; without one where Python raised it."""
    error = sqlite3.OperationalError("database is locked")
    if code is not None:
        error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("state", "conflict"),
    [
        ("40001", Conflict.SERIALIZATION),
        ("40P01", Conflict.DEADLOCK),
        ("55P03", Conflict.LOCK),
        ("40003", None),  # statement completion unknown
        ("40002", None),
        ("23505", None),
        ("25P02", None),
        ("57014", None),
    ],
)
@twice
async def test_failure_25_conflicts_of_postgresql(server_kit: Kit, state: str, conflict: Conflict | None) -> None:
    """Psycopg's and asyncpg's errors are told by the server's SQLSTATE, as SQLAlchemy raises them and as they are."""
    with pytest.raises(DBAPIError) as caught:
        async with server_kit.transaction() as session:
            await server_kit.done(session.execute(text(RAISE.format(state))))
    assert conflict_of(caught.value) is conflict
    driver: Any = caught.value.orig
    assert conflict_of(getattr(driver, "__cause__", None) or driver) is conflict


@pytest.mark.parametrize(
    ("error", "conflict"),
    [
        (from_driver("psycopg2.errors", "deadlock detected", pgcode="40P01"), Conflict.DEADLOCK),
        (from_driver("pg8000.exceptions", {"S": "ERROR", "C": "40001"}), Conflict.SERIALIZATION),
        (from_driver("pg8000.exceptions", "network error"), None),
        (from_driver("pymysql.err", 1213, "Deadlock found"), Conflict.DEADLOCK),
        (from_driver("MySQLdb", 1205, "Lock wait timeout exceeded"), Conflict.LOCK),
        (from_driver("mysql.connector.errors", "1213 (40001)", errno=1213, sqlstate="40001"), Conflict.DEADLOCK),
        (from_driver("mariadb", "Record has changed", errno=1020, sqlstate="HY000"), Conflict.SERIALIZATION),
        (from_driver("asyncmy.errors", 3572, "NOWAIT is set"), Conflict.LOCK),
        (from_driver("pymysql.err", 3101, "Plugin instructed the server to rollback"), Conflict.SERIALIZATION),
        (from_driver("pymysql.err", 1062, "Duplicate entry"), None),
        (from_driver("pymysql.err"), None),
        (from_driver("pyodbc", "HY000", 1205), None),  # another server's number
        (from_driver("pymssql", 1205, "deadlock victim"), None),
        (sqlite_error(sqlite3.SQLITE_BUSY), Conflict.BUSY),
        (sqlite_error(sqlite3.SQLITE_BUSY_SNAPSHOT), Conflict.SERIALIZATION),
        (sqlite_error(sqlite3.SQLITE_BUSY_RECOVERY), Conflict.BUSY),
        (sqlite_error(sqlite3.SQLITE_LOCKED), Conflict.BUSY),
        (sqlite_error(sqlite3.SQLITE_LOCKED_SHAREDCACHE), Conflict.BUSY),
        (sqlite_error(sqlite3.SQLITE_CONSTRAINT_UNIQUE), None),
        (sqlite_error(None), None),
        (ValueError("40001"), None),
    ],
    ids=lambda value: f"{type(value).__module__}-{value}" if isinstance(value, Exception) else "",
)
def test_failure_25_conflicts_by_the_driver_and_its_code(error: Exception, conflict: Conflict | None) -> None:
    """A code counts for its own driver only, wrapped by SQLAlchemy or not."""
    assert conflict_of(error) is conflict
    assert conflict_of(wrapped(error)) is conflict


def test_failure_38_stale_data_counts_if_asked_for() -> None:
    """`StaleDataError` is a conflict where the caller says so."""
    assert conflict_of(StaleDataError("0 were matched")) is None
    assert conflict_of(StaleDataError("0 were matched"), stale_data=True) is Conflict.STALE


def test_transactions_5_a_conflict_is_found_below_what_was_raised_from_it() -> None:
    """`raise … from` says why; an error that was only raised after a conflict is none."""
    conflict = wrapped(sqlite_error(sqlite3.SQLITE_BUSY))
    translated = ValueError("the account is busy")
    translated.__cause__ = RuntimeError()
    translated.__cause__.__cause__ = conflict
    assert conflict_of(translated) is Conflict.BUSY
    later = ValueError("something else")
    later.__context__ = conflict
    assert conflict_of(later) is None
    circle = ValueError()
    circle.__cause__ = circle
    assert conflict_of(circle) is None


def test_failure_2_an_aborted_transaction_tells_what_aborted_it() -> None:
    """Where the conflict itself was swallowed, its code is what is left of it."""
    assert conflict_of(TransactionAbortedError("", "40001")) is Conflict.SERIALIZATION
    assert conflict_of(TransactionAbortedError("", "23505")) is None
    assert conflict_of(TransactionAbortedError("")) is None


@pytest.mark.parametrize(
    ("error", "conflict"),
    [
        (RollbackOnlyError(), Conflict.BUSY),
        (TransactionAbortedError(""), Conflict.BUSY),
        (CommitOutcomeUnknown(""), None),
        (SelfBlockedError(), None),
        (PartialCommit("", (), ()), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_transactions_5_what_dbscope_decided_is_no_conflict(error: Exception, conflict: Conflict | None) -> None:
    """A partial commit has saved something, and a self-made block would come again, whatever they were raised from."""
    error.__cause__ = wrapped(sqlite_error(sqlite3.SQLITE_BUSY))
    assert conflict_of(error) is conflict


def test_failure_13_what_may_be_saved_is_found_below_what_was_raised_from_it() -> None:
    """An unknown outcome and a partial commit stay what they are, translated or not."""
    for error, unknown in ((CommitOutcomeUnknown(""), True), (PartialCommit("", (), ()), False)):
        translated = ValueError()
        translated.__cause__ = error
        for found in (error, translated):
            assert (leaves_open(found), saved_a_part(found)) == (unknown, not unknown)
    assert not leaves_open(wrapped(Exception(), lost=True))


@twice
async def test_failure_32_conflicts_of_sqlite(kit: Kit) -> None:
    """A lock that did not come in time, and a snapshot that is out of date, are told by SQLite's own codes."""
    db = kit.database(connect_args={"timeout": 0.01})
    with kit.outside.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError) as caught:
            async with kit.transaction() as session:
                await kit.done(session.execute(text("SELECT 1")))
        assert conflict_of(caught.value) is Conflict.BUSY
        other.rollback()
        async with kit.scope():
            session = kit.session(db)
            await kit.done(session.execute(text("SELECT count(*) FROM accounts")))
            session.add(Account(name="late"))
            other.exec_driver_sql("INSERT INTO accounts (name, balance) VALUES ('early', 0)")
            other.commit()
            with pytest.raises(OperationalError) as caught:
                await kit.done(session.flush())
            assert conflict_of(caught.value) is Conflict.SERIALIZATION
            await kit.done(session.rollback())
