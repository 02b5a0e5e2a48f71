"""Managed transactions: the block that commits, or rolls back and re-raises; readers; and the decorator.

The rules stand in plans, once; `Transaction` and `AsyncTransaction` only carry them out.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar, cast

from sqlalchemy.orm import Session

from dbscope import sqlite
from dbscope.commit import before_commit, commit_owned
from dbscope.ending import Ending, aend, end
from dbscope.engines import unbind
from dbscope.errors import (
    ConfigurationError,
    NoTransactionError,
    ReadOnlyError,
    ScopeMisuseError,
    TransactionInProgress,
)
from dbscope.events import WorkFailed, tell_failed
from dbscope.generators import refuse_undecoratable
from dbscope.hooks import title
from dbscope.implicit import home_of
from dbscope.lifecycle import Doom, Lifecycle, Owner, life_of
from dbscope.plan import OnSession, Plan, arun, run
from dbscope.retry import Retry, aretrying, policy_of, retrying
from dbscope.scope import Colour, PlacedScope, Scope
from dbscope.session import close_after
from dbscope.terms import Kind, Terms
from dbscope.where import Place, here, place_of, spell

__all__ = ["AsyncTransaction", "Transaction", "transactional"]

_failed = WorkFailed.observers

SessionT = TypeVar("SessionT")
F = TypeVar("F", bound=Callable[..., Any])

_PLAIN = frozenset({Kind.SUPPORTS, Kind.NOT_SUPPORTED, Kind.NEVER})


class _Part(Enum):
    """What a block turned out to be, once entered."""

    ROOT = "begins and ends the transaction"
    JOINED = "works in the transaction of somebody else"
    SAVEPOINT = "begins and ends a savepoint"
    PLAIN = "works without a transaction"


class _Block(Generic[SessionT]):
    """What both colours share: the plans to begin and to end."""

    def __init__(self, source: Any, terms: Terms, name: str | None = None) -> None:
        self._source = source
        self._terms = terms
        self._kind = terms.kind
        self._name = name
        self._scope: Scope | None = None  # opened for this block alone
        self._session: Any = None
        self._savepoint: Any = None
        self._part: _Part | None = None
        self.rollback_only = False  # asked for inside: a savepoint is undone when the block ends, without an error

    # -- beginning ---------------------------------------------------------------------------------------------

    def _begin(self, frame: FrameType, colour: Colour) -> Plan[SessionT]:
        if self._part is not None:
            raise ScopeMisuseError(
                f"{self._title()} was entered again at {spell(here())}. Make a new one for each block: "
                f"`with db.{'reader' if self._kind is Kind.READER else 'transaction'}():`."
            )
        source = self._source
        home = home_of(source)
        life = None if home is None or not self._opened(home) else life_of(home.open(source))
        owner = None if life is None else life.owner
        if self._kind is Kind.READER:
            autocommit = self._terms.autocommit
            if owner is not None and owner.reader and (autocommit or not owner.autocommit):
                return self._join(home)
            own = self._own_scope(frame, colour)
            reader = Owner(self._title(), place_of(frame), reader=True, autocommit=autocommit)
            self._session = session = source.make_reader(own, reader)
            own.put(source, session)
            self._part = _Part.ROOT
            return cast("SessionT", session)
        self._refuse_kind(owner, frame)
        if self._kind in _PLAIN and (owner is None or self._kind is Kind.NOT_SUPPORTED):
            plain = self._own_scope(frame, colour) if home is None or owner is not None else home
            return self._take(plain, _Part.PLAIN)
        if self._kind is Kind.NEW or home is None:
            own = self._own_scope(frame, colour)
            try:
                life_of(own.open(source)).own(self._owner(frame))
                self._shape(own.open(source))
            except BaseException:
                own._end_empty()
                own._leave()
                raise
            return self._take(own, _Part.ROOT)
        session = home.open(source)
        life = life_of(session)
        owner = life.owner
        if owner is None:
            yield from self._adopt(session, life, frame)
            return self._take(home, _Part.ROOT)
        if owner.reader and self._kind is not Kind.SUPPORTS:
            raise ReadOnlyError(
                f"a transaction was asked for at {spell(here())}, inside {owner}. A reader cannot become a writer.\n"
                "Open the transaction around the reader, or use `transaction(new=True)`."
            )
        life.refuse_doomed()
        self._refuse_settings(owner, frame)
        if self._kind is Kind.NESTED:
            self._savepoint = yield OnSession(session, _begin_nested)
            return self._take(home, _Part.SAVEPOINT)
        return self._join(home)

    def _opened(self, home: Scope) -> bool:
        """Whether the scope has a session, or is itself a transaction that this block would begin."""
        return home.has(self._source) or (home.commit is not None and self._kind is not Kind.READER)

    def _refuse_kind(self, owner: Owner | None, frame: FrameType) -> None:
        """Raise where a managed transaction is open, or none is, and the block must not find that."""
        kind = self._kind
        if kind is Kind.MANDATORY and owner is None:
            raise NoTransactionError(
                f'a block of kind="mandatory" was entered at {spell(place_of(frame))}, and no transaction of '
                f"{self._source.name} is open.\nCall this inside of `with db.transaction():`."
            )
        if owner is not None and (kind is Kind.NEVER or (self._terms.durable and kind is not Kind.NEW)):
            asked = 'of kind="never"' if kind is Kind.NEVER else "with durable=True"
            raise TransactionInProgress(
                f"a block {asked} was entered at {spell(place_of(frame))}, inside {owner}.\n"
                "Call this outside of every transaction"
                + ("." if kind is Kind.NEVER else ": what it saves would go if that one rolled back.")
            )

    def _refuse_settings(self, owner: Owner, frame: FrameType) -> None:
        """Raise if the block asks for what the open transaction, which it would work in, was not begun with."""
        asked = self._terms.settings
        if asked is not None and not asked.within(owner.settings):
            raise TransactionInProgress(
                f"a block with {asked} was entered at {spell(place_of(frame))}, inside {owner}, which has "
                f"{owner.settings or 'none of the like'}.\n"
                "A transaction that is open keeps what it was begun with. Ask for it in the outermost block, or use "
                "`transaction(new=True)` for one of its own."
            )

    def _shape(self, session: Any) -> None:
        """Let the session's next BEGIN be what the block asks for."""
        settings = self._terms.settings
        if settings is not None and life_of(session).shared is None:
            self._source.shape(getattr(session, "sync_session", session), settings)

    def _own_scope(self, frame: FrameType, colour: Colour) -> Scope:
        own = Scope(self._name)
        own._colour = colour
        own._enter(frame)
        self._scope = own
        return own

    def _take(self, home: Scope, part: _Part) -> SessionT:
        self._session = home.open(self._source)
        self._part = part
        life_of(self._session).blocks += (self,)
        return cast("SessionT", self._session)

    def _join(self, home: Scope | None) -> SessionT:
        return self._take(cast("Scope", home), _Part.JOINED)

    def _owner(self, frame: FrameType) -> Owner:
        settings = self._terms.settings
        return Owner(
            self._title(),
            place_of(frame),
            immediate=settings is None or not settings.read_only,
            outcome=self._terms.outcome,
            settings=settings,
        )

    def _title(self) -> str:
        if self._kind is Kind.READER:
            return "the reader"
        return f"the transaction of {self._name}()" if self._name else "the transaction"

    def _adopt(self, session: Any, life: Lifecycle, frame: FrameType) -> Plan[None]:
        """Make what is open on the scope's session this block's own."""
        sync = getattr(session, "sync_session", session)
        if sync.in_nested_transaction():
            raise TransactionInProgress(
                f"{self._owner(frame)} found a savepoint open that nobody owns (`session.begin_nested()`).\n"
                "Open the transaction around it."
            )
        life.refuse_sibling("transaction()")
        life.own(self._owner(frame))
        if life.shared is not None:
            return
        try:
            yield from self._begin_anew(session, life)
            self._shape(session)
        except BaseException:
            life.disown()
            raise
        finally:
            life.acting = False

    def _begin_anew(self, session: Any, life: Lifecycle) -> Plan[None]:
        """Let an open transaction, which has only read, become what the block asks for, or end it."""
        if life.connection is None:
            return
        settings = self._terms.settings
        if settings is not None and settings.shapes_begin:
            life.acting = True
            yield OnSession(session, end_reading)
            return
        if settings is not None:
            connection = life.connection
            yield OnSession(session, lambda _: settings.tell(connection))
        if self._source.own_begin:
            life.refuse_second_writer()
            life.acting = True
            yield OnSession(session, sqlite.restart)

    # -- ending ------------------------------------------------------------------------------------------------

    def _end(self, error: BaseException | None) -> Ending:
        if self._part is None:
            raise ScopeMisuseError(
                f"{self._title()} was left at {spell(here())}, but never entered. Use it in a `with`."
            )
        session = self._session
        life = life_of(session)
        life.blocks = tuple(block for block in life.blocks if block is not self)
        if self._part is _Part.PLAIN and self._scope is None:
            return None, []
        if self._part is _Part.JOINED:
            if error is not None and self._kind is not Kind.READER and life.owner is not None:
                life.fail(getattr(session, "sync_session", session), "a block", error)
            return None, []
        if self._part is _Part.SAVEPOINT:
            return (yield from self._end_savepoint(session, life, error)), []
        if self._scope is not None:
            return (yield from self._scope._conclude(error))
        return (yield from self._end_adopted(session, life, error))

    def _end_reader(self, frame: FrameType, error: BaseException | None) -> bool:
        """End a reader that works in a scope of its own, without the plan of those that commit; whether it is one."""
        if self._kind is not Kind.READER or self._part is not _Part.ROOT:
            return False
        return cast("Scope", self._scope)._end_simply(frame, error, blocking=True)

    def _end_savepoint(self, session: Any, life: Lifecycle, error: BaseException | None) -> Plan[BaseException | None]:
        savepoint = self._savepoint
        failure: BaseException | None = None
        if error is None and not self.rollback_only:
            try:
                life.refuse_doomed()
                yield OnSession(session, lambda _: savepoint.commit())
                return None
            except BaseException as problem:
                failure = problem
        if _is_open(getattr(session, "sync_session", session), savepoint):
            try:
                yield OnSession(session, lambda _: savepoint.rollback())
            except BaseException as problem:
                failure = failure or problem
                life.fail(getattr(session, "sync_session", session), "the rollback to a savepoint", problem)
        return failure

    def _end_adopted(self, session: Any, life: Lifecycle, error: BaseException | None) -> Ending:
        failure: BaseException | None = None
        committed = False
        try:
            owner = cast("Owner", life.owner)
            if error is None and not owner.rollback_only:
                try:
                    yield from before_commit(lambda: [] if owner.rollback_only else [session])
                    if life.doom is not None:
                        raise life.rollback_only(life.doom)
                    if not owner.rollback_only:
                        yield OnSession(session, commit_owned)
                        committed = True
                except BaseException as problem:
                    failure = problem
            if not committed:
                try:
                    yield OnSession(session, _rollback_owned)
                except BaseException as problem:
                    failure = failure or problem
        finally:
            life.disown()
            unbind(getattr(session, "sync_session", session))
        hooks = life.take_hooks(committed=committed)
        if life.close_waits:
            asked, life.close_waits = life.close_waits, False
            yield OnSession(session, partial(close_after, asked=asked))
        return failure, hooks

    def _holds(self) -> bool:
        """Whether ending the block gives a connection back, or sends something on one."""
        if self._scope is not None:
            return any(session.in_transaction() for session in self._scope._all())
        return self._part in (_Part.ROOT, _Part.SAVEPOINT) and bool(self._session.in_transaction())

    def _leave(self) -> None:
        if self._scope is not None:
            self._scope._leave()


