"""The life of one session in its scope: who may end its transaction, what it wrote, how it is given back.

Every rule that protects data is here, written once against the sync `Session`; an `AsyncSession` has one inside.
The state is a `Lifecycle` beside the session, so that users keep plain SQLAlchemy objects: the class they asked for,
with `ScopedSession` put before it.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from socket import gaierror
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from weakref import ref

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session

from dbscope.errors import (
    ConfigurationError,
    DBScopeError,
    NotTheOwnerError,
    OverlapError,
    ReadOnlyError,
    RollbackOnlyError,
    ScopeEndedError,
    ScopeMisuseError,
    SelfBlockedError,
    TransactionInProgress,
)
from dbscope.hooks import Hook
from dbscope.lockwatch import LockWatch, backend_of
from dbscope.statements import Kind
from dbscope.where import (
    UNKNOWN,
    Place,
    Worker,
    ago,
    here,
    name_of,
    place_of,
    running_loop,
    spell,
    task_now,
    thread_id,
    worker,
)

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractContextManager

    from sqlalchemy.orm import SessionTransaction

__all__ = ["Doom", "End", "Lifecycle", "Owner", "ScopedSession", "Write", "adopt", "derive", "release"]

S = TypeVar("S", bound=Session)

# Bound once: they are on the way of every statement.
_monotonic = time.monotonic
_getframe = sys._getframe


class Home(Protocol):
    """What a lifecycle asks of the scope that its session lives in."""

    @property
    def is_inside(self) -> bool:
        """Whether there is a scope around this one."""

    def describe(self) -> str:
        """The scope as errors name it."""

    def outer_lives(self, source: Any) -> "Sequence[Lifecycle]":
        """The lives, in the scopes around this one, of sessions of `source` that cannot go on before this work ends."""


class Source(Protocol):
    """What a lifecycle asks of its database."""

    name: str
    one_writer: bool
    knows_waits: bool
    holders: set["ref[Lifecycle]"]

    def capacity(self) -> float:
        """How many connections the pool gives out at most."""

    def run_hooks(self, hooks: "Sequence[Hook]") -> None:
        """Run the hooks of a transaction that its user ended, each in a scope of its own."""


class Shared(Protocol):
    """One connection for the sessions of several scopes, under a transaction that is never committed: a test's."""

    def using(self, session: "ScopedSession", use: str) -> "AbstractContextManager[None]":
        """Around each call of a session that may talk to the database."""

    def statement(self, session: Session, kind: Kind, text: str) -> None:
        """A session is about to execute a statement other than a plain read."""


class Owner:
    """Who began a managed transaction, and so alone may end it: a block, or an on-success scope."""

    __slots__ = ("immediate", "place", "reader", "title", "worker")

    def __init__(self, title: str, place: Place | None, *, immediate: bool = False, reader: bool = False) -> None:
        self.worker = worker()  # whose block it is: it ends no sooner than what the same one enters in it
        self.title = title
        self.place = place
        self.immediate = immediate
        self.reader = reader

    def __str__(self) -> str:
        return f"{self.title} (begun at {spell(self.place)})"


class Write:
    """The first write of one task in one savepoint (or outside of any)."""

    __slots__ = ("over", "place", "savepoint", "task")

    def __init__(
        self, place: Place | None, savepoint: "SessionTransaction | None", task: "asyncio.Task[Any] | None"
    ) -> None:
        self.place = place
        self.savepoint = savepoint
        self.task = task
        self.over = False


class Doom:
    """Why a managed transaction can only roll back, and the savepoint whose rollback would mend it."""

    __slots__ = ("cause", "place", "savepoint", "why")

    def __init__(
        self, why: str, place: Place | None, savepoint: "SessionTransaction | None", cause: BaseException | None = None
    ) -> None:
        self.why = why
        self.place = place
        self.savepoint = savepoint
        self.cause = cause


class End:
    """How a session's life ended: for the errors of those who kept it."""

    __slots__ = ("at", "how", "pid", "place", "whose")

    def __init__(self, whose: Home | str, how: str, place: Place | None = None, pid: int | None = None) -> None:
        self.whose = whose  # described when an error asks: that costs more than all else that ends a scope
        self.how = how
        self.place = place
        self.pid = pid
        self.at = _monotonic()

    @property
    def title(self) -> str:
        """Whose end it was, as errors name it."""
        return self.whose if isinstance(self.whose, str) else self.whose.describe()


