"""Retry: DESIGN's Transactions 5."""

import asyncio
import contextlib
import logging
import math
import random
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from dbscope import (
    AttemptFailed,
    CommitOutcomeUnknown,
    ConfigurationError,
    Conflict,
    PartialCommit,
    Retry,
    RollbackOnlyError,
    TransactionAbortedError,
    TransactionInProgress,
    current_scope,
    scope,
)
from dbscope.retry import Clock
from dbscope.testing import sandbox
from tests.support.clock import FakeClock
from tests.support.kits import Account, AsyncKit, Kit, Payment, SyncKit, of_colour, twice

LIMIT = 30  # seconds, for what happens at once


def busy() -> OperationalError:
    """A conflict, as SQLAlchemy raises it."""
    orig = sqlite3.OperationalError("database is locked")
    orig.sqlite_errorcode = sqlite3.SQLITE_BUSY
    error = OperationalError("UPDATE accounts", {}, orig)
    error.__cause__ = orig
    return error


def write(amount: int) -> Any:
    """An INSERT that goes to the database at once."""
    return insert(Payment).values(amount=amount)


class Work:
    """A unit of work that fails with each of the given errors in turn, then passes."""

    def __init__(self, kit: Kit, *errors: BaseException | None) -> None:
        self.kit = kit
        self.errors = list(errors)
        self.sessions: list[Any] = []  # kept, so that no two have one id

    async def __call__(self, amount: int = 1) -> str:
        session = self.kit.session()
        self.sessions.append(session)
        await self.kit.done(session.execute(write(amount)))
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return f"attempt {len(self.sessions)}"

    async def run(self, *args: Any, retry: Any = None) -> Any:
        """By `db.run`."""

        async def work(*given: Any) -> Any:
            return await self(*given)

        policy = Retry(clock=FakeClock()) if retry is None else retry
        return await self.kit.done(self.kit.db.run(of_colour(self.kit, work), *args, retry=policy))


# -- the whole unit, in a fresh session --------------------------------------------------------------------------------


@twice
async def test_failure_25_the_whole_work_is_repeated_in_a_fresh_session(kit: Kit) -> None:
    """A conflict repeats the whole function: each attempt has a session and a scope of its own, one is committed."""
    scopes: list[Any] = []
    work = Work(kit, busy(), busy())

    async def pay(amount: int, *, note: str) -> str:
        """Pays."""
        scopes.append(current_scope())
        return f"{await work(amount)} {note}"

    paying = kit.db.transactional(retry=Retry(clock=FakeClock()))(of_colour(kit, pay))
    assert await kit.done(paying(7, note="x")) == "attempt 3 x"
    assert kit.amounts() == [7]
    assert len({id(session) for session in work.sessions}) == 3
    assert len({id(found) for found in scopes}) == 3
    assert all(found.ended for found in scopes)
    assert (paying.__name__, paying.__doc__) == ("pay", "Pays.")
    assert kit.checked_out() == 0
    assert current_scope() is None


@twice
async def test_transactions_5_a_number_is_how_often_to_repeat(kit: Kit) -> None:
    """`retry=3` allows three attempts after the first one; the decorator asks for no more than a number."""
    work = Work(kit, *(busy() for _ in range(4)))

    async def pay() -> str:
        return await work()

    with pytest.raises(OperationalError):
        await kit.done(kit.db.transactional(retry=3)(of_colour(kit, pay))())
    assert len(work.sessions) == 4
    assert kit.amounts() == []


@twice
async def test_transactions_5_run_is_the_same_for_any_function(kit: Kit) -> None:
    """`run` calls a function with its arguments, repeats it, and gives back what it returned."""
    assert await Work(kit, busy()).run(3) == "attempt 2"
    assert kit.amounts() == [3]


@twice
async def test_transactions_5_work_inside_of_an_attempt_joins_it(kit: Kit) -> None:
    """Blocks and decorated functions without `retry` are parts of the attempt, and are repeated with it."""
    errors = [busy()]

    async def outer() -> None:
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
        async with kit.transaction(nested=True) as session:
            await kit.done(session.execute(write(2)))
        if errors:
            raise errors.pop()

    await kit.done(kit.db.run(of_colour(kit, outer), retry=Retry(clock=FakeClock())))
    assert kit.amounts() == [1, 2]


