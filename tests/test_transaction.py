"""Managed transactions: DESIGN's Transactions 1 to 3, and the decorator."""

import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from dbscope import (
    ConfigurationError,
    NotTheOwnerError,
    RollbackOnlyError,
    ScopeMisuseError,
    SelfBlockedError,
    TransactionInProgress,
    current_scope,
    scope,
)
from tests.support.kits import Kit, Payment, SyncKit, of_colour, twice
from tests.support.lines import marked

ALL = select(Payment.amount).order_by(Payment.amount)


def write(amount: int) -> Any:
    """An INSERT that goes to the database at once."""
    return insert(Payment).values(amount=amount)


async def read(kit: Kit, session: Any) -> list[int]:
    """The amounts as the session sees them."""
    return list((await kit.done(session.execute(ALL))).scalars())


# -- Transactions 1: begin, join, adopt --------------------------------------------------------------------------------


@twice
async def test_transactions_1_commits_when_the_block_ends(kit: Kit) -> None:
    """A block that ends without an error commits its work, gives the connection back, and ends its session."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        assert kit.count() == 0
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0
    assert current_scope() is None


@twice
async def test_transactions_1_an_error_rolls_back_and_is_raised_as_it_was(kit: Kit) -> None:
    """A block that fails rolls its work back, gives the connection back, and lets the very exception through."""
    failure = ValueError("the body")
    with pytest.raises(ValueError) as caught:
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            await kit.done(session.flush())
            raise failure
    assert caught.value is failure
    assert kit.amounts() == []
    assert kit.checked_out() == 0
    assert current_scope() is None


@twice
async def test_transactions_1_a_failing_commit_raises_and_releases(kit: Kit) -> None:
    """A COMMIT that fails (here its flush) reaches the caller, undoes the block, and gives the connection back."""
    async with kit.transaction() as session:
        session.add(Payment(id=1))
    with pytest.raises(IntegrityError):
        async with kit.transaction() as session:
            session.add(Payment(amount=7))
            await kit.done(session.flush())
            session.add(Payment(id=1))
    assert kit.amounts() == [500]
    assert kit.checked_out() == 0


@twice
async def test_transactions_1_joins_an_open_transaction(kit: Kit) -> None:
    """An inner block works in the outer's transaction and does not commit it: the outer's error undoes both."""
    with pytest.raises(KeyError):
        async with kit.transaction() as outer:
            outer.add(Payment(amount=1))
            async with kit.transaction() as inner:
                assert inner is outer
                inner.add(Payment(amount=2))
            assert kit.count() == 0
            raise KeyError
    assert kit.count() == 0


@twice
async def test_transactions_1_uses_the_session_of_the_scope(kit: Kit) -> None:
    """In a scope the block works on the scope's session, commits it, and leaves it usable."""
    async with kit.scope():
        session = kit.session()
        async with kit.transaction() as managed:
            assert managed is session
            managed.add(Payment(amount=1))
        assert kit.amounts() == [1]
        assert kit.checked_out() == 0
        assert await read(kit, session) == [1]


@twice
async def test_transactions_1_adopts_a_session_that_read(kit: Kit) -> None:
    """A SELECT before the block (as authentication does) does not hinder it: its writes are committed."""
    async with kit.scope():
        assert await read(kit, kit.session()) == []
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
        assert kit.amounts() == [1]


@twice
async def test_transactions_1_adopts_a_session_that_read_on_postgresql(server_kit: Kit) -> None:
    """On PostgreSQL the transaction that the SELECT opened is adopted: the same one commits the block."""
    kit = server_kit
    async with kit.scope():
        session = kit.session()
        pid = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
        async with kit.transaction():
            assert await kit.done(session.scalar(text("SELECT pg_backend_pid()"))) == pid
            session.add(Payment(amount=1))
        assert kit.amounts() == [1]
        assert kit.checked_out() == 0


def test_failure_32_two_threads_that_read_first_both_write(sync_kit: SyncKit) -> None:
    """FAILURES 32: on SQLite a block after a read takes the write lock anew, so that no upgrade can fail at once."""
    db = sync_kit.db
    have_read = threading.Barrier(2, timeout=30)
    failures: list[BaseException] = []

    def work(amount: int) -> None:
        try:
            with scope():
                db.session.execute(ALL).all()
                have_read.wait()
                with db.transaction() as session:
                    session.add(Payment(amount=amount))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=contextvars.Context().run, args=(work, amount)) for amount in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sync_kit.amounts() == [1, 2]


