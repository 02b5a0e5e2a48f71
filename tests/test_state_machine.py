"""Any mix of scopes, blocks, savepoints, failures, hooks, retries and hand-overs, against a model of dictionaries.

Hypothesis makes up programs from the rules below, a step at a time, and shrinks one that fails to the shortest.
After each step the committed rows, the hooks that ran and the connections that are out have to be the model's.
`DBSCOPE_MACHINE_EXAMPLES=2000 pytest tests/test_state_machine.py` looks longer than `make test` does.
"""

import functools
import gc
import os
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from dbscope import NoTransactionError, Retry, RollbackOnlyError, TransactionAbortedError, current_scope, scope
from tests.support.clock import FakeClock
from tests.support.kits import Kit, Payment, of_colour
from tests.support.model import Errors, Model
from tests.support.steps import Steps, steps_for

EXAMPLES = int(os.environ.get("DBSCOPE_MACHINE_EXAMPLES", "0"))
KEYS = range(1, 7)
SEED = 1  # a row that is always there, for statements that have to fail


DEPTH = 7
KINDS = [
    *("scope", "scope", "on-success", "required", "required", "required", "nested", "nested", "nested", "new", "new"),
    *("reader", "savepoint", "mandatory", "never", "durable"),
]
WRITES = [f"{how} {key}" for key in KEYS for how in ("orm", "core", "text", "delete")]
ADDS = [f"add {key}" for key in KEYS]
HOOKS = ["hook commit", "hook commit", "hook rollback", "hook before"]
A_FEW = st.lists(st.one_of(map(st.sampled_from, (["read"], WRITES, ADDS, HOOKS))), max_size=2)
WORK = ["flush", *["read"] * 6, *WRITES, *ADDS]
# What a repeated function does: some parts, each a block inside (or none) and how it ends, and then its own end.
PARTS = st.lists(
    st.tuples(
        st.sampled_from([*["plain"] * 4, "required", "nested", "new", "retry"]),
        st.lists(st.one_of(map(st.sampled_from, (["read"], WRITES, ADDS, HOOKS, HOOKS))), max_size=3),
        st.sampled_from(["fine", "failure", "conflict"]),
    ),
    max_size=3,
)
ENDS = ["fine", "fine", *["conflict"] * 4, "failure", "swallowed", "before the commit", "after the commit"]
ATTEMPTS = st.lists(st.tuples(PARTS, st.sampled_from(ENDS)), min_size=1, max_size=4)
CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'somebody was faster' USING ERRCODE = 'serialization_failure'; END $$"


class Failure(Exception):
    """What the user's own code raises."""


@dataclass
class Outcome:
    """How an attempt has to end: with which errors, by the one that was raised in it, and whether another follows."""

    errors: Errors
    error: Exception | None = None
    repeated: bool = False


class World:
    """One database, and the runner of its colour, for all examples of a test."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.one_writer = kit.url.get_backend_name() == "sqlite"
        # A wait for a lock is a bug here: it fails at once, or (on a server) before the test's patience ends.
        if self.one_writer:
            options: dict[str, Any] = {"timeout": 0}
        elif kit.colour == "sync":
            options = {"options": "-c lock_timeout=2s"}
        else:
            options = {"server_settings": {"lock_timeout": "2s"}}
        self.steps: Steps = steps_for(kit)
        self.db = self.steps.do(self._database(options))
        self.outside = kit.outside.connect().execution_options(isolation_level="AUTOCOMMIT")
        if self.one_writer:
            self.outside.execute(text("PRAGMA busy_timeout = 0"))

    async def _database(self, options: dict[str, Any]) -> Any:
        return self.kit.database(connect_args=options)

    def rows(self) -> dict[int, int]:
        return {row.id: row.amount for row in self.outside.execute(select(Payment.id, Payment.amount))}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """On SQLite: somebody else has the write lock, or is refused it, if it is taken."""
        self.outside.execute(text("BEGIN IMMEDIATE"))
        try:
            yield
        finally:
            self.outside.execute(text("ROLLBACK"))

    def abandon(self) -> None:
        """After a failure: close what is held, so that the next example does not wait for it."""

        def invalidate() -> None:
            for held in [*self.db.holders]:
                life = held()
                if life is not None and life.connection is not None:
                    life.connection.invalidate()
                    life.connection.close()
            self.db.holders.clear()

        async def abandon() -> None:
            if self.kit.colour == "sync":
                invalidate()
            else:
                from sqlalchemy.util import greenlet_spawn

                await greenlet_spawn(invalidate)

        self.steps.fresh()
        self.steps.do(abandon())

    def close(self) -> None:
        async def dispose() -> None:
            await self.kit.done(self.db.dispose())

        self.steps.do(dispose())
        self.steps.close()
        self.outside.close()
        self.kit.outside.dispose()


def carried_out(steps: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A rule that is written as a coroutine, run as what one piece of work does."""

    @functools.wraps(steps)
    def run(machine: "Machine", **drawn: Any) -> None:
        machine.world.steps.do(steps(machine, **drawn))

    return run