@twice
async def test_transactions_5_what_the_scope_has_read_is_given_back_first(kit: Kit) -> None:
    """In a plain scope the attempts have sessions of their own: the scope's own gives its connection back before."""
    db = kit.database(pool_size=1, max_overflow=0)
    work = Work(kit, busy())
    held: list[int] = []
    async with kit.scope():
        mine = kit.session(db)
        await kit.done(mine.execute(select(Payment)))
        assert kit.checked_out(db) == 1
        assert await work.run(retry=Retry(clock=FakeClock(during=lambda: held.append(kit.checked_out(db))))) == (
            "attempt 2"
        )
        assert held == [0]
        assert mine not in work.sessions
        assert kit.session(db) is mine
        found = await kit.done(mine.execute(select(Payment.amount)))
        assert found.scalars().all() == [1]  # a snapshot of before would not have it


@twice
async def test_transactions_5_nothing_is_held_in_a_pause(kit: Kit) -> None:
    """Between attempts no connection is checked out and no scope of the retry's is open."""
    seen: list[Any] = []

    def look() -> None:
        seen.append((kit.checked_out(), current_scope()))

    await Work(kit, busy(), busy()).run(retry=Retry(clock=FakeClock(during=look)))
    assert seen == [(0, None), (0, None)]


def test_transactions_5_the_threads_own_session_gives_its_connection_back_too(sync_kit: SyncKit) -> None:
    """Outside of every scope it is the thread's session that has read."""
    db = sync_kit.database(pool_size=1, max_overflow=0)
    db.session.execute(select(Payment))
    assert db.run(lambda: db.session.scalar(text("SELECT 42"))) == 42
    db.session.add(Payment(amount=1))
    with pytest.raises(TransactionInProgress, match="Payment objects that were never flushed"):
        db.run(lambda: None)
    db.session.remove()


@pytest.mark.parametrize("state", ["written", "pending", "savepoint"])
@twice
async def test_transactions_5_uncommitted_work_before_the_first_attempt_is_refused(kit: Kit, state: str) -> None:
    """What the scope's session has written, or has pending, would be no part of the attempts: the line is named."""
    work = Work(kit)
    async with kit.scope():
        session = kit.session()
        if state == "written":
            await kit.done(session.execute(write(1)))
            match = r"written at .*test_retry.py:\d+"
        elif state == "pending":
            session.add(Payment())
            match = "Payment objects that were never flushed"
        else:
            await kit.done(session.begin_nested())
            match = "savepoint"
        with pytest.raises(TransactionInProgress, match=match):
            await work.run()
        await kit.done(session.rollback())
    assert work.sessions == []


# -- outermost only ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [False, True])
@twice
async def test_transactions_5_a_retry_inside_of_a_transaction_is_refused(kit: Kit, new: bool) -> None:
    """Only the outermost work can be repeated: the error says why, names the one around it, and says what to do."""
    work = Work(kit)

    async def pay() -> str:
        return await work()

    paying = kit.db.transactional(retry=3, new=new)(of_colour(kit, pay))
    async with kit.transaction():
        with pytest.raises(TransactionInProgress) as caught:
            await kit.done(paying())
    why, reason, advice = str(caught.value).splitlines()
    assert ".pay() was called at " in why
    assert "inside the transaction (begun at " in why
    assert "Only the whole unit of work can be repeated" in reason
    assert "Put `retry=` where the outermost transaction begins" in advice
    assert work.sessions == []
    assert kit.amounts() == []
    assert await kit.done(paying()) == "attempt 1"


@twice
async def test_transactions_5_a_retry_inside_of_a_retry_is_refused(kit: Kit) -> None:
    """The inner one would repeat a part of what the outer one repeats."""

    async def inner() -> None: ...

    retried = kit.db.transactional(retry=3)(of_colour(kit, inner))

    async def outer() -> None:
        await kit.done(retried())

    with pytest.raises(TransactionInProgress, match=r"inside the transaction of .*outer\(\)"):
        await kit.done(kit.db.run(of_colour(kit, outer)))


@twice
async def test_transactions_5_a_retry_inside_of_an_on_success_scope_is_refused(kit: Kit) -> None:
    """The scope is one transaction, whether it has used the database yet or not."""
    work = Work(kit)
    async with kit.scope("request", commit="on-success"):
        for _ in range(2):
            with pytest.raises(TransactionInProgress, match=r"inside scope 'request' .*on-success"):
                await work.run()
            await kit.done(kit.session().execute(select(Payment)))
    assert work.sessions == []


@twice
async def test_transactions_5_a_retry_in_a_scope_inside_of_a_transaction_is_refused(kit: Kit) -> None:
    """A scope of its own does not make the work the outermost: the transaction around it keeps its locks."""
    async with kit.transaction(), kit.scope("inner"):
        with pytest.raises(TransactionInProgress, match="inside the transaction"):
            await Work(kit).run()