# The writes whose tasks started the running one (or are it): they may be ended from here.
_wrote: ContextVar[tuple[Write, ...]] = ContextVar("dbscope.wrote", default=())

# Bumped in the child of a fork: a session of the parent is then refused.
generation = 0


class Lifecycle:
    """What dbscope knows of one session.

    Slots, all set at once: every statement reads a dozen of them, and a default on the class, or a dictionary, takes
    ten times as long to read.
    """

    __slots__ = (
        *("__weakref__", "_ref", "acting", "asking", "backend", "beside", "broken", "close_waits", "committed"),
        *("connection", "doom", "dropped", "ended", "freed", "generation", "home", "hooks", "owner"),
        *("read_first", "released", "shared", "since", "source", "taken", "turn", "undone", "used", "user", "watch"),
        *("writes", "wrote"),
    )

    def __init__(self, home: Home | None, source: Source | None) -> None:
        self.turn = threading.Lock()  # held while one thread or task uses the session
        self.generation = generation
        self.home = home
        self.source = source
        self.owner: Owner | None = None  # whose managed transaction this is; None: the user's own
        self.acting = False  # the owner, or the scope, is ending the transaction now
        self.ended: End | None = None
        self.used = False  # a transaction was begun on it, by SQL or by add(): before that it holds nothing at all
        self.released = False
        self.doom: Doom | None = None
        self.writes: tuple[Write, ...] = ()
        self.wrote = False  # be it undone to a savepoint: SQLite keeps the lock until the transaction ends
        self.hooks: tuple[Hook, ...] = ()
        self.dropped: Place | None = None  # the first write of a transaction that was closed without a commit
        self.undone: OverlapError | None = None  # what the next use raises: a sibling threw this transaction away
        self.committed = False  # SQLAlchemy said so of the transaction that is ending
        self.freed: SessionTransaction | None = None  # the savepoint that SQLAlchemy is releasing
        self.close_waits = False
        self.broken = False  # a BaseException cut through a flush or a commit
        self.read_first = False  # on SQLite: the transaction began with a read, and a write has to upgrade it
        self.taken: Place | None = None  # the line that took the connection, while there is one
        self.since = 0.0  # when it did, on the monotonic clock
        self.asking: FrameType | None = None  # the call of the session's that may take a connection, while it runs
        self.user: Worker | None = None  # who used the session last, or is using it
        self.connection: Connection | None = None  # while a transaction is open on it
        self.beside: tuple[Lifecycle, ...] = ()  # open transactions of the same work: never wait for their locks
        self.backend: int | None = None  # the server's process, where it was asked for
        self.watch: LockWatch | None = None  # over the statement that is running
        self.shared: Shared | None = None  # whose connection this session and others work on, in a test's sandbox
        self._ref: ref[Lifecycle] | None = None

    # -- who may do what ---------------------------------------------------------------------------------------

    def refuse_ended(self) -> None:
        """Raise if the session's life is over."""
        end = self.ended
        if end is None:
            return
        if end.pid is not None:
            raise ScopeMisuseError(
                f"a session of {end.title} was used at {spell(here())}, in another process: {end.how}.\n"
                "A connection cannot be shared across a fork. Open a scope of its own in the child."
            )
        raise ScopeEndedError(
            f"the session of {end.title} was used by {name_of(worker())} at {spell(here())}, "
            f"but {end.how} {ago(end.at)}{f' at {spell(end.place)}' if end.place else ''}.\n"
            "Work that outlives a scope opens its own (`with scope(): ...`, or `async with`), "
            "and is handed ids instead of objects."
        )

    def refuse_doomed(self) -> None:
        """Raise if the managed transaction can only roll back, or a sibling rolled back what was written before."""
        if self.undone is not None:
            raise self.undone
        doom = self.doom
        if doom is not None and self.owner is not None:
            raise self.rollback_only(doom)

    def rollback_only(self, doom: Doom) -> RollbackOnlyError:
        """The error for whoever goes on in a doomed transaction."""
        error = RollbackOnlyError(
            f"{self.owner} can only roll back: {doom.why} at {spell(doom.place)}.\n"
            "Let the error out of the block, or put the part that may fail into `transaction(nested=True)`."
        )
        error.__cause__ = doom.cause
        return error

    def refuse_stranger(self, what: str) -> None:
        """Raise if the transaction has an owner, and it is not the owner who acts."""
        owner = self.owner
        if owner is None or self.acting:
            return
        if owner.reader:
            raise ReadOnlyError(
                f"{what} was called at {spell(here())}, inside {owner}.\n"
                "A reader has nothing to commit. Use `transaction(new=True)` for work that must be saved."
            )
        raise NotTheOwnerError(
            f"{what} was called at {spell(here())}, inside {owner}.\n"
            "Its owner commits when its block ends without an error.\n"
            "Use `transaction(new=True)` for work that must commit now, or `nested=True` for a savepoint."
        )

    def refuse_sibling(self, what: str) -> None:
        """Raise if a task that has written in this transaction still runs, and this is neither it nor its child."""
        write = self.sibling_write()
        if write is not None:
            raise OverlapError(
                f"{what} was called by {name_of(worker())} at {spell(here())}, while {name_of(write.task)}, which "
                f"wrote at {spell(write.place)} in the same transaction, is still running.\n"
                "It would end the other's work half-way. Give each task a scope of its own (`async with scope():`, "
                "or `fan_out`), or let the task that wrote end its transaction."
            )

    def sibling_write(self) -> Write | None:
        """A write of a task that still runs, if this is neither it nor started by it since, nor the scope's own end."""
        if self.acting or len(self.writes) == 0:
            return None
        me = task_now()
        for write in self.writes:
            task = write.task
            if not (task is None or task is me or task.done() or write in _wrote.get()):
                return write
        return None

    def undone_by_sibling(self) -> None:
        """A transaction was rolled back below the session's own methods: tell those whose writes are gone with it."""
        write = self.sibling_write()
        if write is not None:
            self.undone = OverlapError(
                f"the transaction in which {name_of(write.task)} wrote at {spell(write.place)} was rolled back by "
                f"{name_of(worker())} at {spell(here())}; the write is gone.\n"
                "Give each task a scope of its own (`async with scope():`, or `fan_out`). `session.rollback()` goes on."
            )

    def overlap(self, what: str) -> DBScopeError:
        """The error for the second of two users at the same moment."""
        return OverlapError(
            f"session.{what}() was called by {name_of(worker())} at {spell(here())}, while {name_of(self.user)} "
            f"is using the same session{f' of {self.home.describe()}' if self.home else ''}.\n"
            "A session serves one thread or task at a time. Give each a scope of its own (`with scope():`, `fan_out`)."
        )

    # -- what happens ------------------------------------------------------------------------------------------

    def began(self, session: Session, connection: Any) -> None:
        """The session took a connection and began on it."""
        connection._dbscope = session  # its statements find their session here
        if type(connection) is Connection and not isinstance(session.bind, Connection):  # the session's own
            connection.__class__ = OwnedConnection
        self.connection = connection
        self.taken = (here() if self.asking is None else place_of(self.asking.f_back)) or UNKNOWN
        self.since = _monotonic()
        source, home = self.source, self.home
        if source is not None:
            if source.knows_waits and home is not None and self.shared is None:
                self.beside = tuple(life for life in home.outer_lives(source) if life.connection is not None)
            mine = self._ref = ref(self, source.holders.discard)
            source.holders.add(mine)

    def statement(self, session: Session, kind: Kind, text: str, *, alone: bool = False) -> None:
        """A statement other than a plain read is about to be executed, or the transaction is doomed.

        `alone`: it takes part in no transaction, as SQLite's VACUUM.
        """
        if self.shared is not None:
            self.shared.statement(session, kind, text)
        if self.acting:
            if kind is Kind.WRITE:  # the flush of a commit
                self.refuse_write()
            return
        if kind is not Kind.SAVEPOINT:  # going back to one is what mends a doomed transaction
            self.refuse_doomed()
        owner = self.owner
        if owner is not None:
            if kind is Kind.CONTROL:
                self.refuse_stranger(f"{' '.join(text.split())[:40]!r}")
            if owner.reader and (kind is Kind.WRITE or (kind is Kind.SETTING and _lifts_read_only(text))):
                raise ReadOnlyError(
                    f"a write was sent at {spell(here())}, inside {owner}: {' '.join(text.split())[:60]!r}.\n"
                    "Use `transaction()` for work that writes."
                )
        if kind is Kind.WRITE and not alone:
            self.refuse_write()
            self.note_write(session)

    def watch_locks(self, connection: Any) -> None:
        """A statement is about to run that may wait for a lock of the transactions around this one."""
        if self.backend is None:
            self.backend = backend_of(connection)
        self.watch = LockWatch(self.backend, [life.connection for life in self.beside if life.connection is not None])

    def blocked(self, watch: LockWatch) -> SelfBlockedError | None:
        """The error for a statement that was cancelled because its own work held the lock, if that is why."""
        for life in self.beside:
            if life.connection is watch.blocked_by:
                held = life.writes[0].place if life.writes else life.taken
                return SelfBlockedError(
                    f"{self.home.describe() if self.home else 'a session'} waited at {spell(here())} for a lock that "
                    f"the transaction around it has held since {spell(held)}.\n"
                    "Waiting could never end. Join the outer transaction (`transaction()` without `new=True`), or do "
                    "this after it has ended (`on_commit`)."
                )
        return None

    def refuse_write(self) -> None:
        """Raise if a write could never be committed, or never be rolled back."""
        if self.source is not None and self.source.one_writer:
            self.refuse_second_writer()
        if self.owner is not None and self.connection is not None and _commits_at_once(self.connection):
            raise ConfigurationError(
                f"a write was sent at {spell(here())}, inside {self.owner}, on a connection with isolation level "
                "AUTOCOMMIT: it could not be rolled back.\n"
                "Use an engine without AUTOCOMMIT for transactions, or send this in a plain scope."
            )

    def note_write(self, session: Session) -> None:
        """Remember the first write of each task in each savepoint."""
        savepoint = session.get_nested_transaction()
        task = task_now()
        for known in self.writes:
            if known.savepoint is savepoint and known.task is task:
                return
        if self.connection is not None and _commits_at_once(self.connection):
            return
        write = Write(here(), savepoint, task)
        self.writes += (write,)
        self.wrote = True
        if task is not None:
            _wrote.set((*(other for other in _wrote.get() if not other.over), write))

    def savepoint_ended(self, session: Session, savepoint: "SessionTransaction") -> None:
        """A savepoint was released, and what it held is its parent's, or rolled back, and it never happened."""
        freed, self.freed = self.freed is savepoint, None
        parent = session.get_nested_transaction()
        kept = []
        for write in self.writes:
            if write.savepoint is savepoint:
                if not freed:
                    write.over = True
                    continue
                write.savepoint = parent
            kept.append(write)
        self.writes = tuple(kept)
        hooks = []
        for hook in self.hooks:
            if hook.savepoint is savepoint:
                hook.savepoint = parent
                if not freed:
                    if hook.outcome == "commit":
                        continue
                    hook.due = True
            hooks.append(hook)
        self.hooks = tuple(hooks)
        if self.doom is not None and self.doom.savepoint is savepoint and not freed:
            self.doom = None

    def root_ended(self) -> None:
        """The whole transaction is over, by whatever means; its connection is back in the pool."""
        if self._ref is not None and self.source is not None:
            self.source.holders.discard(self._ref)
            self._ref = None
        for write in self.writes:
            write.over = True
        self.writes = ()
        self.wrote = False
        if self.owner is not None and not self.acting:
            self.doom = Doom("its transaction was rolled back", here(), None)
        self.taken = self.connection = self.backend = None
        self.beside = ()
        self.read_first = False

    def take_hooks(self, *, committed: bool) -> list[Hook]:
        """The hooks that the outcome calls for; the others are dropped."""
        hooks, self.hooks = self.hooks, ()
        return [hook for hook in hooks if (hook.outcome == "commit") is committed or hook.due]

    def refuse_second_writer(self) -> None:
        """Raise if the database knows one writer at a time, and a scope around this one is it."""
        home, source = self.home, self.source
        if home is None or source is None:
            return
        for life in home.outer_lives(source):
            if life.connection is not None and (life.wrote or (life.owner is not None and life.owner.immediate)):
                held = life.writes[0].place if life.writes else life.taken
                raise SelfBlockedError(
                    f"{home.describe()} writes to {source.name} at {spell(here())}, but the transaction around it has "
                    f"held the database's one write lock since {spell(held)}.\n"
                    "Waiting could never end. Join the outer transaction (`transaction()` without `new=True`), or "
                    "write after it has ended (`on_commit`)."
                )

    def refuse_self_block(self, session: Session) -> None:
        """Raise if the pool has no connection left but those that the scopes around this one hold."""
        home, source = self.home, self.source
        if home is None or source is None or self.shared is not None:
            return
        around = home.outer_lives(source)
        if not around:
            return
        held = [life for life in around if life.connection is not None]
        if held and len(held) >= source.capacity():
            raise SelfBlockedError(
                f"{home.describe()} needs a connection of {source.name} at {spell(here())}, but the pool's "
                f"{'only one is' if len(held) == 1 else f'{len(held)} are'} held by the scopes around it, "
                f"since {spell(held[0].taken)}.\n"
                "Waiting could never end. Finish the outer transaction first, use its session, or enlarge the pool."
            )

    # -- a managed transaction ---------------------------------------------------------------------------------

    def own(self, owner: Owner) -> None:
        """Give the transaction an owner; refuse if it already has writes that nobody owns."""
        if self.writes:
            raise TransactionInProgress(
                f"{owner} found writes that nobody has committed: the first was sent at "
                f"{spell(self.writes[0].place)}.\n"
                "Commit or roll them back before the block, or move them into it."
            )
        self.owner = owner
        self.doom = None

    def fail(self, session: Session, title: str, error: BaseException) -> None:
        """A joined block failed: unless the error is seen outside, what it began must not be committed."""
        if self.doom is None:
            self.doom = Doom(f"{title} in it failed with {error!r}", here(), session.get_nested_transaction(), error)

    def disown(self) -> None:
        """The managed transaction is over: the session is its scope's again."""
        self.owner = None
        self.doom = None
        self.acting = False

    def unsaved(self, session: Session) -> Place | str | None:
        """What would be lost if the session closed now: the line of the first write, or what is pending."""
        return self.dropped if self.dropped is not None else self.uncommitted(session)

    def uncommitted(self, session: Session) -> Place | str | None:
        """What the open transaction has that is not saved: the line of the first write, or what is pending."""
        if not session.in_transaction():
            return None
        if self.writes:
            return self.writes[0].place or "an unknown line"
        # new, dirty and deleted build a set each, at every end of a scope that has only read; this looks first.
        if session._is_clean():
            return None
        names = {type(item).__name__ for items in (session.new, session.dirty, session.deleted) for item in items}
        return f"{', '.join(sorted(names))} objects that were never flushed" if names else None