class Machine(RuleBasedStateMachine):
    """Each rule does one step to dbscope and to the model, and compares how they answered."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        world = self.world
        if world.kit.checked_out():
            world.abandon()
        world.outside.execute(delete(Payment))
        world.outside.execute(insert(Payment), {"id": SEED, "amount": 0})
        world.steps.fresh()
        self.kit, self.db = world.kit, world.db
        self.model = Model({SEED: 0}, one_writer=world.one_writer)
        self.blocks: list[tuple[Any, Any]] = []  # the manager of each open block (or savepoint), and its session
        self.fired: list[tuple[int, int]] = []
        self.values = 0
        self.floor = 0  # how many of the blocks are around the function that is running
        self.met: Exception | None = None  # the last conflict

    # -- helpers -------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Any:
        return self.blocks[-1][1]

    async def step(self, what: Coroutine[Any, Any, Any], errors: Errors, *, elsewhere: bool = False) -> Any:
        """Run a step of which the model says how it ends."""
        try:
            result = await (self.world.steps.hand_over(what) if elsewhere else what)
        except Exception as error:
            if not errors or not isinstance(error, errors):
                raise
            return None
        assert not errors, f"expected {errors}"
        return result

    async def done(self, value: Any) -> Any:
        return await self.kit.done(value)

    def user(self, elsewhere: bool) -> Any:
        """The thread or task that makes a step: tasks are handed to but once."""
        if not elsewhere:
            return "main"
        self.values += 1
        return "other" if self.kit.colour == "sync" else self.values

    def new_value(self) -> int:
        self.values += 1
        return self.values

    async def leave_if_stuck(self) -> None:
        """After a flush that failed, SQLAlchemy's session refuses all: the error goes on out of the block."""
        if self.model.stack and self.model.work.stuck:
            if len(self.blocks) == self.floor:
                raise Failure  # out of the function
            await self.leave_blocks(1, failing=True)

    # -- entering ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.blocks) < DEPTH)
    @rule(blocks=st.lists(st.tuples(st.sampled_from(KINDS), A_FEW), min_size=1, max_size=3))
    @carried_out
    async def enter(self, blocks: list[tuple[str, list[str]]]) -> None:
        """Enter a few blocks, each in the one before, and do the first things in each."""
        for kind, first in blocks:
            depth = len(self.blocks)
            await getattr(self, f"enter_{kind.replace('-', '_')}")()
            if len(self.blocks) <= depth:
                return  # refused
            if not await self.work_in_it(first, elsewhere=False):
                return  # it failed, and the error went out of the block

    async def enter_scope(self, commit: Literal["on-success"] | None = None) -> None:
        errors = self.model.enter_scope(on_success=commit is not None)

        async def enter() -> None:
            manager = self.kit.block(scope(commit=commit))
            await manager.__aenter__()
            self.blocks.append((manager, self.db.session()))

        await self.step(enter(), errors)

    async def enter_on_success(self) -> None:
        await self.enter_scope("on-success")

    async def enter_required(self) -> None:
        await self.enter_transaction()

    async def enter_nested(self) -> None:
        await self.enter_transaction(nested=True)

    async def enter_new(self) -> None:
        await self.enter_block(self.kit.transaction(new=True), self.model.enter_transaction("main", new=True))

    async def enter_transaction(self, **options: bool) -> None:
        if self.model.stack and not self.model.can_write("main"):
            return
        await self.enter_block(self.kit.transaction(**options), self.model.enter_transaction("main", **options))

    async def enter_mandatory(self) -> None:
        await self.enter_kind("mandatory", kind="mandatory")

    async def enter_never(self) -> None:
        await self.enter_kind("never", kind="never")

    async def enter_durable(self) -> None:
        if self.model.stack and self.model.work.owner is not None:  # elsewhere it is as required
            await self.enter_kind("durable", durable=True)

    async def enter_kind(self, name: str, **options: Any) -> None:
        if self.model.stack and self.model.can_write("main"):
            await self.enter_block(self.kit.transaction(**options), self.model.enter_kind(name, "main"))

    async def enter_reader(self) -> None:
        await self.enter_block(self.kit.reader(), self.model.enter_reader())

    async def enter_block(self, manager: Any, errors: Errors) -> None:
        async def enter() -> None:
            self.blocks.append((manager, await manager.__aenter__()))

        await self.step(enter(), errors)
        await self.leave_if_stuck()

    async def enter_savepoint(self) -> None:
        """The user's own `session.begin_nested()`."""
        if not self.blocks or self.model.work.owner == "reader" or self.model.work.doom is not None:
            return
        if self.model.work.pending and not self.model.can_write("main"):
            return
        errors = self.model.enter_savepoint("main")

        async def enter() -> None:
            session = self.session
            self.blocks.append((await self.done(session.begin_nested()), session))

        await self.step(enter(), errors)
        await self.leave_if_stuck()

    # -- leaving -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.blocks)
    @rule(count=st.integers(1, 3), failing=st.booleans())
    @carried_out
    async def leave(self, count: int, failing: bool) -> None:
        """Leave the innermost block; an error goes through `count` of them before somebody swallows it."""
        if self.model.work.pending and not failing and not self.model.can_write("main"):
            return
        await self.leave_blocks(count, failing=failing)

    async def leave_blocks(self, count: int, *, failing: bool, error: Exception | None = None) -> None:
        if failing and error is None:
            error = Failure()
        for _ in range(min(count, len(self.blocks) - self.floor)):
            kind, closed = self.model.top.kind, self.model.top.closed
            errors = self.model.leave("main", failing=error is not None)
            manager, _ = self.blocks.pop()
            if kind != "savepoint":
                came = await self.leave_block(manager, error)
            else:  # there is nothing to leave where it went with its transaction
                came = error if closed else await self.leave_savepoint(manager, error)
            if error is not None:
                assert came is error, f"{came!r} came out instead of the user's error"
            elif errors:
                assert isinstance(came, errors), f"{came!r} came out, not one of {errors}"
                error = came
            elif came is not None:
                raise came
            else:
                break
        await self.leave_if_stuck()

    async def leave_block(self, manager: Any, error: Exception | None) -> Exception | None:
        """Leave as `with` does; returns what comes out."""
        try:
            await manager.__aexit__(*((None, None, None) if error is None else (type(error), error, None)))
        except Exception as raised:
            return raised
        return error

    async def leave_savepoint(self, savepoint: Any, error: Exception | None) -> Exception | None:
        """Leave as a `with session.begin_nested()` of the user's does."""
        try:
            if error is None:
                await self.done(savepoint.commit())
        except Exception as raised:
            error = raised
        if error is not None:
            await self.done(savepoint.rollback())
        return error

    async def leave_all(self) -> None:
        while self.blocks:
            await self.leave_blocks(1, failing=True)

    # -- working -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.blocks)
    @rule(what=st.sampled_from([*WORK, *WORK, *HOOKS, *HOOKS]), elsewhere=st.booleans())
    @carried_out
    async def work(self, what: str, elsewhere: bool) -> None:
        """Do something in the innermost block, or have it done by a thread or task that it is handed over to."""
        await self.work_in_it([what], elsewhere=elsewhere)

    async def work_in_it(self, steps: list[str], *, elsewhere: bool) -> bool:
        """Do some things in a block; returns whether it is still open then."""
        depth = len(self.blocks)
        for step in steps:
            how, _, detail = step.partition(" ")
            if how == "hook":
                await self.hook(detail, elsewhere=elsewhere)
            elif how == "read":
                await self.read(elsewhere=elsewhere)
            elif how == "flush":
                await self.flush(elsewhere=elsewhere)
            elif how == "add":
                await self.add(int(detail))
            else:
                await self.write(int(detail), how, elsewhere=elsewhere)
            if len(self.blocks) < depth:
                return False
        return True

    async def read(self, *, elsewhere: bool) -> None:
        user = self.user(elsewhere)
        if (self.model.work.pending or self.model.work.owner in ("block", "on-success")) and not self.model.can_write(
            user
        ):
            return
        errors = self.model.read(user)

        async def read() -> dict[int, int]:
            found = await self.done(self.session.execute(select(Payment.id, Payment.amount)))
            return {row.id: row.amount for row in found}

        rows = await self.step(read(), errors, elsewhere=elsewhere)
        assert errors or rows == self.model.view()
        await self.leave_if_stuck()

    async def write(self, key: int, how: str, *, elsewhere: bool) -> None:
        """Insert, update or delete a row, and send it at once."""
        remove = how == "delete"
        how = "orm" if remove else how
        user = self.user(elsewhere)
        if not self.model.free(key) or not self.model.can_write(user):
            return
        there = key in {**self.model.view(), **self.model.work.pending}
        remove = remove and there and key != SEED
        value = None if remove else self.new_value()
        if how == "orm" and there and (self.model.work.owner == "reader" or self.model.work.stuck):
            how = "core"
        by_flush = how == "orm"
        errors = self.model.write(key, value, user, by_flush=by_flush)
        await self.step(self.send(key, value, how, there=there), errors, elsewhere=elsewhere)
        await self.leave_if_stuck()

    async def send(self, key: int, value: int | None, how: str, *, there: bool) -> None:
        session = self.session
        await self.done(session.flush())
        if how == "orm" and there:
            row = await self.done(session.get(Payment, key, populate_existing=True))
            if value is None:
                await self.done(session.delete(row))
            else:
                row.amount = value
            await self.done(session.flush())
        elif how == "orm":
            session.add(Payment(id=key, amount=value))
            await self.done(session.flush())
        elif how == "core":
            if value is None:
                statement: Any = delete(Payment).where(Payment.id == key)
            elif there:
                statement = update(Payment).where(Payment.id == key).values(amount=value)
            else:
                statement = insert(Payment.__table__).values(id=key, amount=value)
            await self.done(session.execute(statement, execution_options={"synchronize_session": False}))
        else:
            if value is None:
                words = "DELETE FROM payments WHERE id = :key"
            elif there:
                words = "UPDATE payments SET amount = :value WHERE id = :key"
            else:
                words = "INSERT INTO payments (id, amount) VALUES (:key, :value)"
            await self.done(session.execute(text(words), {"key": key, **({} if value is None else {"value": value})}))

    async def add(self, key: int) -> None:
        """Give the session a new object, and send nothing."""
        model = self.model
        if model.work.owner == "reader":
            return
        if not model.free(key) or not model.can_write("main") or model.work.stuck or model.work.doom is not None:
            return
        if key in model.view() or key in model.work.pending:
            return
        value = self.new_value()
        errors = model.add(key, value)

        async def add() -> None:
            self.session.add(Payment(id=key, amount=value))

        await self.step(add(), errors)

    async def flush(self, *, elsewhere: bool) -> None:
        user = self.user(elsewhere)
        if self.model.work.pending and not self.model.can_write(user):
            return

        async def flush() -> None:
            await self.done(self.session.flush())

        await self.step(flush(), self.model.flush(user), elsewhere=elsewhere)
        await self.leave_if_stuck()

    @precondition(lambda self: self.blocks and self.model.work.owner != "reader" and self.model.work.doom is None)
    @rule(how=st.sampled_from(["orm", "core"]), count=st.integers(1, 3))
    @carried_out
    async def fail_a_statement(self, how: str, count: int) -> None:
        """The database refuses a statement, and the error goes through `count` blocks."""
        model = self.model
        if model.work.stuck or not model.can_write("main") or SEED not in model.view() or not model.free(SEED):
            return
        if model.top.closed:
            return  # leaving a savepoint that is gone undoes nothing: PostgreSQL would refuse all that follows
        errors = model.failed_write("main", by_flush=how == "orm") or (IntegrityError,)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "New instance .* conflicts with persistent instance")
            await self.step(self.send(SEED, -1, how, there=False), errors)
        await self.leave_blocks(count, failing=True)

    @precondition(lambda self: self.blocks)
    @rule(how=st.sampled_from(["commit", "commit", "rollback", "close"]), elsewhere=st.booleans(), then=A_FEW)
    @carried_out
    async def end_by_hand(self, how: str, elsewhere: bool, then: list[str]) -> None:
        """`session.commit()`, `.rollback()`, `.close()`: the user's own ways in a plain scope."""
        depth = len(self.blocks)
        await getattr(self, how)(elsewhere=elsewhere)
        if len(self.blocks) == depth:
            await self.work_in_it(then, elsewhere=False)

    async def commit(self, *, elsewhere: bool) -> None:
        """Refused in a managed transaction."""
        user = self.user(elsewhere)
        if self.model.work.owner is None and (self.model.work.stuck or not self.model.can_write(user)):
            return

        async def commit() -> None:
            await self.done(self.session.commit())

        await self.step(commit(), self.model.commit(user), elsewhere=elsewhere)
        await self.leave_if_stuck()

    async def rollback(self, *, elsewhere: bool) -> None:
        """Dooms a managed transaction."""

        async def rollback() -> None:
            await self.done(self.session.rollback())

        await self.step(rollback(), self.model.rollback(self.user(elsewhere)), elsewhere=elsewhere)

    async def close(self, *, elsewhere: bool) -> None:
        """Waits for the owner's end in a managed transaction."""

        async def close() -> None:
            await self.done(self.session.close())

        await self.step(close(), self.model.close(self.user(elsewhere)), elsewhere=elsewhere)

    @precondition(lambda self: not self.blocks)
    @rule(what=st.sampled_from(HOOKS), elsewhere=st.booleans())
    @carried_out
    async def hook_outside(self, what: str, elsewhere: bool) -> None:
        """Give a hook where no block is open."""
        await self.hook(what.partition(" ")[2], elsewhere=elsewhere)

    async def hook(self, outcome: Any, *, elsewhere: bool) -> None:
        errors: Errors = () if outcome != "before" or self.model._owned() else (NoTransactionError,)
        number = self.model.hook(outcome)

        def fire() -> None:
            self.fired.append((number, self.kit.checked_out()))

        async def register() -> None:
            getattr(self.db, "before_commit" if outcome == "before" else f"on_{outcome}")(fire)

        await self.step(register(), errors, elsewhere=elsewhere)

    # -- from inside ---------------------------------------------------------------------------------------------

    @rule(what=st.sampled_from(["set_rollback_only", "doom"]), elsewhere=st.booleans())
    @carried_out
    async def mark(self, what: str, elsewhere: bool) -> None:
        """Ask for a rollback at the end, in silence or with an error."""
        errors = self.model.set_rollback_only() if what == "set_rollback_only" else self.model.make_doom()

        async def mark() -> None:
            self.db.set_rollback_only() if what == "set_rollback_only" else self.db.doom("it is wrong")

        await self.step(mark(), errors, elsewhere=elsewhere)

    # -- repeated work -------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.blocks) < DEPTH)
    @rule(
        attempts=ATTEMPTS,
        times=st.integers(0, 3),
        how=st.sampled_from(["run", "decorator", "new"]),
        around=st.none() | A_FEW,
    )
    @carried_out
    async def retry(self, attempts: list[Any], times: int, how: str, around: list[str] | None) -> None:
        """Call a function that is repeated after conflicts, perhaps in a scope that has done something before."""
        if around is not None:
            await self.enter_scope()
            if not await self.work_in_it(around, elsewhere=False):
                return
        await self.call_again_and_again(attempts, times, how)

    async def call_again_and_again(self, attempts: list[Any], times: int, how: str) -> None:
        """Each call of the function is another of the attempts; the last one, where there is none left."""
        home = current_scope()
        depth, floor = len(self.blocks), self.floor
        sessions: list[Any] = []
        outcomes: list[Outcome] = []

        def pause() -> None:
            assert current_scope() is home
            self.what_is_committed_is_the_models()
            self.the_hooks_that_ran_are_the_models()
            self.the_connections_that_are_out_are_the_models()

        async def function(word: str) -> tuple[str, int]:
            session = self.db.session()
            assert all(session is not other for other in sessions)
            sessions.append(session)
            self.model.enter_transaction("main", new=True)
            self.blocks.append((None, session))
            self.floor = len(self.blocks)
            try:
                outcome = await self.attempt(*attempts[min(len(sessions), len(attempts)) - 1])
            finally:
                del self.blocks[depth:]
                self.floor = floor
            outcomes.append(outcome)
            if outcome.error is not None:
                raise outcome.error
            return word, len(sessions)

        clock = FakeClock(during=pause)
        policy = Retry(times, clock=clock)
        refused = self.model.make_way("main")
        result = came = None
        try:
            if how == "run":
                result = await self.done(self.db.run(of_colour(self.kit, function), "done", retry=policy))
            else:
                decorated = self.db.transactional(retry=policy, new=how == "new")(of_colour(self.kit, function))
                result = await self.done(decorated("done"))
        except Exception as error:
            came = error
        if refused:
            assert isinstance(came, refused), f"{came!r} came out, not one of {refused}"
            assert not sessions
            return
        if came is not None and (len(outcomes) < len(sessions) or not isinstance(came, outcomes[-1].errors)):
            raise came
        *repeated, last = outcomes
        assert all(outcome.repeated for outcome in repeated)
        assert clock.pauses == [policy.longest(attempt + 1) for attempt in range(len(repeated))]
        assert not last.repeated or len(outcomes) == times + 1
        assert last.error is None or came is last.error
        assert last.errors or result == ("done", len(sessions))
        notes = getattr(came, "__notes__", [])
        assert last.repeated is any(f"in the last of {len(outcomes)} attempt" in note for note in notes)

    async def attempt(self, parts: list[Any], end: str) -> Outcome:
        """What the function does when it is called, and what must come of it."""
        model = self.model
        by_conflict = False  # whether it can only roll back because of a conflict
        error: Exception | None = None
        try:
            for kind, steps, part_end in parts:
                doomed = model.work.doom is not None
                met = await self.part(kind, steps, part_end)
                by_conflict = by_conflict or (met and not doomed and model.work.doom is not None)
            if end != "fine" and model.work.doom is None:
                await self.read(elsewhere=False)
            if end == "failure":
                raise Failure
            if end == "conflict" and model.work.doom is None:
                await self.meet_a_conflict(self.session)
            if end == "swallowed" and model.work.doom is None and model.work.connected:
                with pytest.raises(DBAPIError):
                    await self.meet_a_conflict(self.session)
                if not self.world.one_writer:
                    model.work.meets = (TransactionAbortedError,)
        except (Failure, DBAPIError) as raised:
            if raised is not self.met and not isinstance(raised, Failure):
                raise
            error = raised
        if error is None and end in ("before the commit", "after the commit"):
            self.conflict_in_a_hook(end)
        if error is not None:
            model.leave("main", failing=True)
            return Outcome((type(error),), error, repeated=error is self.met)
        met_there = model.work.meets
        errors = model.leave("main", failing=False)
        if not errors and end == "after the commit":
            return Outcome((DBAPIError,))
        conflict = errors == (RollbackOnlyError,) and by_conflict
        return Outcome(errors, repeated=bool(errors) and (errors == met_there or conflict))

    async def part(self, kind: str, steps: list[str], end: str) -> bool:
        """Do a part of the function; returns whether it met a conflict, which the function then swallowed."""
        depth = len(self.blocks)
        if kind == "retry":
            await self.call_again_and_again([([], "fine")], 1, "run")
            return False
        if kind == "plain":
            await self.work_in_it(steps, elsewhere=False)
            return False
        await getattr(self, f"enter_{kind}")()
        if len(self.blocks) > depth and await self.work_in_it(steps, elsewhere=False) and end == "conflict":
            await self.read(elsewhere=False)
        if len(self.blocks) == depth:
            return False
        error: Exception | None = None
        if end == "conflict" and self.model.work.connected and self.model.work.doom is None:
            try:
                await self.meet_a_conflict(self.session)
            except DBAPIError as met:
                error = met
        await self.leave_blocks(1, failing=end == "failure" or error is not None, error=error)
        return error is not None

    async def meet_a_conflict(self, session: Any) -> None:
        """What the server says to whom was too slow."""
        try:
            if not self.world.one_writer:
                await self.done(session.execute(text(CONFLICT)))
            else:
                with self.world.writing():
                    await self.done(session.execute(text("UPDATE payments SET amount = 0 WHERE id = -1")))
        except DBAPIError as error:
            self.met = error
            raise
        raise AssertionError("there was no conflict")

    def conflict_in_a_hook(self, when: str) -> None:
        async def hook() -> None:
            await self.meet_a_conflict(self.db.session())

        if when == "before the commit":
            self.model.work.meets = (DBAPIError,)
            self.db.before_commit(of_colour(self.kit, hook))
        else:
            self.db.on_commit(of_colour(self.kit, hook))

    # -- what holds after each step ------------------------------------------------------------------------------

    @invariant()
    def what_is_committed_is_the_models(self) -> None:
        assert self.world.rows() == self.model.committed

    @invariant()
    def the_hooks_that_ran_are_the_models(self) -> None:
        assert self.fired == self.model.fired

    @invariant()
    def the_connections_that_are_out_are_the_models(self) -> None:
        assert self.kit.checked_out() == self.model.checked_out()

    def teardown(self) -> None:
        """At the end of the program all blocks are left, and nothing stays behind."""
        try:
            self.world.steps.do(self.leave_all())
            self.what_is_committed_is_the_models()
            self.the_hooks_that_ran_are_the_models()
            assert self.kit.checked_out() == 0

            async def none_is_open() -> bool:
                return current_scope() is None

            assert self.world.steps.do(none_is_open())
        except BaseException:
            self.world.abandon()
            raise


def run(kit: Kit, *, examples: int) -> None:
    """Look for a program on which dbscope and the model differ."""
    world = World(kit)
    machine = type("Machine", (Machine,), {"world": world})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES or examples,
                stateful_step_count=20,
                phases=[Phase.reuse, Phase.generate]
                if os.environ.get("NOSHRINK")
                else [Phase.reuse, Phase.generate, Phase.shrink],
                deadline=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        world.abandon()
        world.close()


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """What a test leaves to the garbage collector is found in that test."""
    yield
    gc.collect()


def test_any_mix_of_blocks_on_sqlite(kit: Kit) -> None:
    """Whatever is nested, fails or is handed over: what is saved, and which hooks run, is what the rules say."""
    run(kit, examples=400)


def test_any_mix_of_blocks_on_postgresql(server_kit: Kit) -> None:
    """The same holds where several may write at the same time, each its own rows."""
    run(server_kit, examples=60)