@twice
async def test_transactions_5_a_retry_inside_of_another_databases_transaction_is_refused(kit: Kit, tmp_path) -> None:
    """What the outer one did would not be repeated; a reader of another database has done nothing."""
    other = kit.file(tmp_path / "other.db")
    async with kit.transaction(other):
        with pytest.raises(TransactionInProgress, match="inside the transaction"):
            await Work(kit).run()
        async with kit.scope("inner"):
            with pytest.raises(TransactionInProgress, match="inside the transaction"):
                await Work(kit).run()
    async with kit.reader(other) as session:
        await kit.done(session.execute(select(Payment)))
        assert await Work(kit, busy()).run() == "attempt 2"
    async with kit.reader():
        with pytest.raises(TransactionInProgress, match="inside the reader"):
            await Work(kit).run()


@twice
async def test_transactions_5_a_hook_may_retry(kit: Kit) -> None:
    """When a hook runs the transaction is over: work in it is the outermost again."""
    done: list[Any] = []

    async def hook() -> None:
        done.append(await Work(kit, busy()).run(2))

    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        kit.db.on_commit(of_colour(kit, hook))
    assert done == ["attempt 2"]
    assert kit.amounts() == [1, 2]


async def test_transactions_5_a_task_with_a_scope_of_its_own_may_retry(async_kit: AsyncKit) -> None:
    """A task that inherited a transaction's scope, and opened one of its own, is no part of that transaction."""

    async def background() -> Any:
        async with scope("background"):
            return await Work(async_kit, busy()).run()

    async with scope("request", commit="on-success", writes=False):
        await async_kit.session().execute(select(Payment))
        assert await asyncio.wait_for(asyncio.create_task(background()), LIMIT) == "attempt 2"
    assert async_kit.amounts() == [1]


@pytest.mark.parametrize("kind", ["nested", "mandatory", "supports", "not-supported", "never"])
@twice
async def test_transactions_5_only_what_begins_a_transaction_can_be_repeated(kit: Kit, kind: str) -> None:
    """A kind that may work in somebody else's transaction, or in none, is refused with `retry` on decorating."""

    async def pay() -> None: ...

    with pytest.raises(ConfigurationError, match="cannot be repeated with kind="):
        kit.db.transactional(kind=kind, retry=3)(of_colour(kit, pay))


@pytest.mark.parametrize("retry", [-1, True, 1.5, "3", Retry])
def test_transactions_5_a_retry_is_a_number_or_a_policy(sync_kit: SyncKit, retry: Any) -> None:
    """Anything else is refused on decorating."""
    with pytest.raises(ConfigurationError, match="how often to repeat"):
        sync_kit.db.transactional(retry=retry)(print)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"times": -1}, "times"),
        ({"times": 2.5}, "times"),
        ({"first": -0.1}, "first is a number of seconds"),
        ({"ceiling": float("nan")}, "ceiling is a number of seconds"),
        ({"budget": "10"}, "budget is a number of seconds"),
        ({"on": "IntegrityError"}, "on is an exception class"),
        ({"on_retry": 3}, "on_retry is a function"),
        ({"on_retry": asyncio.sleep}, "is a coroutine function"),
    ],
)
def test_transactions_5_a_policy_that_cannot_work_is_refused(options: dict[str, Any], match: str) -> None:
    """When it is made, not when the first conflict comes."""
    with pytest.raises(ConfigurationError, match=match):
        Retry(**options)


# -- pauses, and the end of patience -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [1.0, 0.5, 0.0])
@twice
async def test_transactions_5_pauses_grow_to_a_ceiling_and_are_left_to_chance(kit: Kit, chance: float) -> None:
    """The longest pause doubles up to the ceiling; each lasts a random part of it."""
    clock = FakeClock(chance)
    work = Work(kit, *(busy() for _ in range(5)))
    await work.run(retry=Retry(5, first=0.1, ceiling=0.5, clock=clock))
    assert clock.pauses == pytest.approx([chance * longest for longest in (0.1, 0.2, 0.4, 0.5, 0.5)])


def test_transactions_5_many_attempts_do_not_overflow_the_pause() -> None:
    """However many attempts there were, the pause is a number."""
    assert Retry(10**6, ceiling=2.0).longest(10**6) == 2.0


@twice
async def test_transactions_5_the_last_conflict_is_raised_with_the_story(kit: Kit) -> None:
    """Exhausted, it raises the last attempt's own error, and a note tells how often and how long it was tried."""
    errors = [busy() for _ in range(3)]
    with pytest.raises(OperationalError) as caught:
        await Work(kit, *errors).run(retry=Retry(2, first=1.0, ceiling=9.0, clock=FakeClock()))
    assert caught.value is errors[-1]
    assert caught.value.__notes__ == [
        "Work.run.<locals>.work() met a conflict (database busy) in the last of 3 attempts, 3.00 s after the first "
        "began: retry allows 2 more after the first."
    ]
    assert kit.amounts() == []
    assert kit.checked_out() == 0