@twice
async def test_failure_32_what_was_read_before_the_block_is_read_again(kit: Kit) -> None:
    """FAILURES 32: where the read transaction was ended first, the block sees what others committed meanwhile."""
    db = kit.database(expire_on_commit=True)
    async with kit.transaction(db) as session:
        session.add(Payment(id=1, amount=1))
    async with kit.scope():
        session = kit.session(db)
        payment = await kit.done(session.get(Payment, 1))
        with kit.outside.begin() as other:
            other.execute(text("UPDATE payments SET amount = 2"))
        async with kit.transaction(db):
            await kit.done(session.refresh(payment) if kit.colour == "async" else None)
            payment.amount += 1
    assert kit.amounts() == [3]


@twice
async def test_transactions_1_what_is_pending_joins_the_block(kit: Kit) -> None:
    """Objects that were added or changed before the block, and not flushed, are committed with it."""
    async with kit.transaction() as session:
        session.add(Payment(id=1, amount=1))
    async with kit.scope():
        session = kit.session()
        (await kit.done(session.get(Payment, 1))).amount = 10
        session.add(Payment(amount=2))
        async with kit.transaction():
            session.add(Payment(amount=3))
    assert kit.amounts() == [2, 3, 10]


@pytest.mark.parametrize("how", ["flush", "core", "text"])
@twice
async def test_transactions_1_refuses_writes_that_nobody_owns(kit: Kit, how: str) -> None:
    """Writes sent before the block, whose author may not want them committed, refuse it and name the first's line."""
    async with kit.scope():
        session = kit.session()
        if how == "flush":
            session.add(Payment(amount=1))
            sent = session.flush()  # flush
        elif how == "core":
            sent = session.execute(write(1))  # core
        else:
            sent = session.execute(text("INSERT INTO payments (amount) VALUES (1)"))  # text
        await kit.done(sent)  # the await
        with pytest.raises(TransactionInProgress) as caught:
            async with kit.transaction():
                raise AssertionError("never entered")
        assert marked(how if kit.colour == "sync" else "the await") in str(caught.value)
        assert "Commit or roll them back" in str(caught.value)
        await kit.done(session.commit())  # still the user's
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_a_finished_write_is_no_obstacle(kit: Kit) -> None:
    """Writes that were committed or rolled back before the block do not hinder it."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(write(1)))
        await kit.done(session.commit())
        async with kit.transaction():
            session.add(Payment(amount=2))
        await kit.done(session.execute(write(3)))
        await kit.done(session.rollback())
        async with kit.transaction():
            session.add(Payment(amount=4))
    assert kit.amounts() == [1, 2, 4]


@twice
async def test_transactions_1_nested_is_undone_alone(kit: Kit) -> None:
    """`nested=True` is a savepoint: its error undoes its work, and the outer goes on and commits."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        with pytest.raises(KeyError):
            async with kit.transaction(nested=True) as inner:
                assert inner is session
                session.add(Payment(amount=2))
                await kit.done(session.flush())
                raise KeyError
        async with kit.transaction(nested=True):
            session.add(Payment(amount=3))
        session.add(Payment(amount=4))
    assert kit.amounts() == [1, 3, 4]


@twice
async def test_transactions_1_nested_on_postgresql_survives_a_failed_statement(server_kit: Kit) -> None:
    """FAILURES 28: a statement that fails in a savepoint does not abort the transaction around it."""
    kit = server_kit
    async with kit.transaction() as session:
        session.add(Payment(id=10, amount=1))
        await kit.done(session.flush())
        with pytest.raises(IntegrityError):
            async with kit.transaction(nested=True):
                await kit.done(session.execute(insert(Payment).values(id=10)))
        session.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]


@twice
async def test_transactions_1_nested_goes_with_the_outer(kit: Kit) -> None:
    """A released savepoint is a part of the outer transaction, and is rolled back with it."""
    with pytest.raises(KeyError):
        async with kit.transaction() as session:
            async with kit.transaction(nested=True):
                session.add(Payment(amount=1))
            raise KeyError
    assert kit.count() == 0


@twice
async def test_transactions_1_a_nested_block_that_cannot_flush_raises_and_is_undone(kit: Kit) -> None:
    """A savepoint whose flush fails at its end raises, and the outer goes on."""
    async with kit.transaction() as session:
        session.add(Payment(id=1, amount=1))
        await kit.done(session.flush())
        with pytest.raises(IntegrityError):
            async with kit.transaction(nested=True):
                await kit.done(session.execute(write(2)))
                session.expunge_all()
                session.add(Payment(id=1))
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_nested_outermost_is_a_transaction(kit: Kit) -> None:
    """`nested=True` where nothing is open begins a transaction, and commits it."""
    async with kit.transaction(nested=True) as session:
        session.add(Payment(amount=1))
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0