class Transaction(_Block[SessionT]):
    """A managed transaction: what `db.transaction()` and `db.reader()` return. Enter it once, with `with`."""

    def __enter__(self) -> SessionT:
        return run(self._begin(sys._getframe(1), Colour.SYNC))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and _failed:
            tell_failed(error)
        try:
            failing = self._terms.failure(error)
            if not self._end_reader(sys._getframe(1), failing):
                end(self._end(failing), failing, self._title)
        finally:
            self._leave()


class AsyncTransaction(_Block[SessionT]):
    """Async version of `Transaction`. Enter it once, with `async with`."""

    async def __aenter__(self) -> SessionT:
        return await arun(self._begin(sys._getframe(1), Colour.ASYNC))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None and _failed:
            tell_failed(error)
        try:
            failing = self._terms.failure(error)
            await aend(
                self._end(failing),
                failing,
                self._title,
                holds=self._holds(),
                forward=failing is None,
            )
        finally:
            self._leave()


def _begin_nested(session: Session) -> Any:
    return session.begin_nested()


def end_reading(session: Session) -> None:
    """End a transaction that has only read, below the session's own state: what is pending stays pending.

    The session's `rollback()` would drop it, and its `commit()` would write it in a transaction that is to be another.
    """
    transaction = session.get_transaction()
    if transaction is not None:
        transaction.close()
    sqlite.forget_loaded(session)