@twice
async def test_transactions_5_no_attempt_begins_after_the_budget(kit: Kit) -> None:
    """Where the next pause would outlast the budget, it is not even begun."""
    clock = FakeClock()
    work = Work(kit, *(busy() for _ in range(9)))
    with pytest.raises(OperationalError) as caught:
        await work.run(retry=Retry(100, first=1.0, ceiling=4.0, budget=8.0, clock=clock))
    assert clock.pauses == [1.0, 2.0, 4.0]
    assert len(work.sessions) == 4
    (note,) = caught.value.__notes__
    assert note.endswith("the last of 4 attempts, 7.00 s after the first began: the next would begin after the "
                         "budget of 8 s.")  # fmt: skip


@twice
async def test_transactions_5_the_budget_counts_the_attempts_too(kit: Kit) -> None:
    """Slow work uses its budget up without any pause."""
    clock = FakeClock(0.0)
    work = Work(kit, busy(), busy(), busy())

    async def slow() -> None:
        clock.time += 5.0
        await work()

    with pytest.raises(OperationalError):
        await kit.done(kit.db.run(of_colour(kit, slow), retry=Retry(9, budget=9.0, clock=clock)))
    assert len(work.sessions) == 2


@twice
async def test_transactions_5_other_errors_come_out_at_once(kit: Kit) -> None:
    """What is no conflict is raised by the first attempt that meets it, as it was."""
    failure = ValueError("the work")
    work = Work(kit, failure)
    with pytest.raises(ValueError) as caught:
        await work.run()
    assert caught.value is failure
    assert len(work.sessions) == 1
    work = Work(kit, busy(), failure)
    with pytest.raises(ValueError) as caught:
        await work.run()
    assert len(work.sessions) == 2
    assert not getattr(failure, "__notes__", [])
    assert failure.__context__ is None


@pytest.mark.parametrize("way_out", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_transactions_5_who_wants_out_gets_out(sync_kit: SyncKit, way_out: type[BaseException]) -> None:
    """An interruption is no conflict, even one that a conflict caused, in the work and in a pause."""
    error = way_out()
    error.__cause__ = busy()
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        sync_kit.session().execute(write(1))
        raise error

    with pytest.raises(way_out):
        sync_kit.db.run(work, retry=Retry(on=lambda _: True, clock=FakeClock()))
    assert calls == [1]
    assert sync_kit.checked_out() == 0

    def interrupt() -> None:
        raise error

    def busy_work() -> None:
        sync_kit.session().execute(write(1))
        raise busy()

    with pytest.raises(way_out):
        sync_kit.db.run(busy_work, retry=Retry(clock=FakeClock(during=interrupt)))
    assert sync_kit.checked_out() == 0
    assert current_scope() is None
    assert sync_kit.amounts() == []


async def test_transactions_5_a_cancel_is_no_conflict(async_kit: AsyncKit) -> None:
    """Cancelled in the work, a task ends there, even where a conflict led to the cancel."""
    cancel = asyncio.CancelledError()
    cancel.__cause__ = busy()
    work = Work(async_kit, cancel)
    with pytest.raises(asyncio.CancelledError):
        await work.run(retry=Retry(on=lambda _: True, clock=FakeClock()))
    assert len(work.sessions) == 1
    assert async_kit.checked_out() == 0


async def test_transactions_5_a_cancel_ends_a_pause_at_once(async_kit: AsyncKit) -> None:
    """Cancelled in a pause, a task ends there: no further attempt, nothing held, no scope left."""
    pausing = asyncio.Event()

    class Endless(Clock):
        async def asleep(self, seconds: float) -> None:
            pausing.set()
            await super().asleep(LIMIT * 100)

    work = Work(async_kit, busy())
    task = asyncio.create_task(work.run(retry=Retry(clock=Endless())))
    await asyncio.wait_for(pausing.wait(), LIMIT)
    assert async_kit.checked_out() == 0
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=LIMIT)
    assert done
    assert task.cancelled()
    assert len(work.sessions) == 1
    assert async_kit.checked_out() == 0
    assert async_kit.amounts() == []


@twice
async def test_transactions_5_the_real_clock_pauses(kit: Kit) -> None:
    """Without a clock of the test's, the pauses are real ones."""
    told: list[AttemptFailed] = []
    await Work(kit, busy(), busy()).run(retry=Retry(first=0.002, on_retry=told.append))
    assert [fact.attempt for fact in told] == [1, 2]
    assert told[1].elapsed >= told[0].pause