@twice
async def test_transactions_1_new_survives_the_outers_rollback(server_kit: Kit) -> None:
    """`new=True` is independent: a session and a connection of its own, committed although the outer rolls back."""
    kit = server_kit
    with pytest.raises(KeyError):
        async with kit.transaction() as outer:
            outer.add(Payment(amount=1))
            await kit.done(outer.flush())
            async with kit.transaction(new=True) as inner:
                assert inner is not outer
                assert await read(kit, inner) == []
                inner.add(Payment(amount=2))
            assert kit.amounts() == [2]
            assert kit.session() is outer
            raise KeyError
    assert kit.amounts() == [2]


@twice
async def test_transactions_1_new_that_fails_leaves_the_outer_alone(server_kit: Kit) -> None:
    """An error in `new=True` undoes that work alone; the outer may catch it, go on and commit."""
    kit = server_kit
    async with kit.transaction() as outer:
        outer.add(Payment(amount=1))
        with pytest.raises(KeyError):
            async with kit.transaction(new=True) as inner:
                inner.add(Payment(amount=2))
                raise KeyError
    assert kit.amounts() == [1]


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_transactions_1_nested_and_new_exclude_each_other(colour: str, sync_kit: SyncKit) -> None:
    """Both switches together are refused at once, saying what each means."""
    from tests.support.kits import make_kit

    db = sync_kit.db if colour == "sync" else make_kit("async", sync_kit.url).db
    with pytest.raises(ConfigurationError, match="savepoint in the open transaction, new=True one beside it"):
        db.transaction(nested=True, new=True)
    with pytest.raises(ConfigurationError, match="Choose"):
        db.transactional(nested=True, new=True)


def test_transactions_1_in_the_threads_implicit_scope(sync_kit: SyncKit) -> None:
    """Outside of every scope, a block works on the session that the thread has used already."""
    db = sync_kit.db
    session = db.session()
    assert session.execute(ALL).all() == []
    with db.transaction() as managed:
        assert managed is session
        session.add(Payment(amount=1))
    assert sync_kit.amounts() == [1]
    db.session.remove()


def test_transactions_1_without_any_scope_leaves_no_implicit_one(sync_kit: SyncKit) -> None:
    """A block where nothing is open has a scope of its own, and the thread none after it."""
    with sync_kit.db.transaction() as session:
        assert current_scope() is not None
        assert sync_kit.db.session() is session
    assert not sync_kit.db.session.registry.has()


@twice
async def test_transactions_1_a_block_is_entered_once(kit: Kit) -> None:
    """The same block object entered again, inside or after, is refused, and says to make a new one."""
    block = kit.transaction()
    async with block as session:
        session.add(Payment(amount=1))
        with pytest.raises(ScopeMisuseError, match=r"the transaction was entered again at .*Make a new one"):
            await block.__aenter__()
    with pytest.raises(ScopeMisuseError, match="entered again"):
        await block.__aenter__()
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_a_block_that_was_never_entered_cannot_be_left(kit: Kit) -> None:
    """Leaving a block by hand that was not entered says so."""
    with pytest.raises(ScopeMisuseError, match="never entered"):
        await kit.transaction().__aexit__(None, None, None)


@twice
async def test_transactions_1_refuses_a_savepoint_that_nobody_owns(kit: Kit) -> None:
    """A savepoint that the user opened and did not end refuses the block, and says so."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.begin_nested())
        with pytest.raises(TransactionInProgress, match="savepoint"):
            async with kit.transaction():
                raise AssertionError("never entered")
        await kit.done(session.rollback())
        await kit.done(session.rollback())
        async with kit.transaction():
            session.add(Payment(amount=1))
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_the_users_own_savepoint_works_inside(kit: Kit) -> None:
    """`session.begin_nested()` inside a block works as in SQLAlchemy, released or rolled back."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        savepoint = await kit.done(session.begin_nested())
        session.add(Payment(amount=2))
        await kit.done(savepoint.commit())
        savepoint = await kit.done(session.begin_nested())
        session.add(Payment(amount=3))
        await kit.done(session.flush())
        await kit.done(savepoint.rollback())
        assert await read(kit, session) == [1, 2]
    assert kit.amounts() == [1, 2]


