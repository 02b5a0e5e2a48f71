"""The session class that users get: their own, with `ScopedSession` put before it.

Each call that may talk to the database comes by here, one thread or task at a time; what ends a transaction asks the
session's `Lifecycle` first.
"""

import contextlib
import sys
from collections.abc import Callable, Generator
from functools import wraps
from socket import gaierror
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_state

from dbscope import lifecycle
from dbscope.aborted import Failure
from dbscope.closings import expired_all, expired_alone, kept, remember
from dbscope.errors import ConfigurationError, GuardError, OverlapError, ScopeMisuseError
from dbscope.events import RollbackPending, emit
from dbscope.lifecycle import Home, Lifecycle, Source, life_of
from dbscope.where import Place, here, running_loop, spell, thread_id, worker

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

__all__ = ["ScopedSession", "adopt", "close_after", "derive", "release"]

S = TypeVar("S")
T = TypeVar("T", bound=Session)

_getframe = sys._getframe
_pending = RollbackPending.observers


class _Unborn:
    """Stands for the life of a session that the user's own call of the session maker made, until it is asked for.

    A descriptor, and no `__getattr__` on the session: with one, every attribute that SQLAlchemy reads from it costs
    ten times as much.
    """

    def __get__(self, session: Session | None, cls: type) -> Any:
        return self if session is None else adopt(session, None, None)


def itself(session: S) -> Generator[None, None, S]:
    """What awaiting a session gives: frameworks await what `db.session` gives them, see `registry.be_a_dependency`."""
    yield from ()
    return session


class ScopedSession(Session):
    """A session that knows its life. It goes before the user's session class, so that every call comes by here."""

    _dbscope: Lifecycle = cast("Lifecycle", _Unborn())
    _closes_plainly = False  # whether `close()` is SQLAlchemy's own, so that its end may do a part of it only

    __await__ = itself

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy(f"a session{f' of {self._dbscope.home.describe()}' if self._dbscope.home else ''}")

    def begin(self, nested: bool = False) -> "SessionTransaction":
        """Begin as `Session.begin`; refused in a managed transaction, which is begun and ended by its owner."""
        if not nested:
            self._dbscope.refuse_stranger("session.begin()")
        return super().begin(nested)

    def commit(self) -> None:
        """Commit as `Session.commit`; refused in a managed transaction, and while another task's writes are open."""
        life = self._dbscope
        if life.ended is not None and not self.in_transaction():
            return  # as dependencies do after the response: nothing to commit, nothing to refuse
        life.refuse_stranger("session.commit()")
        life.refuse_sibling("session.commit()")
        super().commit()

    def rollback(self) -> None:
        """Roll back as `Session.rollback`; a managed transaction can only roll back from then on."""
        self._dbscope.refuse_sibling("session.rollback()")
        self._dbscope.undone = None
        if self._dbscope.broken:
            self._throw_away()
        else:
            super().rollback()

    def close(self) -> None:
        """Close as `Session.close`: the session can be used again until its scope ends.

        In a managed transaction it waits for the owner's end (as Spring does with a connection that a transaction
        holds), so that a helper written with `with db.session() as session:` works inside of a block too.
        """
        life = self._dbscope
        if life.owner is not None:
            life.close_waits = (here() if kept else None) or True
        elif life.broken:
            self._throw_away()
        else:
            failing = sys.exc_info()[1]
            try:
                life.refuse_sibling("session.close()")
            except OverlapError as error:
                if failing is None:
                    raise
                failing.add_note(str(error))  # this is clean-up: the user's error stays on top
                return
            if failing is None and self.in_transaction():
                place = life.unsaved(self)
                life.dropped = place if isinstance(place, tuple) else here() if place else None
            if kept and self.identity_map._dict:
                remember(self, life, "session.close()")
            super().close()

    def expire(self, instance: object, attribute_names: Any = None) -> None:
        """Expire as `Session.expire`; where this was is known to the error of who reads it too late."""
        super().expire(instance, attribute_names)
        if kept and not self._dbscope.acting:
            expired_alone(instance_state(instance), "session.expire()")

    def expire_all(self) -> None:
        """Expire as `Session.expire_all`; the same."""
        if kept:
            expired_all(self._dbscope, "session.expire_all()")
        super().expire_all()

    def reset(self) -> None:
        """Reset as `Session.reset`; refused in a managed transaction."""
        self._dbscope.refuse_stranger("session.reset()")
        self._dbscope.refuse_sibling("session.reset()")
        if self._dbscope.broken:
            self._throw_away()
        else:
            super().reset()

    def invalidate(self) -> None:
        """Invalidate as `Session.invalidate`; refused in a managed transaction."""
        self._dbscope.refuse_stranger("session.invalidate()")
        self._throw_away()

    def _throw_away(self) -> None:
        """Close the session's connections instead of returning them: they may be in the middle of something."""
        self._dbscope.broken = False
        super().invalidate()

    def prepare(self) -> None:
        """Prepare as `Session.prepare`; refused in a managed transaction."""
        self._dbscope.refuse_stranger("session.prepare()")
        super().prepare()


