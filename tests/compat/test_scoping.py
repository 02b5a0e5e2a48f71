"""Statements 1 to 14: `scoped_session`, by compat's name."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import sqlalchemy
from sqlalchemy import event, orm, select, text
from sqlalchemy.exc import InvalidRequestError, SADeprecationWarning, SAWarning
from sqlalchemy.orm import Query, Session, sessionmaker
from sqlalchemy.util import ScopedRegistry, ThreadLocalRegistry

from dbscope import Database, current_scope, scope
from dbscope.compat import scoped_session
from tests.compat.conftest import Base, Payment, in_thread

NEW = sqlalchemy.__version__ >= "2.1"
PROXIED = """
__contains__ __iter__ add add_all begin begin_nested close reset commit connection delete execute expire expire_all
expunge expunge_all flush get get_one get_bind is_modified bulk_save_objects bulk_insert_mappings bulk_update_mappings
merge query refresh rollback scalar scalars
"""
METHODS = PROXIED.split() + (["delete_all", "merge_all"] if NEW else ["close_all"])
LACKING = """
in_transaction in_nested_transaction get_transaction get_nested_transaction invalidate expire_on_commit prepare twophase
join_transaction_mode autobegin
"""


@pytest.fixture
def S(factory):
    """A registry of the thread's sessions, empty again after the test."""
    registry = scoped_session(factory)
    yield registry
    registry.remove()


class BadClose(Session):
    """A session that gives its connection back, and then fails to close."""

    def close(self):
        super().close()
        raise OSError("closing failed")


def test_statement_01_the_constructor_and_what_it_exposes(factory):
    """The constructor and its attributes are SQLAlchemy's, and the class can be subscripted and subclassed."""

    class Mine(scoped_session[Session]):
        pass

    for cls in (scoped_session, scoped_session[Session], Mine):
        registry = cls(factory, scopefunc=lambda: 1)
        assert registry.session_factory is factory
        assert registry.registry() is registry()
        assert registry._proxied is registry()
        assert registry._support_async is False
        assert cls(session_factory=factory).session_factory is factory


@pytest.mark.parametrize("scopefunc", [None, lambda: "key"], ids=["thread", "scopefunc"])
def test_statement_02_one_session_for_each_scope(engine, scopefunc):
    """The session is made at the first call and is the same from then on; any callable is a factory."""
    made = []

    def make():
        made.append(Session(engine))
        return made[-1]

    S = scoped_session(make, scopefunc)
    assert made == []
    assert S() is S() is S.registry()
    assert made == [S()]


def test_statement_02_each_thread_has_its_own(S):
    """Outside of every dbscope scope, two threads never share a session."""
    assert in_thread(S) is not S()


@pytest.mark.parametrize("inside", [False, True], ids=["thread", "scope"])
def test_statement_03_options_for_the_first_call(S, inside):
    """Options are given to the factory where the call makes the session, and refused where it is there."""

    def check():
        session = S(autoflush=False)
        assert session.autoflush is False
        assert S() is session
        with pytest.raises(
            InvalidRequestError, match=r"^Scoped session is already present; no new arguments may be specified\.$"
        ):
            S(autoflush=True)

    if inside:
        with scope():
            check()
    else:
        check()


def test_statement_04_async_sessions_are_deprecated_here(engine):
    """A factory of async sessions gets the warning that names the right registry."""

    class Asynchronous(Session):
        _is_asyncio = True

    S = scoped_session(sessionmaker(engine, class_=Asynchronous))
    with pytest.warns(SADeprecationWarning, match="Please use `async_scoped_session` instead"):
        S()


