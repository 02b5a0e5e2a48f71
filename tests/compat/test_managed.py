"""Statements 27 to 31: the managed session, by compat's names."""

import threading

import pytest
from sqlalchemy import event, orm, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dbscope import RollbackOnlyError, scope
from dbscope.compat import ManagedSession, init_engine, init_session_factory, managed
from tests.compat.conftest import Base, Payment, in_thread


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """The module as it is when it was just imported; afterwards nothing may be checked out."""
    for name in ("engine", "thread_safe_session_factory", "_first"):
        monkeypatch.setattr(managed, name, None)
    yield
    if managed.engine is not None:
        held = managed.engine.pool.checkedout()
        managed.engine.dispose()
        assert held == 0


@pytest.fixture
def registry(tmp_path):
    """The registry, with an engine over a SQLite file with the table."""
    Base.metadata.create_all(init_engine(f"sqlite:///{tmp_path}/payments.sqlite"))
    return init_session_factory()


def amounts():
    """The committed amounts, as another connection sees them."""
    with managed.engine.connect() as connection:
        return sorted(connection.scalars(select(Payment.amount)))


def test_statement_27_the_engine_is_made_once(tmp_path):
    """The first call makes the engine with its options, and every later one returns it."""
    uri = f"sqlite:///{tmp_path}/a.sqlite"
    engine = init_engine(uri, pool_size=3)
    assert engine.pool.size() == 3
    assert init_engine(uri) is engine is managed.engine


def test_statement_27_another_uri_warns():
    """A second, different URI changes nothing, and says so without showing a password."""
    engine = init_engine("sqlite:///never-opened.sqlite")
    with pytest.warns(UserWarning, match=r"^init_engine was called with postgresql://me:\*\*\*@host/db, but") as caught:
        assert init_engine("postgresql://me:secret@host/db") is engine
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="something that is no URL"):
        assert init_engine("nonsense") is engine


def test_statement_28_the_engine_comes_first():
    """Without an engine there is no registry, and the error is the original's."""
    with pytest.raises(ValueError) as caught:
        init_session_factory()
    assert str(caught.value) == "Initialize engine by calling init_engine before calling init_session_factory!"


def test_statement_28_the_registry_is_made_once(registry):
    """Every call returns the same `scoped_session`."""
    assert isinstance(registry, orm.scoped_session)
    assert init_session_factory() is registry is managed.thread_safe_session_factory


def test_statement_29_the_registry_comes_first():
    """Without a registry a block raises the original's error on entering, not before."""
    block = ManagedSession()
    with pytest.raises(ValueError) as caught:
        block.__enter__()
    assert str(caught.value) == "Call init_session_factory before using ManagedSession!"


def test_statement_30_the_end_commits_and_removes(registry):
    """A block yields the thread's `Session` itself, commits its work, and leaves nothing behind."""
    with ManagedSession() as session:
        assert isinstance(session, Session)
        assert registry() is session
        session.add(Payment(amount=1))
    assert amounts() == [1]
    assert not registry.registry.has()
    assert not session.in_transaction()


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_statement_30_an_error_rolls_back_and_removes(registry, kind):
    """An error undoes the block's work, comes out as it was, and nothing is left behind."""
    error = kind("the work's")
    with pytest.raises(kind) as caught:
        with ManagedSession() as session:
            session.add(Payment(amount=1))
            session.flush()
            raise error
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert amounts() == []
    assert not registry.registry.has()


def test_statement_30_a_failing_commit_rolls_back_raises_and_removes(registry):
    """A commit that fails is raised, and the next block starts clean."""
    with ManagedSession() as session:
        session.add(Payment(id=1, amount=1))
    with pytest.raises(IntegrityError):
        with ManagedSession() as session:
            session.add(Payment(id=2, amount=2))
            session.add(Payment(id=1, amount=3))
    assert not registry.registry.has()
    assert not session.in_transaction()
    with ManagedSession() as session:
        session.add(Payment(amount=4))
    assert amounts() == [1, 4]


def test_statement_30_clean_up_never_hides_the_error(registry):
    """Where the session fails to be given back too, the work's error stays on top, with a note."""

    def fail(*_):
        raise OSError("rolling back failed")

    with pytest.raises(KeyError) as caught:
        with ManagedSession() as session:
            session.execute(text("SELECT 1"))
            event.listen(session, "after_rollback", fail)
            raise KeyError("the work's")
    assert "rolling back failed" in caught.value.__notes__[0]
    assert not registry.registry.has()


