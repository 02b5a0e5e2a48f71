"""The life of one session in its scope: who may end its transaction, what it wrote, how it is given back.

Every rule that protects data is here, written once against the sync `Session`; an `AsyncSession` has one inside.
The state is a `Lifecycle` beside the session, so that users keep plain SQLAlchemy objects.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import ref

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from dbscope.closings import Expiry
from dbscope.errors import (
    ConfigurationError,
    DBScopeError,
    GuardError,
    NotTheOwnerError,
    OverlapError,
    ReadOnlyError,
    RollbackOnlyError,
    ScopeEndedError,
    ScopeMisuseError,
    SelfBlockedError,
    TransactionInProgress,
)
from dbscope.events import SessionDropped, emit
from dbscope.hooks import Hook
from dbscope.lockwatch import LockWatch, backend_of
from dbscope.settings import Settings
from dbscope.statements import Kind
from dbscope.terms import Resolution
from dbscope.where import (
    UNKNOWN,
    Place,
    Worker,
    ago,
    here,
    name_of,
    place_of,
    spell,
    task_now,
    worker,
)

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractContextManager

    from sqlalchemy.orm import SessionTransaction

__all__ = [
    "Doom",
    "End",
    "Lifecycle",
    "Mark",
    "Owner",
    "State",
    "Write",
    "commits_at_once",
    "end_life",
    "life_of",
    "taken_by",
    "wake",
]

_monotonic = time.monotonic
_Lock = threading.Lock
State = Literal["active", "idle in transaction", "idle"]


class Home(Protocol):
    """What a lifecycle asks of the scope that its session lives in."""

    @property
    def tag(self) -> tuple[str | None, Place | None]:
        """Its name, as far as it is known without further ado, and where it was opened."""

    _outer: Any  # the scope around this one

    @property
    def ending(self) -> str:
        """What its end came with, as errors say it after "it ended"."""

    def describe(self) -> str:
        """The scope as errors name it."""

    def outer_lives(self, source: Any) -> "Sequence[Lifecycle]":
        """The lives, in the scopes around this one, of sessions of `source` that cannot go on before this work ends."""


class Source(Protocol):
    """What a lifecycle asks of its database."""

    name: str
    one_writer: bool
    knows_waits: bool
    outcome: Resolution
    holders: set["Mark"]

    def capacity(self) -> float:
        """How many connections the pool gives out at most."""

    def run_hooks(self, hooks: "Sequence[Hook]") -> None:
        """Run the hooks of a transaction that its user ended, each in a scope of its own."""


class Shared(Protocol):
    """One connection for the sessions of several scopes, under a transaction that is never committed: a test's."""

    def using(self, session: Any, use: str) -> "AbstractContextManager[None]":
        """Around each call of a session that may talk to the database."""

    def statement(self, session: Session, kind: Kind, text: str) -> None:
        """A session is about to execute a statement other than a plain read."""


class Owner:
    """Who began a managed transaction, and so alone may end it: a block, or an on-success scope."""

    __slots__ = (
        *("apart", "autocommit", "committed", "immediate", "outcome", "place", "read_only", "reader", "rollback_only"),
        *("settings", "title", "worker"),
    )

    def __init__(
        self,
        title: str,
        place: Place | None,
        *,
        immediate: bool = False,
        reader: bool = False,
        outcome: Resolution | None = None,
        autocommit: bool = False,
        settings: Settings | None = None,
    ) -> None:
        self.worker = worker()  # whose block it is: it ends no sooner than what the same one enters in it
        self.title = title
        self.place = place
        self.immediate = immediate
        self.reader = reader
        self.autocommit = autocommit  # a reader that begins nothing
        self.apart = False  # its connection is of a pool of its own
        self.settings = settings
        self.read_only = reader or (settings is not None and settings.read_only is True)
        self.rollback_only = False  # asked for by the block itself: it rolls back when it ends, without an error
        self.outcome = outcome  # None: as the database says
        self.committed = False  # whatever fails from here on, the work is saved

    def __str__(self) -> str:
        if self.place is None:  # a middleware's: the title names the request, and no line of the user's began it
            return self.title
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


ROLLED_BACK = "it was rolled back"  # by a failed flush, or by somebody who may have meant it


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

    __slots__ = ("_how", "at", "pid", "place", "whose")

    def __init__(
        self, whose: Home | str, place: Place | None = None, *, how: str | None = None, pid: int | None = None
    ) -> None:
        self.whose = whose  # described when an error asks: that costs more than all else that ends a scope
        self.place = place
        self._how = how
        self.pid = pid
        self.at = _monotonic()

    @property
    def title(self) -> str:
        """Whose end it was, as errors name it."""
        return self.whose if isinstance(self.whose, str) else self.whose.describe()

    @property
    def how(self) -> str:
        """How it ended, as errors say it: with its scope, if nothing else was said."""
        if self._how is not None:
            return self._how
        return "it ended" if isinstance(self.whose, str) else f"it ended{self.whose.ending}"