@pytest.mark.parametrize("inside", [False, True], ids=["thread", "scope"])
def test_statement_05_configure(S, inside):
    """`configure` reaches the sessions made later, and says so where one is there already."""
    S.configure(autoflush=False)
    assert S.session_factory.kw["autoflush"] is False

    def check():
        assert S().autoflush is False
        with pytest.warns(SAWarning) as caught:
            S.configure(autoflush=True)
        assert str(caught[0].message) == (
            "At least one scoped session is already present.  configure() can not affect sessions that have already "
            "been created."
        )
        assert S().autoflush is False

    if inside:
        with scope():
            check()
    else:
        check()


def test_statement_06_remove_makes_nothing(engine):
    """`remove()` where there is no session makes none."""
    made = []
    S = scoped_session(lambda: made.append(1), scopefunc=lambda: 1)
    S.remove()
    scoped_session(lambda: made.append(1)).remove()
    with scope():
        scoped_session(lambda: made.append(1)).remove()
    assert made == []


@pytest.mark.parametrize("scopefunc", [None, lambda: "key"], ids=["thread", "scopefunc"])
def test_statement_06_remove_closes_and_then_forgets(engine, factory, scopefunc):
    """`remove()` rolls back, gives the connection back, and the next call makes a new session."""
    S = scoped_session(factory, scopefunc)
    first = S()
    first.add(Payment(id=1))
    first.flush()
    assert engine.pool.checkedout() == 1
    S.remove()
    assert engine.pool.checkedout() == 0
    assert S() is not first
    assert S.get(Payment, 1) is None
    S.remove()
    assert not S.registry.has()


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "scope"])
@pytest.mark.parametrize("scopefunc", [None, lambda: "key"], ids=["thread", "scopefunc"])
def test_statement_06_a_session_that_fails_to_close_is_forgotten(engine, scopefunc, inside):
    """A raising `close()` is raised by `remove()`, and its session is not handed out again."""
    S = scoped_session(sessionmaker(engine, class_=BadClose), scopefunc)

    def check():
        broken = S()
        with pytest.raises(OSError, match="closing failed"):
            S.remove()
        assert not S.registry.has()
        assert S() is not broken
        S.registry.clear()

    if inside:
        with scope():
            check()
    else:
        check()


def test_statement_07_query_property(S):
    """`query_property` gives mapped classes a query of the current session, or of the class that was asked for."""

    class Mine(Query):
        pass

    class Mixed(Payment):
        query = S.query_property()
        mine = S.query_property(Mine)

    assert Mixed.query.session is S()
    assert isinstance(Mixed.mine, Mine)
    assert Mixed.query.all() == Mixed.mine.all() == []


@pytest.mark.parametrize("name", METHODS)
def test_statement_08_methods_are_sqlalchemys(name):
    """Each method that SQLAlchemy proxies is its own here, defaults included."""
    assert getattr(scoped_session, name).__qualname__ == f"scoped_session.{name}" or name == "close_all"
    assert name not in vars(scoped_session)
    assert hasattr(orm.scoped_session, name)


@pytest.mark.parametrize("inside", [False, True], ids=["thread", "scope"])
def test_statement_08_methods_reach_the_session(S, inside):
    """What is called on the registry happens in the current session."""

    def check():
        payment = Payment(id=1)
        S.add(payment)
        assert payment in S
        assert list(S) == [payment]
        S.flush()
        assert S.scalar(select(Payment.amount)) == 500
        assert S.get_one(Payment, 1) is payment
        S.rollback()
        assert payment not in S().identity_map.values()

    if inside:
        with scope():
            check()
    else:
        check()


def test_statement_09_attributes(S, engine):
    """Attributes can be read, and those that a session lets be set, set; the class methods are there."""
    assert S.bind is engine
    S.autoflush = False
    assert S().autoflush is False
    S.bind = S.bind
    S.identity_map = S().identity_map
    assert S.identity_map is S().identity_map
    if NEW:
        S.execution_options = S.execution_options.union({"a": 1})
        assert S().execution_options == {"a": 1}
    payment = Payment(id=1)
    S.add(payment)
    assert list(S.new) == [payment]
    assert not S.dirty
    assert not S.deleted
    assert S.is_active
    assert S.info is S().info
    with S.no_autoflush:
        assert S.scalar(select(Payment.amount)) is None
    for name in ("dirty", "deleted", "new", "is_active", "no_autoflush", "info"):
        with pytest.raises(AttributeError):
            setattr(S, name, None)
    assert scoped_session.object_session(payment) is S()
    assert scoped_session.identity_key(Payment, 1) == orm.Session.identity_key(Payment, 1)