def _is_open(session: Session, savepoint: Any) -> bool:
    """Whether a savepoint has yet to be ended: after a flush that failed it is not `is_active`, but in the way."""
    found: Any = session.get_nested_transaction()
    while found is not None and found is not savepoint:
        found = found.parent
    return found is savepoint


def _rollback_owned(session: Session) -> None:
    life = life_of(session)
    life.acting = True
    try:
        if life.broken:
            session.invalidate()
        else:
            session.rollback()
    finally:
        life.acting = False


def call_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], place: Place | None, *, is_async: bool
) -> Callable[[], Any]:
    """A call of the user's function, in a scope of its own.

    Raises:
        ConfigurationError: it is no function, or a coroutine function given to a sync database.
    """
    name = f"hook {title(function)}"
    if refuse_hook(function, is_async=is_async):

        async def awaited() -> None:
            async with PlacedScope(name, place):
                await function(*args, **kwargs)

        return awaited

    def called() -> None:
        with PlacedScope(name, place):
            function(*args, **kwargs)

    return called


def refuse_hook(function: Any, *, is_async: bool) -> bool:
    """Whether the function is a coroutine function; raise if it is none at all, or of the other colour."""
    if not callable(function):
        raise ConfigurationError(f"a hook is a function, and its arguments follow it; this is {function!r}.")
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):
        if not is_async:
            raise ConfigurationError(
                f"{title(function)} is a coroutine function, and a sync database has no loop to await it on. "
                "Give it a plain function, such as one that hands the work to a task queue."
            )
        return True
    return False


