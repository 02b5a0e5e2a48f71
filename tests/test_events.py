"""Facts: what is told of scopes, sessions, connections, transactions, statements and hooks, and to whom."""

import logging
from typing import Any

import pytest
from sqlalchemy import text

from dbscope import ConfigurationError, GuardError, current_scope, events
from dbscope.events import (
    ConnectionReturned,
    ConnectionTaken,
    Fact,
    HookRun,
    ScopeEnded,
    ScopeOpened,
    SessionCreated,
    StatementBegun,
    StatementEnded,
    TransactionBegun,
    TransactionBegunAgain,
    TransactionEnded,
    observe,
)
from tests.support.kits import Kit, Payment, twice

ALL = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Fact) and kind is not Fact]


@pytest.fixture
def told():
    """All facts that are told while the test runs."""
    facts: list[Fact] = []
    stop = observe(facts.append, *ALL)
    yield facts
    stop()


def kinds(told: list[Fact]) -> list[type]:
    """What was told, in order."""
    return [type(fact) for fact in told]


@twice
async def test_a_scope_that_reads_is_told_from_its_opening_to_its_end(kit: Kit, told: list[Any]) -> None:
    """Each fact of a session has its database, its scope and the sync session."""
    kit.session  # noqa: B018  # the database is made before
    assert kit.db
    told.clear()
    async with kit.scope("report") as work:
        session = kit.session()
        await kit.done(session.scalar(text("SELECT 1")))
    assert kinds(told) == [
        *(ScopeOpened, SessionCreated, ConnectionTaken, TransactionBegun, StatementBegun, StatementEnded),
        *(TransactionEnded, ConnectionReturned, ScopeEnded),
    ]
    assert {fact.scope for fact in told} == {work}
    of_session = [fact for fact in told if hasattr(fact, "session")]
    assert {fact.database for fact in of_session} == {kit.db}
    assert {fact.session for fact in of_session} == {getattr(session, "sync_session", session)}
    assert [fact.statement for fact in told if hasattr(fact, "statement")] == ["SELECT 1"] * 2
    assert [fact.outcome for fact in told if isinstance(fact, TransactionEnded)] == ["rollback"]
    assert [fact.at for fact in told] == sorted(fact.at for fact in told)


@twice
async def test_a_commit_and_its_hooks_are_told(kit: Kit, told: list[Any]) -> None:
    """The hook runs after the connection is back; it and the transaction say what became of them."""
    assert kit.db
    told.clear()
    async with kit.transaction() as session:
        session.add(Payment(amount=5))
        kit.db.on_commit(str, "done")
    assert [fact.outcome for fact in told if isinstance(fact, TransactionEnded)] == ["commit"]
    assert kinds(told).index(ConnectionReturned) < kinds(told).index(HookRun)
    assert [(fact.name, fact.outcome, fact.error) for fact in told if isinstance(fact, HookRun)] == [
        ("hook str", "commit", None)
    ]


@twice
async def test_a_transaction_after_a_commit_is_told_as_another(kit: Kit, told: list[Any]) -> None:
    """A second one in the same session, and not the first."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.scalar(text("SELECT 1")))
        await kit.done(session.commit())
        assert TransactionBegunAgain not in kinds(told)
        await kit.done(session.scalar(text("SELECT 1")))
    assert kinds(told).count(TransactionBegun) == 2
    assert kinds(told).count(TransactionBegunAgain) == 1


@twice
async def test_what_failed_is_told_with_its_error(kit: Kit, told: list[Any]) -> None:
    """The statement's own error, and the work's."""
    with pytest.raises(Exception, match="nowhere") as caught:
        async with kit.transaction() as session:
            await kit.done(session.execute(text("SELECT * FROM nowhere")))
    (statement,) = [fact for fact in told if isinstance(fact, StatementEnded)]
    assert "nowhere" in str(statement.error)
    (ended,) = [fact for fact in told if isinstance(fact, ScopeEnded)]
    assert ended.error is caught.value


@twice
async def test_parameters_are_not_told(kit: Kit, told: list[Any]) -> None:
    """A fact has the text of a statement, and nothing that was given with it, for one row or many."""
    async with kit.transaction() as session:
        await kit.done(session.execute(text("SELECT :secret"), {"secret": "hunter2"}))
        await kit.done(
            session.execute(
                text("INSERT INTO payments (amount) SELECT :amount"), [{"amount": 424242}, {"amount": 424243}]
            )
        )
    assert len([fact for fact in told if isinstance(fact, StatementEnded)]) == 2
    assert "hunter2" not in repr(told)
    assert "42424" not in repr(told)
    assert kit.count() == 2


@twice
async def test_an_observer_that_fails_harms_nobody(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the work goes on, and the other observers are told."""
    seen: list[Fact] = []

    def failing(fact: Fact) -> None:
        raise RuntimeError("broken observer")

    stops = [observe(failing, *ALL), observe(seen.append, *ALL)]
    try:
        with caplog.at_level(logging.ERROR, "dbscope"):
            async with kit.transaction() as session:
                session.add(Payment(amount=5))
    finally:
        for stop in stops:
            stop()
    assert kit.count() == 1
    assert len(caplog.records) == len(seen)
    assert "an observer of ScopeOpened failed" in caplog.text


@twice
async def test_a_guard_that_raises_at_the_end_of_a_scope_hides_no_error(kit: Kit) -> None:
    """It comes out where the work succeeded; where it failed, the user's error does. All is given back before."""

    def guard(fact: Fact) -> None:
        raise GuardError("too long")

    for statement in ("SELECT 1", None):
        stop = observe(guard, ScopeEnded)
        try:
            with pytest.raises(GuardError, match="too long"):
                async with kit.scope():
                    if statement:
                        await kit.done(kit.session().scalar(text(statement)))
            with pytest.raises(ZeroDivisionError) as caught:
                async with kit.scope():
                    if statement:
                        await kit.done(kit.session().scalar(text(statement)))
                    raise ZeroDivisionError
            assert "too long" in caught.value.__notes__[0]
        finally:
            stop()
        assert kit.checked_out() == 0
        assert current_scope() is None


def test_nobody_is_told_after_the_end() -> None:
    """Ending it twice is harmless."""
    seen: list[Fact] = []
    stop = observe(seen.append, HookRun)
    events.emit(HookRun(name="one", outcome="commit"))
    stop()
    stop()
    if HookRun.observers:
        events.emit(HookRun(name="two", outcome="commit"))
    assert [fact.name for fact in seen if isinstance(fact, HookRun)] == ["one"]


@pytest.mark.parametrize(
    ("observer", "wanted", "message"),
    [
        (None, [ScopeEnded], "a function that takes a fact"),
        (print, [], "which kinds"),
        (print, [Fact], "a class such as"),
        (print, ["ScopeEnded"], "a class such as"),
        (print, [int], "a class such as"),
    ],
)
def test_bad_observers(observer: Any, wanted: list[Any], message: str) -> None:
    """The error says what is meant, and nothing is observed."""
    with pytest.raises(ConfigurationError, match=message):
        observe(observer, *wanted)
    assert not any(print in kind.observers for kind in ALL)