# -- never what may be saved already -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrote", [True, False])
@twice
async def test_failure_37_a_hook_that_meets_a_conflict_repeats_nothing(kit: Kit, wrote: bool) -> None:
    """Once the work is committed it is never repeated, whatever comes out of the hooks: others have run already."""
    work = Work(kit)
    sent: list[int] = []

    async def pay() -> None:
        if wrote:
            await work()
        kit.db.on_commit(sent.append, 1)
        kit.db.on_commit(of_colour(kit, hook))

    async def hook() -> None:
        raise busy()

    with pytest.raises(OperationalError) as caught:
        await kit.done(kit.db.run(of_colour(kit, pay), retry=Retry(on=Exception, clock=FakeClock())))
    assert "the commit stands" in caught.value.__notes__[0]
    assert kit.amounts() == ([1] if wrote else [])
    assert sent == [1]


@twice
async def test_transactions_5_an_error_that_commits_repeats_nothing(kit: Kit) -> None:
    """An error that does not roll back has saved the work, even one that the policy names."""
    work = Work(kit, KeyError("told"))

    async def pay() -> None:
        await work()

    policy = Retry(on=KeyError, clock=FakeClock())
    with pytest.raises(KeyError):
        await kit.done(kit.db.transactional(retry=policy, no_rollback_for=KeyError)(of_colour(kit, pay))())
    assert len(work.sessions) == 1
    assert kit.amounts() == [1]


@twice
async def test_transactions_5_hooks_of_a_failed_attempt(kit: Kit) -> None:
    """Its `on_commit` hooks are dropped; its `on_rollback` ones run, before the pause: what it did is undone."""
    seen: list[str] = []
    work = Work(kit, busy(), busy())

    async def pay() -> None:
        number = len(work.sessions) + 1
        seen.append(f"upload {number}")
        kit.db.on_commit(seen.append, f"announce {number}")
        kit.db.on_rollback(seen.append, f"remove {number}")
        await work()

    clock = FakeClock(during=lambda: seen.append("pause"))
    await kit.done(kit.db.run(of_colour(kit, pay), retry=Retry(clock=clock)))
    assert seen == [
        *("upload 1", "remove 1", "pause"),
        *("upload 2", "remove 2", "pause"),
        *("upload 3", "announce 3"),
    ]


@twice
async def test_transactions_5_a_partial_commit_is_not_repeated(kit: Kit, tmp_path) -> None:
    """A part of the work is saved: repeating it would save that part twice."""
    failure = PartialCommit("one of two", (), ())
    failure.__cause__ = busy()
    work = Work(kit, failure)
    with pytest.raises(PartialCommit):
        await work.run(retry=Retry(on=Exception, idempotent=True, clock=FakeClock()))
    assert len(work.sessions) == 1


@twice
async def test_failure_13_an_unknown_outcome_is_not_repeated(kit: Kit) -> None:
    """What may be committed is not repeated blindly, whatever `on` asks for, and even if it was translated."""
    translated = ValueError()
    translated.__cause__ = CommitOutcomeUnknown("lost")
    for failure in (CommitOutcomeUnknown("lost"), translated):
        work = Work(kit, failure)
        with pytest.raises(type(failure)):
            await work.run(retry=Retry(on=Exception, clock=FakeClock()))
        assert len(work.sessions) == 1


def cut_before_commit(kit: SyncKit, times: int) -> list[int]:
    """Have the server close the connection of the first commits, between the flush and the COMMIT."""
    cut: list[int] = []

    @event.listens_for(kit.db.engine, "commit")
    def commit(connection: Any) -> None:
        if len(cut) < times:
            cut.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar())
            with kit.outside.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": cut[-1]})

    return cut


def test_failure_13_a_connection_lost_in_the_commit(sync_server_kit: SyncKit) -> None:
    """The block's own COMMIT: not repeated, unless the caller says that doing the work twice does no harm."""
    kit = sync_server_kit
    calls: list[int] = []

    def pay() -> None:
        calls.append(1)
        kit.session().execute(write(1))

    cut = cut_before_commit(kit, 3)
    with pytest.raises(CommitOutcomeUnknown):
        kit.db.run(pay, retry=Retry(on=Exception, clock=FakeClock()))
    assert (len(cut), len(calls), kit.checked_out()) == (1, 1, 0)
    told: list[AttemptFailed] = []
    kit.db.run(pay, retry=Retry(idempotent=True, on_retry=told.append, clock=FakeClock()))
    assert (len(cut), len(calls)) == (3, 4)
    assert [fact.conflict for fact in told] == [Conflict.UNKNOWN_OUTCOME] * 2
    assert kit.amounts() == [1]


