"""Statement 32: what a session is, shown with compat's registry and with a database's own."""

import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import sessionmaker

from dbscope import Database, scope
from dbscope.compat import scoped_session
from tests.compat.conftest import Base, Payment

COUNT = select(func.count()).select_from(Payment)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def server(request, tmp_path):
    """An engine over an empty table."""
    url = f"sqlite:///{tmp_path}/a.sqlite" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=["scoped_session", "db.session", "db.session of a URL"])
def registry(request, server):
    """A registry inside of an open scope."""
    made = None
    if request.param == "scoped_session":
        registry = scoped_session(sessionmaker(server))
    else:
        made = Database(server if request.param == "db.session" else server.url)
        registry = made.session
    with scope("the test"):
        yield registry
    assert registry.session_factory.kw["bind"].pool.checkedout() == 0
    if made:
        made.dispose()


def held(registry):
    """How many connections are checked out of the registry's pool."""
    return registry.bind.pool.checkedout()


def committed(registry):
    """How many rows another connection sees."""
    with registry.bind.connect() as connection:
        return connection.scalar(COUNT)


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_statement_32_a_connection_is_held_from_the_first_query_to_the_end(registry, end):
    """A session begins without a connection, takes one at its first query, and holds it until the transaction ends."""
    session = registry()
    assert held(registry) == 0
    session.scalar(COUNT)
    assert held(registry) == 1
    session.scalar(COUNT)
    assert held(registry) == 1
    getattr(session, end)()
    assert held(registry) == 0
    assert not session.in_transaction()


def test_statement_32_changes_are_flushed_before_a_query_and_before_a_commit(registry):
    """What was added is seen by the session's next query, and saved by its commit."""
    registry.add(Payment())
    assert held(registry) == 0
    assert registry.scalar(COUNT) == 1
    assert not registry.new
    registry.add(Payment())
    assert committed(registry) == 0
    registry.commit()
    assert committed(registry) == 2


def test_statement_32_many_transactions_one_at_a_time(registry):
    """A session lives across many transactions, and never in two."""
    session = registry()
    for number in range(3):
        first = session.get_transaction()
        assert first is None
        session.add(Payment())
        session.flush()
        with pytest.raises(InvalidRequestError, match="already begun"):
            session.begin()
        session.commit()
        assert registry() is session
        assert committed(registry) == number + 1


def test_statement_32_a_select_opens_a_transaction_too(registry):
    """After a SELECT alone a transaction is open, on the server as well, until it is ended."""
    registry.execute(text("SELECT 1"))
    assert registry().in_transaction()
    driver = registry.connection().connection.driver_connection
    if registry.bind.dialect.name == "postgresql":
        assert driver.info.transaction_status.name == "INTRANS"
    registry.rollback()
    assert not registry().in_transaction()
    assert held(registry) == 0