def refuse_copy(what: str) -> NoReturn:
    """Raise where something that has connections was to be copied, or pickled for another process."""
    raise ConfigurationError(
        f"{what} was to be copied, or sent to another process, which its connections cannot be.\n"
        "Hand over ids. A process that imports the module which makes the database has one of its own; "
        "`initializer=` of a pool can make it, too."
    )


def exclusive(use: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`use`, by one thread or task at a time.

    The check is here, around whole calls, and not at each statement: the time in which a cold pool connects counts
    too, and SQLAlchemy's own guard sees that time only, so that with a warm pool it sees nothing.
    """

    @wraps(use)
    def method(session: "ScopedSession", *args: Any, **kwargs: Any) -> Any:
        life = session._dbscope
        turn = life.turn
        if not turn.acquire(False):
            if life.user == worker():  # a listener, an autoflush, a hook inside of the same call
                return use(session, *args, **kwargs)
            raise life.overlap(name)
        life.user = thread_id() if running_loop() is None else worker()
        if life.connection is None:
            life.asking = _getframe()  # whoever takes a connection in here need not look far for the user's line
        try:
            if life.generation != lifecycle.generation:
                if name in _CLEAN_UP:
                    return None  # speaking on the parent's connection would break it
                life.refuse_ended()
                _refuse_fork(life)
            if life.shared is not None:
                with life.shared.using(session, name):
                    return use(session, *args, **kwargs)
            return use(session, *args, **kwargs)
        except DBAPIError as error:
            _explain(life, error)
            if not session.is_active:
                _note_failure(life, error)
            watch = life.watch
            if watch is not None and watch.blocked_by is not None and (own := life.blocked(watch)) is not None:
                raise own from error
            raise
        except PendingRollbackError as error:
            if _pending:
                whose: dict[str, Any] = {"database": life.source, "scope": life.home, "session": session}
                emit(RollbackPending(**whose, error=error, failure=life.failed))
            if life.owner is not None:
                error.add_note(
                    f"Inside {life.owner} do not roll back: let the first error out of the block, or put the part "
                    "that may fail into `transaction(nested=True)`."
                )
            raise
        except GuardError:
            if life.asking is not None and life.connection is not None:
                _refuse_begin(session, life)
            raise
        except (ConnectionError, gaierror) as error:  # asyncpg's, which SQLAlchemy lets through as it is
            if life.connection is None and life.source is not None:
                error.add_note(
                    f"No connection could be made to {life.source.name}. Is the server up, and the address right?"
                )
            raise
        except Exception as error:
            if not session.is_active:
                _note_failure(life, error)
            raise
        except BaseException:
            life.broken = True
            raise
        finally:
            if life.watch is not None:
                life.watch.stop()
                life.watch = None
            life.asking = None
            turn.release()
            if life.ended is not None:
                release(session)  # the scope ended meanwhile, and left the session to its user

    return method


def _autoflush(session: "ScopedSession") -> None:
    """Flush as SQLAlchemy asks for it before each query, from inside of a call that has the session already.

    Most queries have nothing to write before them, and asking for the session once more took a fiftieth of a SELECT.
    """
    if not session._is_clean():
        Session._autoflush(session)


_CLEAN_UP = frozenset({"close", "rollback", "reset", "invalidate"})


def _refuse_fork(life: Lifecycle) -> None:
    raise ScopeMisuseError(
        f"a session{f' of {life.home.describe()}' if life.home else ''} was used at {spell(here())}, "
        "in the child of a fork.\nA connection cannot be shared across a fork. Open a scope of its own in the child."
    )


def _refuse_begin(session: "ScopedSession", life: Lifecycle) -> None:
    """A guard refuses the transaction that this call has begun: give back what it took; what is pending stays so."""
    transaction = session.get_transaction()
    if transaction is not None and life.owner is None and not life.writes and not session.in_nested_transaction():
        transaction.close()


def _explain(life: Lifecycle, error: DBAPIError) -> None:
    """Name the block whose time-out an error came from.

    Add to SQLite's "database is locked" what came first, where the lock could not be waited for.
    """
    owner = life.owner
    if owner is not None and owner.settings is not None:
        came_from = owner.settings.explain(error, monotonic() - life.since, owner)
        if came_from is not None:
            error.add_note(came_from)
    if life.read_first and "database is locked" in str(error.orig):
        error.add_note(
            f"The transaction began by reading, at {spell(life.taken)}; SQLite cannot turn it into a writing one once "
            "another has written. Use `with db.transaction():`, which takes the write lock at its beginning."
        )


def _note_failure(life: Lifecycle, error: Exception) -> None:
    """A flush failed, and its transaction can only be rolled back: for the error of who goes on."""
    if life.failed is None:
        cause = getattr(error, "orig", None) or error
        life.failed = Failure(getattr(error, "statement", None), here(), cause, by_server=False)


# Each of these may talk to the database, and none may do so while another thread or task does.
_USES = (
    *("execute", "scalar", "scalars", "connection", "flush", "commit", "rollback", "close", "reset", "invalidate"),
    *("begin_nested", "prepare", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
)


def derive(session_class: type[T]) -> type[T]:
    """A private subclass of the user's session class, with the rules of this page put before it."""
    name = session_class.__name__
    guarded = type(name, (ScopedSession, session_class), {"__module__": session_class.__module__})
    for use in _USES:
        setattr(guarded, use, exclusive(getattr(guarded, use), use))
    guarded._closes_plainly = session_class.close is Session.close  # type: ignore[attr-defined]  # the same
    if session_class.flush is Session.flush:
        guarded._autoflush = _autoflush  # type: ignore[attr-defined]  # it is a class that was just made
    return cast("type[T]", guarded)


def adopt(session: Session, home: Home | None, source: Source | None) -> Lifecycle:
    """Begin the life of a session that was just made."""
    life = session._dbscope = Lifecycle(home, source)  # type: ignore[attr-defined]  # it is a ScopedSession
    return life


def close_after(session: Session, asked: Place | bool) -> None:
    """Close a session whose user asked for that, and where, in a managed transaction, which is over now."""
    if kept and session.identity_map._dict:
        remember(session, life_of(session), "session.close()", None if isinstance(asked, bool) else asked)
    Session.close(session)


def _throw_away(connection: Connection | None) -> None:
    if connection is not None and not connection.closed:
        with contextlib.suppress(Exception):  # what came first stays on top
            connection.invalidate()
            connection.close()


def release(session: Session) -> None:
    """Give back what an ended session holds: roll back what is open, return the connection, let its objects go.

    Does nothing while another thread or task is executing on the session: that one does it when it is through.

    Raises:
        Exception: what closing raised, after the connection was thrown away instead.
    """
    life: Lifecycle = session._dbscope  # type: ignore[attr-defined]  # it is a ScopedSession
    turn = life.turn
    mine = turn.acquire(False)
    if mine:
        life.user = thread_id() if running_loop() is None else worker()
    elif life.user != worker():
        return
    try:
        if life.released or life.generation != lifecycle.generation:
            return  # closing would speak on a fork's parent's connection
        life.released = life.acting = True
        if life.broken:
            session.invalidate()
            return
        held = session.identity_map._dict
        transaction: Any = session._transaction
        if transaction is None and not held:
            return
        if held and kept:
            remember(session, life)
        try:
            # The turn is ours already: what `derive` put before the session's own methods would only ask for it again.
            known: Any = session
            if held or known._new or known._deleted or transaction._parent is not None or not known._closes_plainly:
                super(ScopedSession, session).close()  # type: ignore[misc]  # it is one
            else:
                transaction.close()  # there are no objects to let go of
        except BaseException:
            session.invalidate()  # never return a connection in an unknown state
            for connection in (*life.others, life.connection):  # where a rollback fails SQLAlchemy forgets them
                _throw_away(connection)
            raise
    finally:
        if life.connection is not None:
            life.root_ended()  # where closing fails SQLAlchemy does not say so
        life.acting = False
        life.owner = None
        if mine:
            turn.release()