@twice
async def test_failure_2_a_conflict_swallowed_on_postgresql_is_repeated(server_kit: Kit) -> None:
    """PostgreSQL has aborted the transaction: what refuses its commit is repeated, if a conflict aborted it."""
    calls: list[int] = []
    told: list[AttemptFailed] = []

    async def pay() -> None:
        calls.append(1)
        session = server_kit.session()
        await server_kit.done(session.execute(write(1)))
        if len(calls) == 1:
            with contextlib.suppress(DBAPIError):
                await server_kit.done(session.execute(text(
                    "DO $$ BEGIN RAISE EXCEPTION 'said so' USING ERRCODE = '40001'; END $$"
                )))  # fmt: skip

    policy = Retry(on_retry=told.append, clock=FakeClock())
    await server_kit.done(server_kit.db.run(of_colour(server_kit, pay), retry=policy))
    assert [fact.conflict for fact in told] == [Conflict.SERIALIZATION]
    assert isinstance(told[0].error, TransactionAbortedError)
    assert server_kit.amounts() == [1]


@twice
async def test_failure_35_a_connection_lost_before_the_commit_is_repeated_if_asked(server_kit: Kit) -> None:
    """It is no conflict; but nothing of it was saved, so that `on` may ask for a retry."""

    def lost(error: Exception) -> bool:
        return isinstance(error, DBAPIError) and error.connection_invalidated

    def cutting(times: int) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            nonlocal times
            session = server_kit.session()
            await server_kit.done(session.execute(write(1)))
            pid = (await server_kit.done(session.execute(text("SELECT pg_backend_pid()")))).scalar()
            if times:
                times -= 1
                with server_kit.outside.connect() as other:
                    other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
            await server_kit.done(session.execute(write(2)))

        return of_colour(server_kit, work)

    with pytest.raises(DBAPIError):
        await server_kit.done(server_kit.db.run(cutting(1), retry=Retry(clock=FakeClock())))
    await server_kit.done(server_kit.db.run(cutting(2), retry=Retry(on=lost, clock=FakeClock())))
    assert server_kit.amounts() == [1, 2]


# -- what counts as a conflict -----------------------------------------------------------------------------------------


@twice
async def test_transactions_5_a_swallowed_conflict_is_repeated(kit: Kit) -> None:
    """Where a joined block met the conflict and the function hid it, what refuses the commit is repeated."""
    errors = [busy()]
    calls: list[int] = []

    async def pay() -> None:
        calls.append(1)
        await kit.done(kit.session().execute(write(1)))
        try:
            async with kit.transaction():
                if errors:
                    raise errors.pop()
        except OperationalError:
            pass

    told: list[AttemptFailed] = []
    policy = Retry(on_retry=told.append, clock=FakeClock())
    await kit.done(kit.db.run(of_colour(kit, pay), retry=policy))
    assert len(calls) == 2
    assert isinstance(told[0].error, RollbackOnlyError)
    assert kit.amounts() == [1]


@twice
async def test_transactions_5_a_conflict_that_a_savepoint_took_is_the_functions_own(kit: Kit) -> None:
    """What a savepoint undid and the function handled is no reason to repeat."""
    work = Work(kit)

    async def pay() -> None:
        await work()
        try:
            async with kit.transaction(nested=True) as session:
                await kit.done(session.execute(write(2)))
                raise busy()
        except OperationalError:
            pass

    await kit.done(kit.db.run(of_colour(kit, pay)))
    assert len(work.sessions) == 1
    assert kit.amounts() == [1]


@pytest.mark.parametrize(
    "on",
    [
        IntegrityError,
        (ValueError, IntegrityError),
        lambda error: "UNIQUE" in str(error),
    ],
    ids=["class", "tuple", "function"],
)
@twice
async def test_transactions_5_further_errors_may_be_asked_for(kit: Kit, on: Any) -> None:
    """`on` adds an exception class, several, or a question; an error of the commit's own flush counts too."""
    names = ["taken", "taken", "free"]

    async def sign_up() -> None:
        kit.session().add(Account(name=names.pop(0)))

    await kit.done(kit.db.run(of_colour(kit, sign_up)))
    told: list[AttemptFailed] = []
    policy = Retry(on=on, on_retry=told.append, clock=FakeClock())
    await kit.done(kit.db.run(of_colour(kit, sign_up), retry=policy))
    assert names == []
    assert [fact.conflict for fact in told] == [Conflict.ASKED_FOR]
    assert kit.count(Account) == 2