def _commits_at_once(connection: Connection) -> bool:
    """Whether a connection is in AUTOCOMMIT, by an option of its own or its engine's."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)  # create_engine(isolation_level=...)
    return bool(level == "AUTOCOMMIT")


def _lifts_read_only(text: str) -> bool:
    """Whether a SET or PRAGMA touches what makes a reader's connection read-only."""
    words = text.lower()
    return any(word in words for word in ("read write", "read_only", "query_only", "characteristics", "read only"))


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
            if life.generation != generation:
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
            watch = life.watch
            if watch is not None and watch.blocked_by is not None and (own := life.blocked(watch)) is not None:
                raise own from error
            raise
        except PendingRollbackError as error:
            if life.owner is not None:
                error.add_note(
                    f"Inside {life.owner} do not roll back: let the first error out of the block, or put the part "
                    "that may fail into `transaction(nested=True)`."
                )
            raise
        except (ConnectionError, gaierror) as error:  # asyncpg's, which SQLAlchemy lets through as it is
            if life.connection is None and life.source is not None:
                error.add_note(
                    f"No connection could be made to {life.source.name}. Is the server up, and the address right?"
                )
            raise
        except Exception:
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
            if life.ended is not None and not life.acting:
                release(session)  # the scope ended meanwhile, and left the session to its user

    return method