@twice
async def test_transactions_1_objects_go_on_after_the_commit(kit: Kit) -> None:
    """An object of the scope can be changed in one block after the other."""
    async with kit.scope():
        payment = Payment(id=1, amount=1)
        async with kit.transaction() as session:
            session.add(payment)
        async with kit.transaction() as session:
            assert payment in session
            if kit.colour == "async":
                await kit.done(session.refresh(payment))
            payment.amount += 1
    assert kit.amounts() == [2]


@twice
async def test_transactions_1_a_rolled_back_object_shows_the_database_again(kit: Kit) -> None:
    """After a block that failed, its objects show what is committed."""
    async with kit.transaction() as session:
        session.add(Payment(id=1, amount=1))
    async with kit.scope():
        session = kit.session()
        payment = await kit.done(session.get(Payment, 1))
        with pytest.raises(KeyError):
            async with kit.transaction():
                payment.amount = 2
                await kit.done(session.flush())
                raise KeyError
        await kit.done(session.refresh(payment))
        assert payment.amount == 1


# -- the decorator -----------------------------------------------------------------------------------------------------


@twice
async def test_transactional_functions_commit_and_return(kit: Kit) -> None:
    """Each call runs in a transaction: committed, or rolled back and re-raised; its value is returned."""
    db = kit.db

    async def pay(amount: int, *, fail: bool = False) -> int:
        db.session.add(Payment(amount=amount))
        if fail:
            raise KeyError
        return amount * 2

    pay_all = db.transactional(of_colour(kit, pay))
    assert await kit.done(pay_all(1)) == 2
    with pytest.raises(KeyError):
        await kit.done(pay_all(2, fail=True))
    assert pay_all.__name__ == "pay"
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0


@twice
async def test_transactional_calls_join_each_other(kit: Kit) -> None:
    """A decorated function that calls itself joins its own transaction: all of it or nothing."""
    db = kit.db

    async def count_down(number: int, fail_at: int) -> None:
        db.session.add(Payment(amount=number))
        if number == fail_at:
            raise KeyError
        if number:
            await kit.done(again(number - 1, fail_at))

    again = db.transactional(of_colour(kit, count_down))
    with pytest.raises(KeyError):
        await kit.done(again(2, 0))
    assert kit.amounts() == []
    await kit.done(again(2, -1))
    assert kit.amounts() == [0, 1, 2]


@twice
async def test_transactional_options_are_those_of_transaction(server_kit: Kit) -> None:
    """`@db.transactional(nested=True)` is a savepoint, `new=True` an independent transaction."""
    kit = server_kit
    db = kit.db

    async def fail(amount: int) -> None:
        db.session.add(Payment(amount=amount))
        await kit.done(db.session.flush())
        raise KeyError

    async def keep(amount: int) -> None:
        db.session.add(Payment(amount=amount))

    nested = db.transactional(nested=True)(of_colour(kit, fail))
    independent = db.transactional(new=True)(of_colour(kit, keep))
    with pytest.raises(ValueError):
        async with kit.transaction():
            with pytest.raises(KeyError):
                await kit.done(nested(1))
            await kit.done(independent(2))
            raise ValueError
    async with kit.transaction() as session:
        session.add(Payment(amount=3))
        with pytest.raises(KeyError):
            await kit.done(nested(1))
    assert kit.amounts() == [2, 3]


@twice
async def test_transactional_methods_of_each_kind(kit: Kit) -> None:
    """Methods, static methods and class methods are decorated below @staticmethod and @classmethod."""
    db = kit.db

    async def add(self: Any, amount: int) -> Any:
        db.session.add(Payment(amount=amount))
        return self

    async def add_static(amount: int) -> int:
        db.session.add(Payment(amount=amount))
        return amount

    class Till:
        method = db.transactional(of_colour(kit, add))
        of_class = classmethod(db.transactional(of_colour(kit, add)))
        static = staticmethod(db.transactional(of_colour(kit, add_static)))

    till = Till()
    assert await kit.done(till.method(1)) is till
    assert await kit.done(till.of_class(2)) is Till
    assert await kit.done(till.static(3)) == 3
    assert kit.amounts() == [1, 2, 3]