@twice
async def test_failure_38_stale_data_is_repeated_if_asked(server_kit: Kit) -> None:
    """An object that another deleted meanwhile: the repeated work reads again, and sees that it is gone."""
    kit = server_kit
    found: list[Any] = []

    async def deposit() -> None:
        session = kit.session()
        account = await kit.done(session.get(Account, 1))
        found.append(account)
        if account is None:
            return
        with kit.outside.begin() as other:
            other.execute(delete(Account))
        account.balance += 1

    def with_account() -> None:
        found.clear()
        with kit.outside.begin() as other:
            other.execute(insert(Account).values(id=1))

    _ = kit.db
    with_account()
    with pytest.raises(StaleDataError):
        await kit.done(kit.db.run(of_colour(kit, deposit), retry=Retry(clock=FakeClock())))
    with_account()
    await kit.done(kit.db.run(of_colour(kit, deposit), retry=Retry(stale_data=True, clock=FakeClock())))
    assert len(found) == 2
    assert found[1] is None


# -- what can be seen --------------------------------------------------------------------------------------------------


@twice
async def test_transactions_5_attempts_can_be_seen(kit: Kit, caplog) -> None:
    """Each repetition is logged, and told to `on_retry` as a frozen fact, before its pause."""
    caplog.set_level(logging.INFO, logger="dbscope")
    errors = [busy(), busy()]
    seen: list[Any] = []
    clock = FakeClock(0.5, during=lambda: seen.append("pause"))
    await Work(kit, *errors).run(retry=Retry(first=1.0, ceiling=9.0, on_retry=seen.append, clock=clock))
    name = "Work.run.<locals>.work()"
    one, two = errors
    assert seen == [
        AttemptFailed(work=name, attempt=1, conflict=Conflict.BUSY, error=one, pause=0.5, elapsed=0.0),
        "pause",
        AttemptFailed(work=name, attempt=2, conflict=Conflict.BUSY, error=two, pause=1.0, elapsed=0.5),
        "pause",
    ]
    with pytest.raises(AttributeError):
        seen[0].attempt = 2
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("dbscope", "INFO", f"attempt {n} of {name} met a conflict (database busy); the next begins in {s} s")
        for n, s in ((1, "0.500"), (2, "1.000"))
    ]


@twice
async def test_transactions_5_a_listener_that_fails_changes_nothing(kit: Kit, caplog) -> None:
    """What `on_retry` raises is logged with its name; the work goes on."""

    def count(fact: AttemptFailed) -> None:
        raise RuntimeError("no such counter")

    assert await Work(kit, busy()).run(retry=Retry(on_retry=count, clock=FakeClock())) == "attempt 2"
    (record,) = caplog.records
    assert "count failed" in record.getMessage()
    assert "no such counter" in record.exc_text


# -- real conflicts ----------------------------------------------------------------------------------------------------


def accounts(kit: Kit, number: int) -> None:
    """Rows to fight over."""
    _ = kit.db
    with kit.outside.begin() as connection:
        connection.execute(insert(Account), [{"id": n, "name": f"{n}"} for n in range(1, number + 1)])


def balances(kit: Kit) -> list[int]:
    """What is committed of them."""
    with kit.outside.connect() as connection:
        return list(connection.scalars(select(Account.balance).order_by(Account.id)))


async def contend(kit: Kit, body: Callable[[int, bool], Awaitable[None]]) -> list[AttemptFailed]:
    """Run `body(number, first)` for two contenders at once, each with a retry; what the retries told."""
    told: list[AttemptFailed] = []

    async def part(number: int) -> None:
        tried: list[int] = []

        async def work() -> None:
            tried.append(1)
            await body(number, len(tried) == 1)

        await kit.done(kit.db.run(of_colour(kit, work), retry=Retry(20, on_retry=told.append)))

    async def one() -> None:
        await part(0)

    async def two() -> None:
        await part(1)

    assert await kit.together(one, two) == [None, None]
    return told


@twice
async def test_failure_25_two_serializable_writers(server_kit: Kit) -> None:
    """Both read, then both write: one of them is repeated, and neither increment is lost."""
    kit = server_kit
    kit.database(isolation_level="SERIALIZABLE")
    accounts(kit, 1)
    read = [kit.event(), kit.event()]

    async def deposit(number: int, first: bool) -> None:
        account = await kit.done(kit.session().get(Account, 1))
        if first:
            read[number].set()
            await read[1 - number].wait()
        account.balance += 1

    told = await contend(kit, deposit)
    assert {fact.conflict for fact in told} == {Conflict.SERIALIZATION}
    assert balances(kit) == [2]