_CLEAN_UP = frozenset({"close", "rollback", "reset", "invalidate"})


def _refuse_fork(life: Lifecycle) -> None:
    raise ScopeMisuseError(
        f"a session{f' of {life.home.describe()}' if life.home else ''} was used at {spell(here())}, "
        "in the child of a fork.\nA connection cannot be shared across a fork. Open a scope of its own in the child."
    )


def _explain(life: Lifecycle, error: DBAPIError) -> None:
    """Add to SQLite's "database is locked" what came first, where the lock could not be waited for."""
    if life.read_first and "database is locked" in str(error.orig):
        error.add_note(
            f"The transaction began by reading, at {spell(life.taken)}; SQLite cannot turn it into a writing one once "
            "another has written. Use `with db.transaction():`, which takes the write lock at its beginning."
        )


class _Unborn:
    """Stands for the life of a session that the user's own call of the session maker made, until it is asked for.

    A descriptor, and no `__getattr__` on the session: with one, every attribute that SQLAlchemy reads from it costs
    ten times as much.
    """

    def __get__(self, session: Session | None, cls: type) -> Any:
        return self if session is None else adopt(session, None, None)


class ScopedSession(Session):
    """A session that knows its life. It goes before the user's session class, so that every call comes by here."""

    _dbscope: Lifecycle = cast("Lifecycle", _Unborn())

    def begin(self, nested: bool = False) -> "SessionTransaction":
        """Begin as `Session.begin`; refused in a managed transaction, which is begun and ended by its owner."""
        if not nested:
            self._dbscope.refuse_stranger("session.begin()")
        return super().begin(nested)

    def commit(self) -> None:
        """Commit as `Session.commit`; refused in a managed transaction, and while another task's writes are open."""
        life = self._dbscope
        if life.ended is not None and not life.acting and not self.in_transaction():
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
        if life.acting or life.ended is not None:
            super().close()
        elif life.owner is not None:
            life.close_waits = True
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
            if failing is None and life.dropped is None and self.in_transaction():
                place = life.unsaved(self)
                life.dropped = place if isinstance(place, tuple) else here() if place else None
            super().close()

    def reset(self) -> None:
        """Reset as `Session.reset`; refused in a managed transaction."""
        self._dbscope.refuse_stranger("session.reset()")
        self._dbscope.refuse_sibling("session.reset()")
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