@twice
async def test_transactional_takes_partials_and_callable_objects(kit: Kit) -> None:
    """`functools.partial` and objects with `__call__` are decorated as functions are."""
    db = kit.db

    async def add(amount: int) -> None:
        db.session.add(Payment(amount=amount))

    class Adder:
        __call__ = of_colour(kit, lambda self, amount: add(amount)) if kit.colour == "sync" else None

    await kit.done(db.transactional(functools.partial(of_colour(kit, add), 1))())
    if kit.colour == "async":

        class AsyncAdder:
            async def __call__(self, amount: int) -> None:
                await add(amount)

        await db.transactional(AsyncAdder())(2)
    else:
        db.transactional(Adder())(2)
    assert kit.amounts() == [1, 2]


@twice
async def test_transactional_refuses_wrong_decorator_order(kit: Kit) -> None:
    """Above @staticmethod, @classmethod or @property it is refused, and told where to stand."""
    for wrapper in (staticmethod, classmethod, property):
        with pytest.raises(ConfigurationError, match=f"Put it below @{wrapper.__name__}"):
            kit.db.transactional(wrapper(lambda *_: None))


@twice
async def test_transactional_refuses_generators(kit: Kit) -> None:
    """Generators and async generators, whose body runs after the call, are refused when they are decorated."""

    def rows() -> Iterator[int]:
        yield 1

    async def arows() -> AsyncIterator[int]:
        yield 1

    for generator in (rows, arows, functools.partial(rows)):
        with pytest.raises(ConfigurationError, match=r"rows is a generator.*with db.transaction"):
            kit.db.transactional(generator)


@twice
async def test_transactional_refuses_the_other_colour(kit: Kit) -> None:
    """A coroutine function on a sync database, or a plain one on an async database, is refused when decorated."""

    async def coroutine() -> None: ...

    def plain() -> None: ...

    wrong, match = (plain, "AsyncDatabase|async database") if kit.colour == "async" else (coroutine, "sync database")
    with pytest.raises(ConfigurationError, match=match):
        kit.db.transactional(wrong)
    with pytest.raises(ConfigurationError, match="decorates functions"):
        kit.db.transactional(42)


# -- Transactions 2: nobody else ends it -------------------------------------------------------------------------------

ENDS: dict[str, Callable[[Kit, Any], Any]] = {
    "session.commit()": lambda kit, session: session.commit(),
    "the registry's commit()": lambda kit, session: kit.db.session.commit(),
    "get_transaction().commit()": lambda kit, session: session.get_transaction().commit(),
    "COMMIT": lambda kit, session: session.execute(text("COMMIT")),
    "COMMIT in a comment's shade": lambda kit, session: session.execute(text("/* x */ commit")),
    "ROLLBACK": lambda kit, session: session.execute(text("ROLLBACK")),
    "BEGIN": lambda kit, session: session.execute(text("BEGIN")),
    "session.reset()": lambda kit, session: session.reset(),
    "session.invalidate()": lambda kit, session: session.invalidate(),
    "session.begin()": lambda kit, session: kit.block(session.begin()).__aenter__(),
}


@pytest.mark.parametrize("end", ENDS)
@twice
async def test_transactions_2_only_the_owner_ends_it(kit: Kit, end: str) -> None:
    """FAILURES 19: what would end the transaction from inside is refused before it happens, naming the owner."""
    with pytest.raises(NotTheOwnerError) as caught:
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            await kit.done(session.flush())
            await kit.done(ENDS[end](kit, session))
    assert "inside the transaction (begun at " in str(caught.value)
    assert "Its owner commits when its block ends" in str(caught.value)
    assert not end.startswith("session.") or str(caught.value).startswith(f"{end} was called")
    assert kit.amounts() == []
    assert kit.checked_out() == 0


@pytest.mark.parametrize("end", [*ENDS, "connection"])
@twice
async def test_transactions_2_a_refused_end_leaves_the_work_whole(kit: Kit, end: str) -> None:
    """A helper that hides the refusal has ended nothing: the owner commits everything."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        await kit.done(session.flush())
        with pytest.raises(NotTheOwnerError):
            if end == "connection":
                connection = await kit.done(session.connection())
                await kit.done(connection.commit())
            else:
                await kit.done(ENDS[end](kit, session))
        session.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]


@pytest.mark.parametrize("call", ["connection.commit()", "transaction.commit()", "exec_driver_sql"])
@twice
async def test_transactions_2_a_commit_below_the_session_is_refused(kit: Kit, call: str) -> None:
    """Committing by way of `session.connection()` commits no half of the owner's work."""
    with pytest.raises(NotTheOwnerError):
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            connection = await kit.done(session.connection())
            if call == "exec_driver_sql":
                await kit.done(connection.exec_driver_sql("/* x */ COMMIT"))
            elif call == "connection.commit()":
                await kit.done(connection.commit())
            else:
                await kit.done(connection.get_transaction().commit())
            await kit.done(session.execute(write(2)))
    assert kit.amounts() == []


