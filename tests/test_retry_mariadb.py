"""Retry on MariaDB, where a server answers: its own deadlocks, locks and serialization failures."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError

from dbscope import AttemptFailed, CommitOutcomeUnknown, Conflict, Database, Retry
from tests.support import needs
from tests.support.clock import FakeClock

URL = make_url("mariadb+pymysql://root@127.0.0.1:3306/")  # as in a container for tests: root, and no password
LIMIT = 30.0
ADD = text("UPDATE accounts SET balance = balance + 1 WHERE id = :id")


@pytest.fixture(scope="module")
def server() -> Iterator[Engine]:
    """The server, which a machine need not have, in CI either."""
    try:
        engine = create_engine(URL, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 2})
        engine.connect().close()
    except (ImportError, DBAPIError) as error:
        needs.spare(f"no MariaDB that lets root in at {URL.host}:{URL.port}: {getattr(error, 'orig', error)}")
    yield engine
    engine.dispose()


@pytest.fixture
def db(server: Engine) -> Iterator[Database]:
    """A database with two accounts, gone after the test."""
    name = f"dbscope_test_{uuid.uuid4().hex}"
    with server.connect() as admin:
        admin.exec_driver_sql(f"CREATE DATABASE {name}")
        try:
            with Database(URL.set(database=name)) as made:
                with made.engine.begin() as connection:
                    connection.exec_driver_sql("CREATE TABLE accounts (id int PRIMARY KEY, balance int) ENGINE=InnoDB")
                    connection.exec_driver_sql("INSERT INTO accounts VALUES (1, 0), (2, 0)")
                yield made
        finally:
            admin.exec_driver_sql(f"DROP DATABASE {name}")


def balances(db: Database) -> list[int]:
    """What is committed."""
    with db.reader() as session:
        return [*session.scalars(text("SELECT balance FROM accounts ORDER BY id"))]


def test_failure_25_a_deadlock_on_mariadb(db: Database) -> None:
    """1213: the one whom the server chose is repeated, and both pass."""
    told: list[AttemptFailed] = []
    locked = threading.Barrier(2, timeout=LIMIT)

    def transfer(first: int, second: int) -> None:
        tried: list[int] = []

        def work() -> None:
            db.session.execute(ADD, {"id": first})
            tried.append(1)
            if len(tried) == 1:
                locked.wait()
            db.session.execute(ADD, {"id": second})

        db.run(work, retry=Retry(20, on_retry=told.append))

    with ThreadPoolExecutor(2) as threads:
        for done in (threads.submit(transfer, 1, 2), threads.submit(transfer, 2, 1)):
            done.result(LIMIT)
    assert {fact.conflict for fact in told} == {Conflict.DEADLOCK}
    assert balances(db) == [2, 2]


def test_failure_25_a_lock_that_is_not_available_on_mariadb(db: Database) -> None:
    """1205: repeated until the other has let the row go."""
    told: list[AttemptFailed] = []

    def deposit() -> None:
        db.session.execute(text("SELECT * FROM accounts WHERE id = 1 FOR UPDATE NOWAIT"))
        db.session.execute(ADD, {"id": 1})

    with db.engine.connect() as other:
        other.execute(ADD, {"id": 1})
        db.run(deposit, retry=Retry(on_retry=told.append, clock=FakeClock(during=other.rollback)))
    assert [fact.conflict for fact in told] == [Conflict.LOCK]
    assert balances(db) == [1, 0]


def test_failure_25_a_serialization_failure_on_mariadb(db: Database) -> None:
    """1020: the row has changed since the snapshot, where the server was told to notice."""
    told: list[AttemptFailed] = []

    def deposit() -> None:
        session = db.session()
        session.execute(text("SET SESSION innodb_snapshot_isolation = ON"))
        balance = session.scalar(text("SELECT balance FROM accounts WHERE id = 1"))
        if not told:
            with db.engine.begin() as other:
                other.execute(ADD, {"id": 1})
        session.execute(text("UPDATE accounts SET balance = :balance WHERE id = 1"), {"balance": balance + 1})

    with db.reader() as session:
        known = session.execute(text("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")).all()
    if not known:
        needs.spare("this MariaDB is too old to notice lost updates (innodb_snapshot_isolation)")
    db.run(deposit, retry=Retry(on_retry=told.append, clock=FakeClock()))
    assert [fact.conflict for fact in told] == [Conflict.SERIALIZATION]
    assert balances(db) == [2, 0]


def test_failure_13_a_lost_connection_on_mariadb(db: Database, server: Engine) -> None:
    """A connection that the server closed before the COMMIT leaves the outcome open: it is not repeated."""
    calls: list[int] = []

    def deposit() -> None:
        calls.append(1)
        db.session.execute(ADD, {"id": 1})
        with server.connect() as admin:
            admin.exec_driver_sql(f"KILL {db.session.scalar(text('SELECT connection_id()'))}")

    with pytest.raises(CommitOutcomeUnknown):
        db.run(deposit, retry=Retry(on=Exception))
    assert calls == [1]