# -- the decorator -----------------------------------------------------------------------------------------------


def transactional(source: Any, function: F, terms: Terms, retry: Retry | int | None = None) -> F:
    """`function`, each call of which runs in a managed transaction of `source`, repeated after conflicts if asked."""
    what = _refuse_undecoratable(source, function)
    name = title(function)
    if retry is not None:
        policy = policy_of(retry)
        if terms.kind not in (Kind.REQUIRED, Kind.NEW):
            raise ConfigurationError(
                f"{name} cannot be repeated with kind={terms.kind.value!r}: a conflict undoes the whole transaction, "
                "and only a block that begins it can repeat that. Put `retry=` on the outermost function, and leave "
                "it off here."
            )
        own = replace(terms, kind=Kind.NEW)
        if what == "async":
            return cast("F", aretrying(source, function, policy, lambda: AsyncTransaction(source, own, name)))
        return cast("F", retrying(source, function, policy, lambda: Transaction(source, own, name)))
    if what == "async":

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            async with AsyncTransaction[Any](source, terms, name):
                return await function(*args, **kwargs)

        return cast("F", awaited)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with Transaction[Any](source, terms, name):
            return function(*args, **kwargs)

    return cast("F", called)


def _refuse_undecoratable(source: Any, function: Any) -> str:
    """Which colour the function has; raise if a transaction around its call would not be one around its work."""
    is_async = refuse_undecoratable(function, "@transactional", "transaction", "with db.transaction():")
    if is_async and not source.is_async:
        raise ConfigurationError(
            f"{title(function)} is a coroutine function, and {source.name} is a sync database: it would block the "
            "loop. Use an AsyncDatabase, or `with db.transaction():` in a worker thread."
        )
    if source.is_async and not is_async:
        raise ConfigurationError(
            f"{title(function)} is a sync function, and {source.name} is an async database, which has to be awaited. "
            "Make it an `async def`, or use a Database."
        )
    return "async" if is_async else "sync"


# -- from inside of a block ------------------------------------------------------------------------------------------


def owned(source: Any, what: str) -> tuple[Session, Lifecycle]:
    """The session whose managed transaction the calling code works in, and its life.

    Raises:
        NoTransactionError: it works in none.
    """
    home = home_of(source)
    if home is not None and (home.has(source) or home.commit is not None):
        session = home.open(source)
        life = life_of(session)
        if life.owner is not None and not life.owner.reader:
            return getattr(session, "sync_session", session), life
    raise NoTransactionError(
        f"{what} was called at {spell(here())}, and no transaction of {source.name} is open.\n"
        "Outside of `with db.transaction():` there is nothing to roll back but the session: `session.rollback()`."
    )


def set_rollback_only(source: Any) -> None:
    """Let the innermost block roll back when it ends; see `Database.set_rollback_only`."""
    session, life = owned(source, "set_rollback_only()")
    block = life.blocks[-1] if life.blocks else None
    if block is None or block._part is _Part.ROOT:
        cast("Owner", life.owner).rollback_only = True
    elif block._part is _Part.SAVEPOINT:
        block.rollback_only = True
    else:  # it joined: whoever began must not take this for saved
        life.doomed("set_rollback_only() was called in a block that had joined it", session)


def doom(source: Any, reason: str) -> None:
    """Let the whole transaction be rolled back; see `Database.doom`."""
    _, life = owned(source, "doom()")
    if life.doom is None or life.doom.savepoint is not None:
        life.doom = Doom(f"it was doomed ({reason})", here(), None)