def test_statement_30_offline_each_thread_has_its_own(registry):
    """Threads that are in a block at the same time have different sessions, and all commit."""
    barrier = threading.Barrier(5)
    sessions = []

    def work(number):
        with ManagedSession() as session:
            sessions.append(session)
            barrier.wait(30)
        with ManagedSession() as session:
            session.add(Payment(amount=number))

    threads = [threading.Thread(target=work, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, sessions))) == 5
    assert amounts() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scoped", [False, True], ids=["bare", "in a scope"])
def test_statement_30_online(registry, scoped):
    """In a WSGI application, with and without a scope around the request, a block serves each request."""

    def app(environ, start_response):
        with ManagedSession() as session:
            session.add(Payment(amount=environ["amount"]))
        assert not registry.registry.has()
        if environ["amount"] == 2:
            raise KeyError("the view's")
        start_response("200 OK", [])
        return [b"booked"]

    def serve(amount):
        statuses = []
        try:
            if scoped:
                with scope(f"request {amount}"):
                    app({"amount": amount}, lambda status, headers: statuses.append(status))
            else:
                app({"amount": amount}, lambda status, headers: statuses.append(status))
        except KeyError:
            statuses.append("500")
        return statuses

    assert [in_thread(serve, amount) for amount in (1, 2, 3)] == [["200 OK"], ["500"], ["200 OK"]]
    assert amounts() == [1, 2, 3]


def test_statement_31_the_inner_joins_the_outer(registry):
    """A block inside another has its session, commits nothing, and removes nothing."""
    with ManagedSession() as outer:
        outer.add(Payment(amount=1))
        with ManagedSession() as inner:
            assert inner is outer
            inner.add(Payment(amount=2))
            inner.flush()
        assert registry() is outer
        assert amounts() == []
        outer.add(Payment(amount=3))
    assert amounts() == [1, 2, 3]
    with ManagedSession() as later:
        later.add(Payment(amount=4))
    assert amounts() == [1, 2, 3, 4]


def test_statement_31_an_outer_that_fails_undoes_the_inner(registry):
    """What an inner block did goes with the outer one's failure."""
    with pytest.raises(KeyError):
        with ManagedSession():
            with ManagedSession() as inner:
                inner.add(Payment(amount=1))
            raise KeyError("the outer's")
    assert amounts() == []


def test_statement_31_an_error_of_the_inner_fails_both(registry):
    """An inner block's error comes out of both as it was, and undoes the work of both."""
    error = KeyError("the inner's")
    with pytest.raises(KeyError) as caught:
        with ManagedSession() as outer:
            outer.add(Payment(amount=1))
            with ManagedSession():
                raise error
    assert caught.value is error
    assert amounts() == []


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_statement_31_a_hidden_error_of_the_inner_is_not_committed(registry, kind):
    """Where the outer block hides the inner one's error, half of the work is not committed: that raises."""
    with pytest.raises(RollbackOnlyError, match="the inner's") as caught:
        with ManagedSession() as outer:
            outer.add(Payment(amount=1))
            try:
                with ManagedSession():
                    raise kind("the inner's")
            except kind:
                pass
    assert isinstance(caught.value.__cause__, kind)
    assert amounts() == []
    assert not registry.registry.has()


def test_statement_31_a_session_that_comes_again_is_no_inner_one(registry):
    """Where a factory hands out one session again and again, each block on it commits."""
    with ManagedSession() as session:
        session.add(Payment(amount=1))
    registry.registry.set(session)
    with ManagedSession() as again:
        assert again is session
        again.add(Payment(amount=2))
    assert amounts() == [1, 2]


def test_statement_31_a_scope_inside_has_a_block_of_its_own(registry):
    """A block in a nested dbscope scope is that scope's work, and commits by itself."""
    with scope("outer"), ManagedSession() as outer:
        outer.execute(text("SELECT 1"))
        with scope("inner"), ManagedSession() as inner:
            assert inner is not outer
            inner.add(Payment(amount=1))
        assert amounts() == [1]