@pytest.mark.parametrize("name", LACKING.split())
def test_statement_10_what_sqlalchemy_does_not_proxy(S, name):
    """The registry has the session's other public members, too."""
    assert not hasattr(orm.scoped_session, name)
    value, expected = getattr(S, name), getattr(S(), name)
    assert value == expected or (callable(value) and value.__name__ == expected.__name__)


def test_statement_10_they_are_the_current_sessions(S):
    """What is called by these names, and set, is the current session's; `begin` is `Session.begin`."""
    assert not S.in_transaction()
    with S.begin() as transaction:
        assert S.in_transaction()
        assert S.get_transaction() is transaction
        with S.begin_nested():
            assert S.in_nested_transaction()
    assert not S.in_transaction()
    S.expire_on_commit = False
    assert S().expire_on_commit is False


def test_statement_10_every_public_member_of_a_session_is_there(S):
    """Nothing public of a session is missing on the registry, so that code written for one works with the other."""
    public = {name for name in {*dir(S()), *vars(S())} if not name.startswith("_")}
    assert [name for name in sorted(public) if not hasattr(S, name)] == []


def test_statement_11_a_closed_session_stays_registered(S, engine):
    """`with S() as session` closes it at the end, and the same object is there and works again."""
    with S() as session:
        session.execute(text("SELECT 1"))
        assert engine.pool.checkedout() == 1
    assert engine.pool.checkedout() == 0
    assert S() is session
    assert S.scalar(text("SELECT 42")) == 42


@pytest.mark.parametrize("make", [lambda e: sessionmaker(e), lambda e: Session], ids=["sessionmaker", "Session class"])
def test_statement_12_events(engine, make):
    """The registry is an event target, as what checks `isinstance` expects, and is heard in and outside of scopes."""
    S = scoped_session(make(engine))
    assert isinstance(S, orm.scoped_session)
    seen = []

    def listener(session):
        seen.append(session)

    event.listen(S, "before_commit", listener)
    try:
        S(bind=engine).execute(text("SELECT 1"))
        S.commit()
        with scope():
            S(bind=engine).execute(text("SELECT 1"))
            S.commit()
            assert seen[-1] is S()
        assert seen[0] is S()
        assert len(seen) == 2
    finally:
        event.remove(S, "before_commit", listener)
        S.remove()


def test_statement_13_the_registry_of_a_scopefunc(factory):
    """With a scopefunc the registry is SQLAlchemy's, over a plain dictionary that others may look into."""
    key = "a"
    S = scoped_session(factory, lambda: key)
    registry = S.registry
    assert type(registry) is ScopedRegistry
    assert type(registry.registry) is dict
    assert registry.createfunc is factory
    registry.clear()
    assert not registry.has()
    first = S()
    assert registry.registry == {"a": first}
    key = "b"
    other = factory()
    registry.set(other)
    assert S() is other
    registry.clear()
    assert registry.registry == {"a": first}
    first.close()


def test_statement_13_two_makers_at_once_share_the_first_session(engine):
    """Where two threads make the session of one key, or one scope, at once, both get the same."""
    for scopefunc in (lambda: "key", None):
        barrier = threading.Barrier(2)

        def make(barrier=barrier):
            barrier.wait(30)
            return Session(engine)

        S = scoped_session(make, scopefunc)
        with scope(), ThreadPoolExecutor(2) as threads:
            one, two = (threads.submit(copy_context().run, S) for _ in range(2))
            assert one.result() is two.result()


