"""What dbscope promises about nested work, as plain dictionaries: the model of tests/test_state_machine.py.

Nothing of dbscope or SQLAlchemy is used here but the classes of the errors that a step may be answered with.
Each method does one step to the model, and returns the errors that dbscope must raise for it (an empty tuple: none).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy.exc import InvalidRequestError

from dbscope import (
    NoTransactionError,
    NotTheOwnerError,
    ReadOnlyError,
    RollbackOnlyError,
    SelfBlockedError,
    TransactionInProgress,
    UncommittedWrites,
)

Rows = dict[int, int]
Changes = dict[int, int | None]  # None: deleted
Errors = tuple[type[BaseException], ...]
Outcome = Literal["before", "commit", "rollback"]
Owner = Literal["block", "on-success", "reader"] | None
Kind = Literal[
    "scope", "on-success", "adopted", "new", "joined", "nested", "reader", "joined reader", "plain", "savepoint"
]

FINE: Errors = ()


@dataclass(eq=False)
class Hook:
    """A hook that waits; `level` counts the savepoints around it."""

    number: int
    outcome: Outcome
    level: int
    due: bool = False


@dataclass(eq=False)
class Level:
    """What a transaction, or a savepoint in it, has changed."""

    changes: Changes = field(default_factory=dict)
    wrote: bool = False


@dataclass(eq=False)
class Work:
    """The one session of a scope: its transaction, and who owns it."""

    owner: Owner = None
    begun: bool = False  # by SQL, or by add()
    connected: bool = False
    snapshot: Rows | None = None  # SQLite: what is committed, as of the first statement
    version: int = 0  # and how many commits had been made then
    locked: bool = False  # SQLite: has the one write lock
    levels: list[Level] = field(default_factory=lambda: [Level()])
    pending: Changes = field(default_factory=dict)  # in the session, and not flushed
    hooks: list[Hook] = field(default_factory=list)
    doom: int | None = None  # the level whose rollback mends it; 0: none does
    quiet: bool = False  # its owner asked for a rollback, and gets it without an error
    stuck: bool = False  # a flush failed; SQLAlchemy wants a rollback first
    meets: Errors = ()  # what its commit meets, after the hooks before it
    closed_over: bool = False  # the user closed the session over writes
    user: object = None  # which thread or task used it last

    @property
    def uncommitted(self) -> bool:
        return self.begun and (bool(self.pending) or any(level.wrote for level in self.levels))

    @property
    def writes_alone(self) -> bool:
        """SQLite: whether others have to wait for this one."""
        return self.connected and (self.locked or self.owner in ("block", "on-success"))

    def touched(self) -> set[int]:
        return {key for level in self.levels for key in level.changes} | set(self.pending)

    def ended(self) -> None:
        """The transaction is over, and the connection back."""
        self.begun = self.connected = self.locked = self.stuck = False
        self.snapshot = None
        self.levels = [Level()]
        self.pending = {}
        for hook in self.hooks:
            hook.level = 0


@dataclass(eq=False)
class Frame:
    """One open block."""

    kind: Kind
    work: Work
    level: int = 0  # of a savepoint
    closed: bool = False  # a savepoint that went with its transaction
    quiet: bool = False  # a savepoint that asked for its rollback


class Model:
    """The committed rows, the open blocks, and the hooks that have run.

    Args:
        one_writer: the rules of SQLite: one writer at a time, and a snapshot for each transaction.
    """

    def __init__(self, rows: Rows, *, one_writer: bool) -> None:
        self.one_writer = one_writer
        self.committed = dict(rows)
        self.commits = 0
        self.stack: list[Frame] = []
        self.fired: list[tuple[int, int]] = []  # each hook, and how many connections were out when it ran
        self._hooks = 0

    # -- what can be asked ---------------------------------------------------------------------------------------

    @property
    def top(self) -> Frame:
        return self.stack[-1]

    @property
    def work(self) -> Work:
        return self.stack[-1].work

    def works(self) -> list[Work]:
        """Those of the open scopes, the outermost first."""
        return list({id(frame.work): frame.work for frame in self.stack}.values())

    def checked_out(self) -> int:
        return sum(work.connected for work in self.works())

    def view(self) -> Rows:
        """What a SELECT in the innermost block finds."""
        work = self.work
        base = self.committed if work.snapshot is None else work.snapshot
        found: Changes = dict(base)
        for level in work.levels:
            found.update(level.changes)
        return {key: value for key, value in found.items() if value is not None}

    def free(self, key: int) -> bool:
        """Whether no other open transaction has changed the row: on a server one would wait for it."""
        return all(work is self.work or key not in work.touched() for work in self.works())

    def can_write(self, user: object) -> bool:
        """False where a write would fail by the database's own rules, and dbscope can't say so beforehand."""
        if not self.one_writer:
            return True
        work, others = self.work, [work for work in self.works() if work is not self.work]
        if work.owner is None and not work.locked and work.snapshot is not None and work.version != self.commits:
            return False  # a read transaction whose snapshot is old cannot become a writing one
        if any(other.pending and not other.locked and other.snapshot is not None for other in others):
            return False  # committing here would do that to what is pending there
        # Work that was handed over may not be what a transaction around it waits for: it would wait for that one.
        me = {user} if work.owner is None else {user, "main"}
        return all(
            other.user in me or (other.owner is not None and "main" in me) for other in others if other.writes_alone
        )

    def blocked(self, work: Work) -> bool:
        works = self.works()
        return self.one_writer and any(other.writes_alone for other in works[: works.index(work)])

    # -- SQL -----------------------------------------------------------------------------------------------------

    def _sql(self, work: Work, user: object, *, write: bool) -> Errors:
        if work.stuck:
            return (InvalidRequestError, RollbackOnlyError)
        if not work.begun and work.doom is not None:
            return (RollbackOnlyError,)
        work.begun = work.connected = True
        work.user = user
        immediate = work.owner in ("block", "on-success")
        waits = (write or (immediate and not work.locked)) and self.blocked(work)
        if work.doom is not None:  # where the savepoint is still to be set, that is refused first
            return (RollbackOnlyError, SelfBlockedError) if waits and len(work.levels) > 1 else (RollbackOnlyError,)
        if write and work.owner == "reader":
            return (ReadOnlyError,)
        if waits:
            return (SelfBlockedError,)
        if self.one_writer:
            work.locked = work.locked or write or immediate
            if work.snapshot is None:
                work.snapshot, work.version = dict(self.committed), self.commits
        if write:
            work.levels[-1].wrote = True
        return FINE

    def flush(self, user: object) -> Errors:
        self.work.user = user
        return self._flush(self.work, user)

    def _flush(self, work: Work, user: object) -> Errors:
        if not work.pending:
            return FINE
        errors = self._sql(work, user, write=True)
        if errors:
            work.stuck = True
            work.pending = {}
            work.levels[-1].changes = {}
        else:
            work.levels[-1].changes.update(work.pending)
            work.pending = {}
        return errors

    def read(self, user: object) -> Errors:
        self.work.user = user
        return self._flush(self.work, user) or self._sql(self.work, user, write=False)

    def write(self, key: int, value: int | None, user: object, *, by_flush: bool) -> Errors:
        self.work.user = user
        errors = self._flush(self.work, user)
        if errors:
            return errors
        if by_flush:
            work = self.work
            if not work.stuck and not work.begun and work.doom is not None:
                return (RollbackOnlyError,)
            work.begun = True
            work.pending[key] = value
            return self._flush(work, user)
        errors = self._sql(self.work, user, write=True)
        if not errors:
            self.work.levels[-1].changes[key] = value
        return errors

    def add(self, key: int, value: int) -> Errors:
        """Give the session a new object, without a flush."""
        work = self.work
        if not work.begun and work.doom is not None:
            return (RollbackOnlyError,)
        work.begun = True
        work.pending[key] = value
        return FINE

    def failed_write(self, user: object, *, by_flush: bool) -> Errors:
        """The database refused a statement."""
        errors = self.write(-1, 0, user, by_flush=by_flush)
        if not errors:
            self.work.levels[-1].changes.pop(-1)
            self.work.stuck = by_flush
        return errors

    # -- the session's own ways to end ---------------------------------------------------------------------------

    def commit(self, user: object) -> Errors:
        work = self.work
        work.user = user
        if work.owner is not None:
            return (ReadOnlyError,) if work.owner == "reader" else (NotTheOwnerError,)
        errors = self._flush(work, user)
        if not errors:
            self._save(work)
            self._close_savepoints(work)
            self._fire(work, "commit")
        return errors

    def rollback(self, user: object) -> Errors:
        work = self.work
        work.user = user
        if not work.begun:
            return FINE
        self._undo(work)
        if work.owner is None:
            self._fire(work, "rollback")
        else:
            work.doom = 0
        return FINE

    def close(self, user: object) -> Errors:
        work = self.work
        work.user = user
        if work.owner is not None or not work.begun:
            return FINE
        work.closed_over = work.closed_over or work.uncommitted
        self._undo(work)
        self._fire(work, "rollback")
        return FINE

    # -- hooks ---------------------------------------------------------------------------------------------------

    def hook(self, outcome: Outcome) -> int:
        """Register a hook; returns its number."""
        self._hooks += 1
        works = self.works()
        while works and works[-1].owner == "reader":
            works.pop()
        if outcome == "before" and not self._owned():
            return self._hooks
        if works and (works[-1].owner is not None or works[-1].uncommitted):
            work = works[-1]
            work.hooks.append(Hook(self._hooks, outcome, len(work.levels) - 1))
        elif outcome == "commit":
            self.fired.append((self._hooks, self.checked_out()))
        return self._hooks

    def _fire(self, work: Work, outcome: Outcome) -> None:
        hooks, work.hooks = work.hooks, []
        out = self.checked_out()
        self.fired += [(hook.number, out) for hook in hooks if hook.outcome == outcome or hook.due]

    def _owned(self) -> bool:
        return bool(self.stack) and self.work.owner in ("block", "on-success")

    # -- from inside ---------------------------------------------------------------------------------------------

    def set_rollback_only(self) -> Errors:
        if not self._owned():
            return (NoTransactionError,)
        work = self.work
        mine = ("adopted", "new", "joined", "nested")
        inside = [frame for frame in self.stack if frame.work is work and frame.kind in mine]
        if not inside or inside[-1].kind in ("adopted", "new"):
            work.quiet = True
        elif inside[-1].kind == "nested":
            inside[-1].quiet = True
        elif work.doom is None:
            work.doom = len(work.levels) - 1
        return FINE

    def make_doom(self) -> Errors:
        if not self._owned():
            return (NoTransactionError,)
        self.work.doom = 0
        return FINE

    # -- blocks --------------------------------------------------------------------------------------------------

    def enter_scope(self, *, on_success: bool) -> Errors:
        self.stack.append(
            Frame("on-success", Work("on-success")) if on_success else Frame("scope", Work()),
        )
        return FINE

    def enter_transaction(self, user: object, *, nested: bool = False, new: bool = False) -> Errors:
        if new or not self.stack:
            self.stack.append(Frame("new", Work("block")))
            return FINE
        work = self.work
        if work.owner is None:
            return self._adopt(work, user)
        if work.owner == "reader":
            return (ReadOnlyError,)
        if work.doom is not None:
            return (RollbackOnlyError,)
        return self._savepoint("nested", user) if nested else self._push("joined", work)

    def enter_kind(self, kind: str, user: object) -> Errors:
        """`mandatory`, `never` and `durable`, inside of something."""
        if not self._owned() and self.work.owner != "reader":
            return (NoTransactionError,) if kind == "mandatory" else self._push("plain", self.work)
        return self.enter_transaction(user) if kind == "mandatory" else (TransactionInProgress,)

    def _push(self, kind: Kind, work: Work) -> Errors:
        self.stack.append(Frame(kind, work))
        return FINE

    def _adopt(self, work: Work, user: object) -> Errors:
        if len(work.levels) > 1 or any(level.wrote for level in work.levels):
            return (TransactionInProgress,)
        if self.one_writer and work.connected:
            if self.blocked(work):
                return (SelfBlockedError,)
            work.snapshot, work.version, work.locked = dict(self.committed), self.commits, True
            work.user = user
        work.owner = "block"
        return self._push("adopted", work)

    def make_way(self, user: object) -> Errors:
        """Before work that is repeated after conflicts: it has to be the outermost, and keeps no one's connection."""
        if not self.stack:
            return FINE
        work = self.work
        if any(other.owner is not None for other in self.works()) or len(work.levels) > 1 or work.uncommitted:
            return (TransactionInProgress,)
        return self.commit(user) if work.begun else FINE

    def enter_reader(self) -> Errors:
        if self.stack and self.work.owner == "reader":
            return self._push("joined reader", self.work)
        return self._push("reader", Work("reader"))

    def enter_savepoint(self, user: object) -> Errors:
        """The user's own `session.begin_nested()`."""
        return self._savepoint("savepoint", user)

    def _savepoint(self, kind: Kind, user: object) -> Errors:
        work = self.work
        if work.stuck:
            return (InvalidRequestError,)
        errors = self._flush(work, user)
        if errors:
            return errors
        work.begun = True
        work.user = user
        work.levels.append(Level())
        self.stack.append(Frame(kind, work, len(work.levels) - 1))
        return FINE

    def leave(self, user: object, *, failing: bool) -> Errors:
        """Leave the innermost block; `failing`: with an error, which comes out as it is."""
        frame = self.stack.pop()
        work = frame.work
        if frame.kind in ("joined", "joined reader", "plain"):
            if failing and frame.kind == "joined" and work.doom is None:
                work.doom = len(work.levels) - 1
            return FINE
        if frame.kind in ("nested", "savepoint"):
            return self._leave_savepoint(frame, user, failing=failing)
        errors: Errors = FINE
        if frame.kind in ("scope", "reader"):
            if not failing and frame.kind == "scope" and (work.uncommitted or work.closed_over):
                errors = (UncommittedWrites,)
            committed = False
        else:
            errors = FINE if failing or work.quiet else self._commit_owned(frame, user)
            committed = not failing and not errors and not work.quiet
        if not committed:
            self._undo(work)
        if frame.kind == "adopted":
            work.owner = work.doom = None
            work.quiet = False
        self._fire(work, "commit" if committed else "rollback")
        return errors

    def _commit_owned(self, frame: Frame, user: object) -> Errors:
        work = frame.work
        if work.doom is not None:
            return (RollbackOnlyError,)
        self.stack.append(frame)  # its transaction is still open while its hooks run, and while it flushes
        out = self.checked_out()
        self.fired += [(hook.number, out) for hook in work.hooks if hook.outcome == "before"]
        if work.meets or work.stuck:
            self.stack.pop()
            return work.meets or (InvalidRequestError,)
        errors = self._flush(work, user)
        self.stack.pop()
        if not errors:
            self._save(work)
        return errors

    def _leave_savepoint(self, frame: Frame, user: object, *, failing: bool) -> Errors:
        work = frame.work
        errors: Errors = FINE
        if not failing and not frame.quiet:
            refused = work.doom is not None and (frame.kind == "nested" or work.doom == frame.level)
            if refused and not (frame.closed and frame.kind == "savepoint"):
                errors = (RollbackOnlyError,)
            elif work.stuck and not frame.closed:
                errors = (InvalidRequestError,)
            elif not frame.closed:
                self.stack.append(frame)
                errors = self._flush(work, user)
                self.stack.pop()
        if frame.closed:
            return errors
        level = work.levels.pop()
        undone = failing or frame.quiet or bool(errors)
        if undone:
            work.pending = {}
            work.stuck = False
            if work.doom == frame.level:
                work.doom = None
        else:
            work.levels[-1].changes.update(level.changes)
            work.levels[-1].wrote |= level.wrote
        self._hooks_out(work, frame.level, undone=undone)
        return errors

    def _hooks_out(self, work: Work, level: int, *, undone: bool) -> None:
        inside = [hook for hook in work.hooks if hook.level >= level]
        for hook in inside:
            hook.level = level - 1
            hook.due = hook.due or undone
        if undone:
            work.hooks = [hook for hook in work.hooks if hook not in inside or hook.outcome == "rollback"]

    def _save(self, work: Work) -> None:
        changes: Changes = dict(self.committed)
        for level in work.levels:
            changes.update(level.changes)
        if any(level.wrote for level in work.levels):
            # On a server others may have committed since this one began: only its own changes count there.
            self.commits += 1
            self.committed = {key: value for key, value in changes.items() if value is not None}
        work.ended()

    def _undo(self, work: Work) -> None:
        if len(work.levels) > 1:
            self._hooks_out(work, 1, undone=True)
        self._close_savepoints(work)
        work.ended()

    def _close_savepoints(self, work: Work) -> None:
        frames: Iterable[Frame] = (frame for frame in self.stack if frame.work is work)
        for frame in frames:
            if frame.kind in ("nested", "savepoint"):
                frame.closed = True