@pytest.mark.parametrize("call", ["rollback", "close", "invalidate"])
@twice
async def test_transactions_2_an_end_below_the_session_commits_no_half(kit: Kit, call: str) -> None:
    """Rolling back, closing or invalidating `session.connection()` is refused, or fails the block: never one half."""
    with pytest.raises(NotTheOwnerError if call == "rollback" else SQLAlchemyError):
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            connection = await kit.done(session.connection())
            await kit.done(getattr(connection, call)())
            await kit.done(session.execute(write(2)))
    assert kit.amounts() == []
    assert kit.checked_out() == 0
    async with kit.transaction() as session:
        session.add(Payment(amount=3))
    assert kit.amounts() == [3]


@twice
async def test_transactions_2_a_refused_rollback_below_the_session_dooms_the_block(kit: Kit) -> None:
    """A helper that asked the connection to roll back, and hid the refusal, does not get its work committed."""
    with pytest.raises(RollbackOnlyError, match="a rollback of its connection was asked for"):
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            connection = await kit.done(session.connection())
            with pytest.raises(NotTheOwnerError):
                await kit.done(connection.rollback())
    assert kit.amounts() == []
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(write(2)))
        await kit.done((await kit.done(session.connection())).commit())  # the user's own, in a plain scope
        await kit.done(session.close())
    assert kit.amounts() == [2]


@twice
async def test_transactions_2_the_first_reason_is_the_one_that_is_told(kit: Kit) -> None:
    """Of several things that doom a block its end names the first."""
    with pytest.raises(RollbackOnlyError, match=r"failed with KeyError"):
        async with kit.transaction() as session:
            connection = await kit.done(session.connection())
            with pytest.raises(KeyError):
                async with kit.transaction():
                    raise KeyError
            with pytest.raises(ZeroDivisionError):
                async with kit.transaction(nested=False):
                    raise ZeroDivisionError
            with pytest.raises(NotTheOwnerError):
                await kit.done(connection.rollback())


def test_transactions_2_a_commit_of_a_copied_engines_connection_is_refused(sync_kit: SyncKit) -> None:
    """A session may take connections of an engine that `execution_options()` made: they are watched as well."""
    engine = sync_kit.db.engine
    db = sync_kit.database(engine, name="copy", binds={Payment: engine.execution_options(logging_token="copy")})
    with pytest.raises(NotTheOwnerError):
        with db.transaction() as session:
            session.add(Payment(amount=1))
            session.flush()
            session.connection(bind_arguments={"mapper": Payment}).commit()
    assert sync_kit.amounts() == []


@twice
async def test_transactions_2_prepare_is_refused(server_kit: Kit) -> None:
    """`session.prepare()` is the first half of a commit, and the owner's."""
    async with server_kit.transaction() as session:
        sync = getattr(session, "sync_session", session)
        with pytest.raises(NotTheOwnerError, match="prepare"):
            await server_kit.done(
                session.run_sync(lambda _: sync.prepare()) if server_kit.colour == "async" else sync.prepare()
            )


@pytest.mark.parametrize("where", ["session", "registry", "transaction"])
@twice
async def test_transactions_2_a_helpers_rollback_dooms_the_block(kit: Kit, where: str) -> None:
    """After a helper's rollback, later SQL and the owner's end raise, quoting its line; no half is committed."""
    helpers: dict[str, Callable[[Any], Any]] = {
        "session": lambda session: session.rollback(),
        "registry": lambda session: kit.db.session.rollback(),
        "transaction": lambda session: session.get_transaction().rollback(),
    }
    with pytest.raises(
        RollbackOnlyError, match=r"can only roll back: it was rolled back at .*\.py:\d+.*\n.*set_rollback_only"
    ):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            await kit.done(session.flush())
            await kit.done(helpers[where](session))
            with pytest.raises(RollbackOnlyError, match="rolled back"):
                await kit.done(session.execute(write(2)))
            with pytest.raises(RollbackOnlyError, match="rolled back"):
                await read(kit, session)
            with pytest.raises(RollbackOnlyError, match="rolled back"):
                session.add(Payment(amount=3))
                await kit.done(session.flush())
            with pytest.raises(RollbackOnlyError):
                async with kit.transaction():
                    raise AssertionError("never entered")
    assert kit.amounts() == []
    assert kit.checked_out() == 0