def test_statement_13_the_registry_of_threads(factory):
    """Without a scopefunc the registry holds a `threading.local`, and a finished thread's session goes with it."""
    S = scoped_session(factory)
    assert isinstance(S.registry, ThreadLocalRegistry)
    assert isinstance(S.registry.registry, threading.local)
    S.registry.clear()
    session = S()
    assert S.registry.registry.value is session
    S.registry.clear()
    assert not hasattr(S.registry.registry, "value")
    gone = in_thread(lambda: weakref.ref(S()))
    gc.collect()
    assert gone() is None


def test_statement_14_a_dead_threads_session_is_nobodys(tmp_path, factory):
    """Of fifty short threads each gets a session of its own, from the database's registry and from compat's."""
    Base.metadata.create_all(factory.kw["bind"])
    S = scoped_session(factory)
    with Database(f"sqlite:///{tmp_path}/own.sqlite") as db:
        for registry in (db.session, S):
            sessions = []
            for _ in range(50):
                thread = threading.Thread(target=lambda r=registry, s=sessions: s.append(r()))
                thread.start()
                thread.join()
            assert len(set(map(id, sessions))) == 50


def test_statement_14_a_key_that_comes_again_finds_its_session(factory):
    """What a scopefunc of the application's calls the same key is the same key, as in SQLAlchemy."""
    S = scoped_session(factory, lambda: "reused")
    assert in_thread(S) is in_thread(S)
    S.remove()


def test_statement_26_inside_a_scope_the_session_is_the_scopes(S, engine):
    """In a scope the registry yields the scope's session, closed and gone with it; outside, the thread's."""
    outside = S()
    with scope():
        inside = S()
        assert inside is S() is not outside
        inside.add(Payment(id=1))
        inside.flush()
        with scope():
            assert S() is not inside
        assert S() is inside
        assert S.registry.registry.value is outside
        assert engine.pool.checkedout() == 1
    assert engine.pool.checkedout() == 0
    assert not inside.in_transaction()
    assert S() is outside


def test_statement_26_a_failing_scope_removes_the_session_too(S, engine):
    """A scope that ends with an error closes the session, and lets the error through."""
    with pytest.raises(KeyError):
        with scope():
            S.execute(text("SELECT 1"))
            raise KeyError("the work's")
    assert engine.pool.checkedout() == 0
    assert not S.registry.has()


def test_statement_26_what_is_put_into_the_registry_belongs_to_the_scope(S, factory):
    """`registry.set` and `registry.clear` act on the scope's session while one is open."""
    with scope():
        mine = factory()
        S.registry.set(factory())
        S.registry.set(mine)
        assert S() is mine
        mine.execute(text("SELECT 1"))
        S.registry.clear()
        assert not S.registry.has()
        mine.close()
        S.registry.set(mine)
        mine.execute(text("SELECT 1"))
    assert not mine.in_transaction()


def test_statement_26_remove_inside_a_scope(S, engine):
    """`remove()` ends the scope's session at once, leaves the thread's alone, and the scope gets a new one."""
    outside = S()
    with scope():
        first = S()
        first.execute(text("SELECT 1"))
        S.remove()
        assert engine.pool.checkedout() == 0
        assert S() is not first
    assert S() is outside


async def test_statement_26_in_an_async_scope_too(S, engine):
    """An `async with scope()` ends the session of a compat registry as `with scope()` does."""
    async with scope():
        session = S()
        session.execute(text("SELECT 1"))
        assert current_scope().guest(S.registry) is session
    assert engine.pool.checkedout() == 0


def test_a_scopefunc_is_obeyed_inside_of_scopes(factory):
    """A registry with a scopefunc knows no dbscope scope: its keys are its application's business."""
    S = scoped_session(factory, lambda: "key")
    with scope():
        session = S()
    assert S() is session
    S.remove()