class OwnedConnection(Connection):
    """A connection that a session took: `session.connection().commit()` is no way around the owner.

    Every commit passes `_commit_impl`, that of the connection's transaction object included. An event would see it too,
    but one listener of that kind costs every statement of the engine a quarter of its time.
    """

    _dbscope: ScopedSession

    def commit(self) -> None:
        """Commit as `Connection.commit`; refused in a managed transaction."""
        self._dbscope._dbscope.refuse_stranger("session.connection().commit()")
        super().commit()

    def _commit_impl(self) -> None:
        life = self._dbscope._dbscope
        life.refuse_stranger("a commit of the session's connection")
        try:
            super()._commit_impl()
        except Exception:
            # SQLite keeps a transaction open whose COMMIT it refused, and SQLAlchemy takes it for ended: the connection
            # would go back into the pool with the file's write lock.
            with contextlib.suppress(Exception):
                self._rollback_impl()
            raise
        for write in life.writes:
            write.over = True
        life.writes = ()

    def rollback(self) -> None:
        """Roll back as `Connection.rollback`; refused in a managed transaction, which cannot be committed then."""
        life = self._dbscope._dbscope
        try:
            life.refuse_stranger("session.connection().rollback()")
        except DBScopeError:
            if life.doom is None:
                life.doom = Doom("a rollback of its connection was asked for", here(), None)
            raise
        super().rollback()