def test_transactions_2_the_rollback_is_quoted_by_its_line(sync_kit: SyncKit) -> None:
    """The error of a doomed block names the line of the helper's rollback."""
    with pytest.raises(RollbackOnlyError) as caught:
        with sync_kit.db.transaction() as session:
            session.execute(write(1))
            session.rollback()  # the helper
    assert marked("the helper") in str(caught.value)


@twice
async def test_transactions_2_the_owner_may_fail_after_a_helpers_rollback(kit: Kit) -> None:
    """In a doomed block the body's own error is what reaches the caller."""
    with pytest.raises(KeyError):
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            await kit.done(session.rollback())
            raise KeyError
    assert kit.amounts() == []


@twice
async def test_transactions_2_a_doomed_block_leaves_the_scope_usable(kit: Kit) -> None:
    """After a doomed block in a scope, the next block on the same session commits."""
    async with kit.scope():
        with pytest.raises(RollbackOnlyError):
            async with kit.transaction() as session:
                await kit.done(session.execute(write(1)))
                await kit.done(session.rollback())
        async with kit.transaction() as session:
            session.add(Payment(amount=2))
    assert kit.amounts() == [2]


@twice
async def test_transactions_2_a_rollback_to_the_helpers_savepoint_is_fine(kit: Kit) -> None:
    """A helper that rolls back the savepoint it opened has undone its own work, and no more."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        savepoint = await kit.done(session.begin_nested())
        await kit.done(session.execute(write(2)))
        await kit.done(savepoint.rollback())
    assert kit.amounts() == [1]


@pytest.mark.parametrize("how", ["close", "with", "remove"])
@twice
async def test_transactions_2_close_and_remove_wait_for_the_owner(kit: Kit, how: str) -> None:
    """A helper that closes or removes the session inside a block, as many are written, loses none of the work."""
    async with kit.scope():
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            if how == "close":
                await kit.done(session.close())
            elif how == "remove":
                await kit.done(kit.db.session.remove())
            else:
                async with kit.block(kit.db.session()) as helpers:
                    helpers.add(Payment(amount=2))
            session.add(Payment(amount=3))
        assert kit.amounts() == ([1, 2, 3] if how == "with" else [1, 3])
        assert list(session) == []  # closed, now
        assert kit.checked_out() == 0


@twice
async def test_transactions_2_a_close_in_an_on_success_scope_waits_too(kit: Kit) -> None:
    """In an on-success scope `close()` waits for the scope's end."""
    async with kit.scope(commit="on-success"):
        session = kit.session()
        session.add(Payment(amount=1))
        await kit.done(session.close())
        session.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]


@twice
async def test_transactions_2_in_a_plain_scope_the_session_is_the_users(kit: Kit) -> None:
    """In a plain scope commit, rollback, close and text("COMMIT") work as in SQLAlchemy."""
    async with kit.scope():
        session = kit.session()
        session.add(Payment(amount=1))
        await kit.done(session.commit())
        assert kit.amounts() == [1]
        session.add(Payment(amount=2))
        await kit.done(session.flush())
        await kit.done(session.rollback())
        session.add(Payment(amount=3))
        await kit.done(session.commit())
        await kit.done(session.close())
        async with kit.block(session.begin()):
            session.add(Payment(amount=4))
    assert kit.amounts() == [1, 3, 4]


# -- Transactions 3: a failure that was swallowed ----------------------------------------------------------------------


@twice
async def test_transactions_3_a_swallowed_inner_failure_cannot_be_committed(kit: Kit) -> None:
    """Where a joined block failed and the outer hid it, the outer's end raises with the cause, and commits nothing."""
    inner_failure = ValueError("the inner")
    with pytest.raises(RollbackOnlyError, match=r"failed with ValueError\('the inner'\)") as caught:
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            with pytest.raises(ValueError):
                async with kit.transaction():
                    raise inner_failure
    assert caught.value.__cause__ is inner_failure
    assert "nested=True" in str(caught.value)
    assert kit.amounts() == []
    assert kit.checked_out() == 0


@twice
async def test_transactions_3_later_sql_raises_too(kit: Kit) -> None:
    """After a swallowed inner failure the next statement raises already, a read as well."""
    with pytest.raises(RollbackOnlyError):
        async with kit.transaction() as session:
            with pytest.raises(ValueError):
                async with kit.transaction():
                    await kit.done(session.execute(write(1)))
                    raise ValueError
            with pytest.raises(RollbackOnlyError):
                await read(kit, session)
    assert kit.amounts() == []