# The writes whose tasks started the running one (or are it): they may be ended from here.
_wrote: ContextVar[tuple[Write, ...]] = ContextVar("dbscope.wrote", default=())

# Called, and taken out, when a session takes a connection: who watches sleeps while none is held.
sleepers: list[Callable[[], None]] = []

# Bumped in the child of a fork: a session of the parent is then refused.
generation = 0


class Mark(ref["Lifecycle"]):
    """A life whose session has a connection; and what is to be said if the session is dropped with it."""

    __slots__ = ("home", "source", "taken")

    source: "Source"
    taken: Place
    home: tuple[str | None, Place | None] | None  # the scope itself would keep its session


_session_dropped = SessionDropped.observers


def _dropped(mark: Any) -> None:
    """The garbage collector has found a session with a transaction open."""
    source = mark.source
    source.holders.discard(mark)
    if _session_dropped and not sys.is_finalizing():
        name, opened = mark.home or (None, None)
        emit(SessionDropped(database=source, name=name, opened=opened, taken=mark.taken))


class Lifecycle:
    """What dbscope knows of one session.

    Slots, all set at once: every statement reads a dozen of them, and a default on the class, or a dictionary, takes
    ten times as long to read.
    """

    __slots__ = (
        *("__weakref__", "_ref", "acting", "asking", "backend", "beside", "blocks", "broken", "close_waits"),
        *("committed", "connection", "doom", "dropped", "ended", "freed", "generation", "home", "hooks", "others"),
        *("owner", "read_first", "released", "shared", "since", "source", "taken", "turn", "undone", "used", "user"),
        *("again", "expiry", "failed", "sent", "statements", "watch", "writes", "wrote"),
    )

    def __init__(self, home: Home | None, source: Source | None) -> None:
        self.turn = _Lock()  # held while one thread or task uses the session
        self.generation = generation
        self.home = home
        self.source = source
        self.owner: Owner | None = None  # whose managed transaction this is; None: the user's own
        self.blocks: tuple[Any, ...] = ()  # those that work on it, the innermost last
        self.acting = False  # the owner, or the scope, is ending the transaction now
        self.ended: End | None = None
        self.used = False  # a transaction was begun on it, by SQL or by add(): before that it holds nothing at all
        self.released = False
        self.doom: Doom | None = None
        self.writes: tuple[Write, ...] = ()
        self.wrote = False  # be it undone to a savepoint: SQLite keeps the lock until the transaction ends
        self.hooks: tuple[Hook, ...] = ()
        self.dropped: Place | None = None  # the first write of a transaction that was closed without a commit
        self.undone: DBScopeError | None = None  # what the next use raises, as where a sibling threw this away
        self.committed = False  # SQLAlchemy said so of the transaction that is ending
        self.freed: SessionTransaction | None = None  # the savepoint that SQLAlchemy is releasing
        self.close_waits: Place | bool = False  # where close() was called, to be done when the block ends
        self.broken = False  # a BaseException cut through a flush or a commit
        self.read_first = False  # on SQLite: the transaction began with a read, and a write has to upgrade it
        self.taken: Place | None = None  # the line that took the connection, while there is one
        self.since = 0.0  # when it did, on the monotonic clock
        self.asking: FrameType | None = None  # the call of the session's that may take a connection, while it runs
        self.user: Worker | None = None  # who used the session last, or is using it
        self.connection: Connection | None = None  # while a transaction is open on it
        self.others: tuple[Connection, ...] = ()  # those that it took before
        self.beside: tuple[Lifecycle, ...] = ()  # open transactions of the same work: never wait for their locks
        self.backend: int | None = None  # the server's process, where it was asked for
        self.watch: LockWatch | None = None  # over the statement that is running
        self.sent: str | None = None  # the last statement of the open transaction
        self.expiry: Expiry | None = None  # what has expired its objects last
        self.failed: Any = None  # what the open transaction failed with, so that it can only be rolled back
        self.statements = 0  # how many it has sent: who looks now and then sees whether there were new ones
        self.again = False  # it has committed a transaction before
        self.shared: Shared | None = None  # whose connection this session and others work on, in a test's sandbox
        self._ref: Mark | None = None

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
            f"{' To undo all of it without an error, say `db.set_rollback_only()`.' if doom.why is ROLLED_BACK else ''}"
        )
        error.__cause__ = doom.cause
        return error

    def the_commit(self) -> str:
        """The commit that is under way, as errors name it: an owner's may end in a task where no line is the user's."""
        return f"the commit at {spell(here())}" if self.owner is None else f"the commit of {self.owner}"

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
            f"Its owner commits when its {'work' if owner.place is None else 'block'} ends without an error.\n"
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

    def began(self, connection: Connection) -> None:
        """The session took a connection and began on it."""
        if self.connection is not None:  # its tables are of several databases
            self.others += (self.connection,)
        self.connection = connection
        asking = self.asking
        self.taken = taken = (here() if asking is None else place_of(asking.f_back)) or UNKNOWN
        self.since = _monotonic()
        source, home = self.source, self.home
        if source is not None:
            self._ref = mark = Mark(self, _dropped)
            mark.source = source
            mark.taken = taken
            if home is None:
                mark.home = None
            else:
                mark.home = home.tag
                if home._outer is not None and source.knows_waits and self.shared is None:
                    self.beside = tuple(life for life in home.outer_lives(source) if life.connection is not None)
            source.holders.add(mark)
            if sleepers:
                wake()

    def statement(self, session: Session, kind: Kind, text: str, *, alone: bool = False) -> None:
        """A statement other than a plain read is about to be executed, or the transaction is doomed.

        `alone`: it takes part in no transaction, as SQLite's VACUUM.
        """
        if self.shared is not None:
            self.shared.statement(session, kind, text)
        if self.acting:
            if kind is Kind.WRITE:  # the flush of a commit
                self.refuse_reader(kind, text)
                self.refuse_write()
            return
        if kind is not Kind.SAVEPOINT:  # going back to one is what mends a doomed transaction
            self.refuse_doomed()
        owner = self.owner
        if owner is not None:
            if kind is Kind.CONTROL:
                self.refuse_stranger(f"{' '.join(text.split())[:40]!r}")
            self.refuse_reader(kind, text)
        if kind is Kind.WRITE and not alone:
            self.refuse_write()
            self.note_write(session)

    def refuse_reader(self, kind: Kind, text: str) -> None:
        """Raise if the transaction only reads, and a statement does more."""
        owner = self.owner
        if owner is None or not owner.read_only:
            return
        if kind is Kind.WRITE or (kind is Kind.SETTING and _lifts_read_only(text)):
            raise ReadOnlyError(
                f"a write was sent at {spell(here())}, inside {owner}: {' '.join(text.split())[:60]!r}.\n"
                "Use `transaction()` for work that writes."
            )
        if kind is Kind.SETTING and owner.autocommit:
            raise ReadOnlyError(
                f"{' '.join(text.split())[:60]!r} was sent at {spell(here())}, inside {owner}, which has no "
                "transaction at whose end it would be undone: the next user of the connection would find it.\n"
                "Use `reader()`."
            )

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
        if self.owner is not None and self.connection is not None and commits_at_once(self.connection):
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
        if self.connection is not None and commits_at_once(self.connection):
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
                    if hook.outcome != "rollback":
                        continue
                    hook.due = True
            hooks.append(hook)
        self.hooks = tuple(hooks)
        if self.doom is not None and self.doom.savepoint is savepoint and not freed:
            self.doom = None

    def root_ended(self) -> None:
        """The whole transaction is over, by whatever means; its connection is back in the pool."""
        mark = self._ref
        if mark is not None:
            mark.source.holders.discard(mark)
            self._ref = None
        self.taken = self.connection = None
        if self.writes:
            for write in self.writes:
                write.over = True
            self.writes = ()
        if self.released:
            return  # what follows is for the next transaction, and there will be none
        self.wrote = False
        if self.undone is not None and isinstance(self.undone, GuardError):
            self.undone = None  # it was about this transaction, and the next one is innocent
        if self.owner is not None and not self.acting:
            self.doom = Doom(ROLLED_BACK, here(), None)
        self.backend = self.sent = self.failed = None
        self.beside = self.others = ()
        self.read_first = False

    def take_hooks(self, *, committed: bool) -> list[Hook]:
        """The hooks that the outcome calls for; the others are dropped."""
        hooks, self.hooks = self.hooks, ()
        outcome = "commit" if committed else "rollback"
        return [hook for hook in hooks if hook.outcome == outcome or hook.due]

    def forget_hooks(self) -> bool:
        """Nobody knows whether the transaction was committed: drop the hooks that depend on it.

        Returns:
            whether there were any. Those of a savepoint that was rolled back before stay.
        """
        kept = tuple(hook for hook in self.hooks if hook.due)
        dropped = len(kept) < len(self.hooks)
        self.hooks = kept
        return dropped

    @property
    def resolves(self) -> bool:
        """Whether the server is to be asked what became of a COMMIT whose answer is lost."""
        asked = None if self.owner is None else self.owner.outcome
        if asked is None and self.source is not None:
            asked = self.source.outcome
        return asked == "resolve"

    def refuse_second_writer(self) -> None:
        """Raise if the database knows one writer at a time, and a scope around this one is it."""
        home, source = self.home, self.source
        if home is None or source is None:
            return
        for life in home.outer_lives(source):
            if life.holds_write_lock:
                held = life.writes[0].place if life.writes else life.taken
                raise SelfBlockedError(
                    f"{home.describe()} writes to {source.name} at {spell(here())}, but the transaction around it has "
                    f"held the database's one write lock since {spell(held)}.\n"
                    "Waiting could never end. Join the outer transaction (`transaction()` without `new=True`), or "
                    "write after it has ended (`on_commit`)."
                )

    @property
    def holds_write_lock(self) -> bool:
        """Whether it has the lock of a database that knows one writer at a time, or is about to take it."""
        return self.connection is not None and (self.wrote or (self.owner is not None and self.owner.immediate))

    @property
    def whose(self) -> str:
        """Whose session it is, as errors name it."""
        return "a session outside of every scope" if self.home is None else self.home.describe()

    @property
    def state(self) -> State:
        """What it does now with the connection that it holds."""
        if self.turn.locked():
            return "active"
        return "idle" if self.owner is not None and self.owner.autocommit else "idle in transaction"

    @property
    def is_apart(self) -> bool:
        """Whether its connections are of another pool than its database's other sessions'."""
        return self.owner is not None and self.owner.apart

    def refuse_self_block(self, session: Session) -> None:
        """Raise if the pool has no connection left but those that the scopes around this one hold."""
        home, source = self.home, self.source
        if home is None or source is None or self.shared is not None:
            return
        around = home.outer_lives(source)
        if not around:
            return
        held = [life for life in around if life.connection is not None and life.is_apart is self.is_apart]
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

    def fail(self, session: Session, title: str, error: BaseException) -> None:
        """A joined block failed: unless the error is seen outside, what it began must not be committed."""
        self.doomed(f"{title} in it failed with {error!r}", session, error)

    def doomed(self, why: str, session: Session, cause: BaseException | None = None) -> None:
        """The transaction can only roll back, unless the savepoint that is open is rolled back before its end."""
        if self.doom is None:
            self.doom = Doom(why, here(), session.get_nested_transaction(), cause)

    def disown(self) -> None:
        """The managed transaction is over: the session is its scope's again."""
        self.owner = None
        self.doom = None

    def unsaved(self, session: Session) -> Place | str | None:
        """What would be lost if the session closed now: the line of the first write, or what is pending."""
        return self.dropped if self.dropped is not None else self.uncommitted(session)

    def uncommitted(self, session: Session) -> Place | str | None:
        """What the open transaction has that is not saved: the line of the first write, or what is pending."""
        if self.writes:
            return self.writes[0].place or "an unknown line"
        # new, dirty and deleted build a set each, at every end of a scope that has only read; this looks first.
        if session._is_clean():
            return None
        names = {type(item).__name__ for items in (session.new, session.dirty, session.deleted) for item in items}
        return f"{', '.join(sorted(names))} objects that were never flushed"


def wake() -> None:
    """A connection was taken: whoever watches has something to look at."""
    for _ in range(len(sleepers)):  # and not until there is none: who could not begin waits for the next connection
        with contextlib.suppress(IndexError):  # another thread was faster
            sleepers.pop(0)()


def taken_by(connection: Any) -> Any | None:
    """What a connection has of its pool; None where that is lost, or given back: `Connection.connection` takes another.

    For who looks from another thread.
    """
    return getattr(connection, "_dbapi_connection", None)


def commits_at_once(connection: Connection) -> bool:
    """Whether a connection is in AUTOCOMMIT, by an option of its own or its engine's."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)  # create_engine(isolation_level=...)
    return bool(level == "AUTOCOMMIT")


def _lifts_read_only(text: str) -> bool:
    """Whether a SET or PRAGMA touches what makes a reader's connection read-only."""
    words = " ".join(text.lower().split())
    return any(word in words for word in ("read write", "read_only", "query_only"))


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