@twice
async def test_failure_25_a_deadlock(server_kit: Kit) -> None:
    """Each locks what the other wants next: the one whom the server chose is repeated, and both pass."""
    kit = server_kit
    accounts(kit, 2)
    locked = [kit.event(), kit.event()]

    async def transfer(number: int, first: bool) -> None:
        session = kit.session()
        await kit.done(session.execute(text("SET LOCAL deadlock_timeout = '20ms'")))
        await kit.done(session.execute(update(Account).values(balance=Account.balance + 1).filter_by(id=number + 1)))
        if first:
            locked[number].set()
            await locked[1 - number].wait()
        await kit.done(session.execute(update(Account).values(balance=Account.balance + 1).filter_by(id=2 - number)))

    told = await contend(kit, transfer)
    assert {fact.conflict for fact in told} == {Conflict.DEADLOCK}
    assert balances(kit) == [2, 2]


@twice
async def test_failure_25_a_lock_that_is_not_available(server_kit: Kit) -> None:
    """A row that another has locked, asked for with NOWAIT: repeated until it is free."""
    kit = server_kit
    accounts(kit, 1)
    told: list[AttemptFailed] = []

    async def deposit() -> None:
        account = await kit.done(kit.session().get(Account, 1, with_for_update={"nowait": True}))
        account.balance += 1

    with kit.outside.connect() as other:
        other.execute(select(Account).with_for_update())

        def free() -> None:
            if len(told) == 2:
                other.rollback()

        policy = Retry(on_retry=told.append, clock=FakeClock(during=free))
        await kit.done(kit.db.run(of_colour(kit, deposit), retry=policy))
    assert [fact.conflict for fact in told] == [Conflict.LOCK] * 2
    assert balances(kit) == [1]


@twice
async def test_failure_32_a_busy_sqlite(kit: Kit) -> None:
    """The write lock did not come within the driver's time-out: repeated until it is free."""
    db = kit.database(connect_args={"timeout": 0.01})
    told: list[AttemptFailed] = []

    async def pay() -> None:
        await kit.done(kit.session(db).execute(write(1)))

    with kit.outside.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")

        def free() -> None:
            if len(told) == 2:
                other.rollback()

        policy = Retry(on_retry=told.append, clock=FakeClock(during=free))
        await kit.done(db.run(of_colour(kit, pay), retry=policy))
    assert [fact.conflict for fact in told] == [Conflict.BUSY] * 2
    assert kit.amounts() == [1]


@twice
async def test_transactions_5_a_retry_works_in_a_sandbox(kit: Kit) -> None:
    """A test's sandbox undoes what the attempt that passed has committed, and no failed one leaves anything."""
    async with kit.block(sandbox(kit.db)):
        assert await Work(kit, busy()).run(5) == "attempt 2"
        async with kit.reader() as session:
            assert (await kit.done(session.execute(select(Payment.amount)))).scalars().all() == [5]
    assert kit.amounts() == []


# With one row instead of 64 the sum is right as well, after 30,000 conflicts and two minutes.
CONTENDERS, INCREMENTS, ROWS = 16, 10_000, 64


@twice
async def test_failure_25_ten_thousand_increments(server_kit: Kit) -> None:
    """16 contenders read, add one and write, 10,000 times in total, under SERIALIZABLE: not one of them is lost."""
    kit = server_kit
    db = kit.database(isolation_level="SERIALIZABLE", pool_size=CONTENDERS)
    accounts(kit, ROWS)
    told: list[AttemptFailed] = []
    policy = Retry(1000, first=0.001, ceiling=0.02, budget=math.inf, on_retry=told.append)

    async def increment(number: int) -> None:
        session = kit.session(db)
        # By hand, for the ORM would cost more than the server: this is about conflicts.
        by_id = {"id": number}
        read = await kit.done(session.execute(text("SELECT balance FROM accounts WHERE id = :id"), by_id))
        write = {"balance": read.scalar() + 1, **by_id}
        await kit.done(session.execute(text("UPDATE accounts SET balance = :balance WHERE id = :id"), write))

    run = of_colour(kit, increment)

    def contender(part: int) -> Callable[[], Awaitable[None]]:
        dice = random.Random(part)

        async def work() -> None:
            for _ in range(INCREMENTS // CONTENDERS):
                await kit.done(db.run(run, dice.randint(1, ROWS), retry=policy))

        return work

    assert await kit.together(*(contender(part) for part in range(CONTENDERS))) == [None] * CONTENDERS
    assert sum(balances(kit)) == INCREMENTS
    assert {fact.conflict for fact in told} <= {Conflict.SERIALIZATION, Conflict.DEADLOCK}
    assert told