@twice
async def test_transactions_3_in_an_on_success_scope(kit: Kit) -> None:
    """A block that failed and was hidden in an on-success scope cannot be committed by the scope."""
    with pytest.raises(RollbackOnlyError, match="the transaction of scope 'request'"):
        async with kit.scope("request", commit="on-success"):
            kit.session().add(Payment(amount=1))
            with pytest.raises(ValueError):
                async with kit.transaction():
                    raise ValueError
    assert kit.amounts() == []


@pytest.mark.parametrize("mended_by", ["nested", "begin_nested"])
@twice
async def test_transactions_3_an_enclosing_savepoint_mends_it(kit: Kit, mended_by: str) -> None:
    """A savepoint around the failed block that rolled back took its half-done work along: the outer may commit."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        with pytest.raises(ValueError):
            async with kit.transaction(nested=True) if mended_by == "nested" else kit.block(session.begin_nested()):
                async with kit.transaction():
                    session.add(Payment(amount=2))
                    await kit.done(session.flush())
                    raise ValueError
        session.add(Payment(amount=3))
    assert kit.amounts() == [1, 3]


@twice
async def test_transactions_3_a_savepoint_that_hides_it_cannot_be_released(kit: Kit) -> None:
    """A savepoint inside of which the failure was hidden is not released either: its end raises, and undoes it."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        with pytest.raises(RollbackOnlyError):
            async with kit.transaction(nested=True):
                with pytest.raises(ValueError):
                    async with kit.transaction():
                        session.add(Payment(amount=2))
                        raise ValueError
    assert kit.amounts() == [1]


@twice
async def test_transactions_3_a_savepoint_of_the_users_that_hides_it_cannot_be_released(kit: Kit) -> None:
    """Nor is the user's own savepoint; it rolls back, which mends the transaction around it."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        with pytest.raises(RollbackOnlyError):
            async with kit.block(session.begin_nested()):
                with pytest.raises(ValueError):
                    async with kit.transaction():
                        await kit.done(session.execute(write(2)))
                        raise ValueError
    assert kit.amounts() == [1]


@twice
async def test_transactions_3_a_deeper_savepoint_does_not_mend_it(kit: Kit) -> None:
    """A savepoint opened after the failure, and rolled back, mends nothing."""
    with pytest.raises(RollbackOnlyError):
        async with kit.transaction() as session:
            with pytest.raises(ValueError):
                async with kit.transaction():
                    await kit.done(session.execute(write(1)))
                    raise ValueError
            with pytest.raises(RollbackOnlyError):
                async with kit.transaction(nested=True):
                    raise AssertionError("never entered")
    assert kit.amounts() == []


@twice
async def test_transactions_3_a_deeper_savepoint_of_the_users_does_not_mend_it(kit: Kit) -> None:
    """Nor does the user's own, opened after the failure: what had failed before it was not undone."""
    with pytest.raises(RollbackOnlyError):
        async with kit.transaction() as session:
            with pytest.raises(ValueError):
                async with kit.transaction():
                    await kit.done(session.execute(write(1)))
                    raise ValueError
            savepoint = await kit.done(session.begin_nested())
            await kit.done(savepoint.rollback())
    assert kit.amounts() == []


@twice
async def test_transactions_3_a_joined_block_of_a_decorator_counts(kit: Kit) -> None:
    """A decorated helper that fails dooms the transaction that it joined."""
    db = kit.db

    async def fail() -> None:
        raise ValueError

    helper = db.transactional(of_colour(kit, fail))
    with pytest.raises(RollbackOnlyError):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            with pytest.raises(ValueError):
                await kit.done(helper())
    assert kit.amounts() == []


# -- Transactions 10, on a server --------------------------------------------------------------------------------------


@twice
async def test_transactions_10_a_commit_that_would_wait_for_its_own_work_is_refused(server_kit: Kit) -> None:
    """Where the independent transaction sends its first statement at its commit only, it is found out, too."""
    kit = server_kit
    async with kit.transaction() as outer:
        outer.add(Payment(id=5, amount=1))
        await kit.done(outer.flush())  # the lock
        with pytest.raises(SelfBlockedError) as caught:
            async with kit.transaction(new=True) as inner:
                inner.add(Payment(id=5, amount=2))
        assert marked("the lock") in str(caught.value)
    assert kit.amounts() == [1]