# Each of these may talk to the database, and none may do so while another thread or task does.
_USES = (
    *("execute", "scalar", "scalars", "connection", "flush", "commit", "rollback", "close", "reset", "invalidate"),
    *("begin_nested", "prepare", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
)


def derive(session_class: type[S]) -> type[S]:
    """A private subclass of the user's session class, with the rules of this page put before it."""
    name = session_class.__name__
    guarded = type(name, (ScopedSession, session_class), {"__module__": session_class.__module__})
    for use in _USES:
        setattr(guarded, use, exclusive(getattr(guarded, use), use))
    return cast("type[S]", guarded)


def adopt(session: Session, home: Home | None, source: Source | None) -> Lifecycle:
    """Begin the life of a session that was just made."""
    life = session._dbscope = Lifecycle(home, source)  # type: ignore[attr-defined]  # it is a ScopedSession
    return life


def life_of(session: Any) -> Lifecycle:
    """The life of a session, or of the one inside an `AsyncSession`."""
    try:
        return session._dbscope  # type: ignore[no-any-return]  # a Lifecycle
    except AttributeError:  # an AsyncSession that its user's own maker made
        return session.sync_session._dbscope  # type: ignore[no-any-return]


def end_life(session: Any, end: End) -> None:
    """Nobody may use the session from here on; what it holds is given back by `release`."""
    life = life_of(session)
    if life.ended is None:
        life.ended = end


def release(session: Session) -> None:
    """Give back what an ended session holds: roll back what is open, return the connection, let its objects go.

    Does nothing while another thread or task is executing on the session: that one does it when it is through.

    Raises:
        Exception: what closing raised, after the connection was thrown away instead.
    """
    life = life_of(session)
    mine = life.turn.acquire(False)
    if not mine and life.user != worker():
        return
    if mine:
        life.user = thread_id() if running_loop() is None else worker()
    try:
        if life.released or life.generation != generation:  # closing would speak on a fork's parent's connection
            return
        life.released = True
        life.acting = True
        if life.broken:
            session.invalidate()
        elif session.in_transaction() or session.identity_map:
            if life.owner is not None and life.owner.reader:
                session.expunge_all()  # before the rollback, which would expire what was read
            try:
                # The turn is ours already: what `derive` put before this would only ask for it again.
                super(ScopedSession, cast("ScopedSession", session)).close()
            except BaseException:
                session.invalidate()  # never return a connection in an unknown state
                raise
    finally:
        if life.connection is not None:
            life.root_ended()  # where closing fails SQLAlchemy does not say so
        life.acting = False
        life.owner = None
        if mine:
            life.turn.release()


# -- what SQLAlchemy tells ---------------------------------------------------------------------------------------


def on_transaction_create(session: ScopedSession, transaction: "SessionTransaction") -> None:
    """New work begins, by SQL or by `add()`: refuse it where no work may begin."""
    life = session._dbscope
    if transaction.parent is not None:
        return
    life.used = True  # before looking whether it has ended: the end looks in the other order
    if life.acting:
        return
    home = life.home
    if life.ended is not None or life.doom or life.undone or (home is not None and home.is_inside):
        try:
            life.refuse_ended()
            life.refuse_doomed()
            life.refuse_self_block(session)
        except DBScopeError:
            transaction.close()  # or SQLAlchemy keeps it, and the next try would pass
            raise


def on_begin(session: ScopedSession, transaction: "SessionTransaction", connection: "Connection") -> None:
    """A connection was taken; SQLAlchemy says so for each savepoint too."""
    if transaction.parent is None:
        session._dbscope.began(session, connection)


def before_commit(session: ScopedSession) -> None:
    """The deepest place that every commit passes, `SessionTransaction.commit()` included."""
    life = session._dbscope
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        life.refuse_stranger("commit()")
        life.refuse_sibling("commit()")
    elif life.doom is not None and life.doom.savepoint is savepoint:
        life.refuse_doomed()


def after_commit(session: ScopedSession) -> None:
    """A COMMIT, or the release of a savepoint, succeeded."""
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        session._dbscope.committed = True
    else:
        session._dbscope.freed = savepoint


def on_transaction_end(session: ScopedSession, transaction: "SessionTransaction") -> None:
    """A transaction or a savepoint is over: `close()` fires this alone, neither commit nor rollback events."""
    life = session._dbscope
    if transaction.parent is None:
        committed, life.committed = life.committed, False
        if life.writes and not committed and life.owner is None:
            life.undone_by_sibling()
        life.root_ended()
        if life.hooks and life.owner is None and not life.acting:
            cast("Source", life.source).run_hooks(life.take_hooks(committed=committed))
    elif transaction.nested and (life.writes or life.hooks or life.doom is not None):
        life.savepoint_ended(session, transaction)
