"""The scope: one piece of work, and the sessions it has opened.

The current scope is one `ContextVar`; the scope itself holds its sessions, so there is no dictionary of sessions by
key that could leak, or whose keys a later piece of work could inherit. Ending a scope empties it: the look-up of a
session needs no check for dead scopes.
"""

import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from enum import Enum
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal, Protocol, TypeVar, cast

from sqlalchemy.orm import Session

from dbscope.commit import before_commit, commit_all
from dbscope.ending import Ending, aend, end, raise_first
from dbscope.errors import (
    ConfigurationError,
    GuardError,
    NoScopeError,
    ScopeEndedError,
    ScopeMisuseError,
    ScopeWarning,
    UncommittedWrites,
    UncommittedWritesError,
)
from dbscope.events import ScopeEnded, ScopeOpened, ScopeTooLong, WorkFailed, emit, tell_failed
from dbscope.generators import CONTEXTLIB, IN_GENERATOR, refuse_generator, refuse_undecoratable
from dbscope.hooks import Hook, title
from dbscope.lifecycle import End, Lifecycle, Owner, end_life, life_of
from dbscope.plan import OnSession
from dbscope.session import release
from dbscope.where import Place, ago, here, is_over, line_of, name_of, on_behalf, place_of, running_loop, spell, worker

__all__ = ["Scope", "current_scope", "scope"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Commit = Literal["on-success"] | None


class Source(Protocol):
    """What a scope asks of a database."""

    name: str
    is_async: bool
    uncommitted: Literal["warn", "raise", "off"]

    def make(self, home: "Scope", options: dict[str, Any] | None) -> Any:
        """A new session, with its life begun in `home`."""


class State(Enum):
    """Where a scope stands."""

    NEW = "made, and not entered yet"
    OPEN = "entered: sessions may be opened"
    ENDING = "committing: its sessions still serve the events that fire meanwhile"
    ENDED = "over: its sessions are dead"


class Colour(Enum):
    """How a scope was opened, and so which sessions it can end."""

    SYNC = "with scope()"
    ASYNC = "async with scope()"
    BY_ID = "begin_scope()"
    IMPLICIT = "the thread's implicit scope"


# Bound once: reading a member through its Enum costs as much as the rest of an empty scope.
_NEW, _OPEN, _ENDING, _ENDED = State
_SYNC, _ASYNC, _BY_ID, _IMPLICIT = Colour

_NOWHERE: tuple[None, int] = (None, 0)

# Shared by all scopes that use no session, and never written to: a dictionary is a fifth of an idle scope's memory.
_NO_SESSIONS: dict[Any, Any] = {}
_first_session = threading.Lock()


def _free_lock() -> None:
    global _first_session
    _first_session = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_lock)  # the thread that held it may be the parent's alone

_current: ContextVar["Scope | None"] = ContextVar("dbscope.scope", default=None)
_get, _set = _current.get, _current.set
_getframe = sys._getframe
_monotonic = time.monotonic
_opened, _ended, _failed = ScopeOpened.observers, ScopeEnded.observers, WorkFailed.observers
too_long: list[float] = []  # the seconds after which a scope that used a database is told to have taken too long


class Scope:
    """One piece of work: at most one session per database, opened when first needed, released when the work ends.

    Enter it once, with `with` or (for async sessions, and where sync ones must not block a loop) `async with`.
    It never commits by itself: `session.commit()`, `db.transaction()` do; what nobody committed is rolled back and
    reported. A scope inside another has sessions of its own, and leaving it restores the outer one. As a decorator,
    `@scope("resize")`, it gives each call of a function a new one.

    Args:
        name: what errors and the live view call this work; the line that opened it, if not given.
        commit: `"on-success"` makes the whole scope one managed transaction for each database that is used in it:
            begun at the first use, committed when the block ends without an error, rolled back otherwise. With
            several databases all sessions flush first, then commit in the order of first use.
        writes: whether an on-success scope takes SQLite's write lock when it begins (see `Database`).

    Raises:
        ScopeMisuseError: on entering, if it was entered before, or in a plain generator's frame.
        PartialCommit: on leaving, if a commit failed after another database's had succeeded.
        UncommittedWritesError: on leaving, where a database was told to raise for lost writes.

    >>> from dbscope import Database, scope
    >>> from sqlalchemy import text
    >>> db = Database("sqlite://")
    >>> with scope("nightly-report"):
    ...     db.session.scalar(text("SELECT 42"))
    42
    >>> db.dispose()
    """

    __slots__ = (
        *("name", "commit", "writes", "since", "_sessions", "_guests", "_outer", "_code", "_instruction"),
        *("_state", "_colour", "_loop", "_joined", "_hooks", "__weakref__"),
    )

    def __init__(self, name: str | None = None, *, commit: Commit = None, writes: bool = True) -> None:
        if name is not None and not isinstance(name, str):
            raise ConfigurationError(f"a scope's name is a string, not {name!r}. Try scope({str(name)!r}).")
        if commit is not None and commit != "on-success":
            raise ConfigurationError(f'commit is None or "on-success", not {commit!r}.')
        self.name = name
        self.commit = commit
        self.writes = writes
        self._sessions = _NO_SESSIONS
        self._state = _NEW

    # -- entering and leaving ----------------------------------------------------------------------------------

    def __enter__(self) -> "Scope":
        self._colour = _SYNC
        # As in `_enter` and `_open`: two calls would be a sixth of an empty scope.
        frame = _getframe(1)
        code = frame.f_code
        if code.co_flags & IN_GENERATOR or code.co_filename == CONTEXTLIB:
            frame = refuse_generator(frame)
            code = frame.f_code
        if self._state is not _NEW:
            self._open(code, frame.f_lasti)
            return self
        self._outer = _get()
        self._code: CodeType | None = code
        self._instruction = frame.f_lasti
        self.since = _monotonic()
        self._state = _OPEN
        _set(self)
        if _opened:
            emit(ScopeOpened(scope=self, at=self.since))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and _failed:
            tell_failed(error)
        if self._sessions or self._state is not _OPEN:
            try:
                if self._state is _OPEN and not self._end_simply(_getframe(1), error, blocking=True):
                    end(self._conclude(error), error, self.describe)
            finally:
                outer = self._outer
                if _get() is self and (outer is None or outer._state is _OPEN):  # as `_leave` does then
                    _set(outer)
                else:
                    self._leave()
        else:
            self._state = _ENDED
            outer = self._outer
            if _get() is self and (outer is None or outer._state is _OPEN):
                _set(outer)
            else:
                self._leave()
            if _ended:
                self._tell_end(error)

    async def __aenter__(self) -> "Scope":
        self._colour = _ASYNC
        self._enter(_getframe(1))
        return self

    def __call__(self, function: F) -> F:
        """Decorate a function, sync or async: each call of it runs in a new scope like this one.

        For what is called by others, such as the jobs of a pool: `executor.submit(scope("resize")(resize), id)`. The
        name, if none was given, is the function's.

        Raises:
            ConfigurationError: it is no function, or a generator.
        """
        is_async = refuse_undecoratable(function, "@scope()", "scope", "with scope():")
        name, place = self.name or title(function), here()

        if is_async:

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                async with PlacedScope(name, place, commit=self.commit, writes=self.writes):
                    return await function(*args, **kwargs)

            return cast("F", awaited)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with PlacedScope(name, place, commit=self.commit, writes=self.writes):
                return function(*args, **kwargs)

        return cast("F", called)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None and _failed:
            tell_failed(error)
        if self._sessions or self._state is not _OPEN:
            try:
                if self._state is _OPEN and not self._end_simply(_getframe(1), error, blocking=False):
                    await self._afinish(error)
            finally:
                outer = self._outer
                if _get() is self and (outer is None or outer._state is _OPEN):  # as `_leave` does then
                    _set(outer)
                else:
                    self._leave()
        else:
            self._state = _ENDED
            outer = self._outer
            if _get() is self and (outer is None or outer._state is _OPEN):
                _set(outer)
            else:
                self._leave()
            if _ended:
                self._tell_end(error)

    def _end_simply(self, frame: FrameType | None, error: BaseException | None, *, blocking: bool) -> bool:
        """End a scope in which nothing is to be committed, as most are: what `_conclude` does then, without its plan.

        A reader's own scope is one of these.

        The plan and its steps cost as much as all else at the end of a scope; here there is nothing to decide.

        Args:
            frame: who ends it; None if no line of the user's does.
            error: what the work failed with.
            blocking: whether a transaction may be rolled back here; otherwise none may be open.

        Returns:
            whether that was all; otherwise nothing has happened.
        """
        lost = None
        lives: list[tuple[Any, Lifecycle]] = []  # of the sync sessions
        for source, session in [*self._sessions.items()]:
            if session is _Guests:
                return False
            life: Lifecycle = session._dbscope
            owner = life.owner
            if (owner is not None and not owner.reader) or life.hooks:
                return False
            if source.is_async:
                if life.used and session.in_transaction():
                    return False
                session = session.sync_session
            elif not blocking and life.used and session.in_transaction():
                return False
            lives.append((session, life))
            if (
                life.used
                and error is None
                and (life.writes or life.dropped is not None or not session._is_clean())
                and (place := life.unsaved(session)) is not None
            ):
                lost = [*(lost or ()), (source, place)]
        self._state = _ENDED
        self._sessions = _NO_SESSIONS
        end = End(self, None if frame is None else place_of(frame))
        failure: BaseException | None = None
        for _, life in lives:  # all of them, before the first one is released: what that fires may use another
            if life.ended is None:
                life.ended = end
        for session, life in lives:
            if life.used:  # now or never: it was marked as ended before this look
                try:
                    release(session)
                except BaseException as problem:
                    failure = _first(failure, problem)
            life.home = None
        if lost is not None:
            for source, place in lost:
                failure = self._report(source, place, failure)
        if _ended or (too_long and end.at - self.since > too_long[0]):
            failure = self._told_end(end.at, error, failure)
        if failure is not None:
            raise_first(failure, error, self.describe)
        return True

    def finish(self, *, veto: bool = False) -> None:
        """End the work now, as leaving the block without an error does: commit on success, release the sessions.

        For a caller that must know the outcome before it goes on, as a web server before the first byte leaves.
        Leaving the block afterwards is harmless. Does nothing on a scope that is over.

        Args:
            veto: roll back an on-success scope although nothing was raised.
        """
        if not self._sessions and self._state is _OPEN:
            self._end_empty()
        elif self._state is _OPEN and (
            veto or not self._end_simply(None if self.ending else _getframe(1), None, blocking=True)
        ):
            self.refuse_async("afinish()")
            end(self._conclude(None, veto=veto), None, self.describe)

    async def afinish(self, *, veto: bool = False) -> None:
        """Async version of `finish`."""
        if not self._sessions and self._state is _OPEN:
            self._end_empty()
        elif self._state is _OPEN and (
            veto or not self._end_simply(None if self.ending else _getframe(1), None, blocking=False)
        ):
            await self._afinish(None, veto=veto)

    def _end_empty(self) -> None:
        self._state = _ENDED
        if _ended:
            self._tell_end(None)

    def _tell_end(self, error: BaseException | None) -> None:
        failure = self._told_end(self.since, error, None)
        if failure is not None:
            raise_first(failure, error, self.describe)

    def _told_end(self, at: float, error: BaseException | None, failure: BaseException | None) -> BaseException | None:
        """Tell that the scope is over, all being given back; what failed, be it a guard that says so."""
        try:
            if too_long and at - self.since > too_long[0] and self._colour is not _IMPLICIT:  # a thread's is no work
                emit(ScopeTooLong(scope=self, lasted=at - self.since))
            if _ended:
                emit(ScopeEnded(scope=self, error=error or failure))
        except GuardError as found:
            return _first(failure, found)
        return failure

    async def _afinish(self, error: BaseException | None, *, veto: bool = False) -> None:
        await aend(
            self._conclude(error, veto=veto),
            error,
            self.describe,
            holds=any(_in_transaction(session) for session in self._all()),
            forward=self.commit is not None and error is None,
            awaits=not all(isinstance(session, Session) for session in self._sessions.values()),
        )

    def _enter(self, frame: FrameType) -> None:
        code = frame.f_code
        if code.co_flags & IN_GENERATOR or code.co_filename == CONTEXTLIB:
            frame = refuse_generator(frame)
            code = frame.f_code
        self._open(code, frame.f_lasti)

    def _open(self, code: CodeType | None, instruction: int) -> None:
        if self._state is not _NEW:
            raise ScopeMisuseError(
                f"{self.describe()} was entered again at {spell(here())}; "
                f"it {'has ended' if self.ended else 'is still open'}.\n"
                "A scope serves one piece of work. Make a new one for each: `with scope(): ...`."
            )
        if self._colour is _ASYNC:
            self._loop = running_loop()
        self._outer = _get()
        self._code = code
        self._instruction = instruction
        self.since = _monotonic()
        self._state = _OPEN
        _set(self)
        if _opened:
            emit(ScopeOpened(scope=self, at=self.since))

    def _leave(self) -> None:
        """Make current again what was before, where this scope still is; its sessions are released already.

        Be that an ended scope: what inherited one, or runs after the response of its request, is still told so.
        """
        current, outer = _get(), self._outer
        if current is self:
            _set(outer)
        elif current is not None and current._state is _ENDED and current._inside(self):
            _set(outer)  # it was ended in another context, and nobody would take it away in this one
        elif current is not None and current._state is _OPEN and current._inside(self):
            if self._state is _OPEN:  # suspended: what was opened inside goes on by its id, and is not for others
                _set(outer)
                return
            inner = current
            while inner._outer is not self:
                inner = cast("Scope", inner._outer)
            inner._outer = outer  # it must not make this one current again
            warnings.warn(
                f"{self.describe()} ended before {current.describe()}, which was opened inside of it and is still "
                "open. Leave scopes in the reverse order of entering them.",
                ScopeWarning,
                stacklevel=3,
            )
        while outer is not None and outer._state is _ENDED:
            outer = self._outer = outer._outer  # tasks that start each other for ever must not keep all of them

    def _inside(self, other: "Scope") -> bool:
        scope: Scope | None = self
        while scope is not None and scope is not other:
            scope = scope._outer
        return scope is other

    # -- sessions ----------------------------------------------------------------------------------------------

    def open(self, source: Any, options: dict[str, Any] | None = None) -> Any:
        """The scope's session for `source`, made now if there is none yet. Users call `db.session()`."""
        session = self._sessions.get(source)
        if session is not None:
            return session
        if self._state is _ENDED:
            raise self.ended_error(source.name)
        if source.is_async:
            self._refuse_colour(source)
        elif self._colour is _ASYNC and self._loop is None:
            raise self._on_other_loop(source)
        session = source.make(self, options)
        if source.is_async:
            self._loop = running_loop()
        if self.commit is not None:
            title = f"the transaction of {f'scope {self.name!r}' if self.name else 'a scope'}"  # errors add the line
            life_of(session).own(Owner(title, self.place, immediate=self.writes))
        return self._own_sessions().setdefault(source, session)  # another thread of the same work may have been faster

    def _refuse_colour(self, source: Any) -> None:
        """Raise if the end of an async session could not be awaited."""
        if self._colour is _SYNC:
            raise NoScopeError(
                f"an async session of {source.name} was asked for at {spell(here())} in {self.describe()}, which was "
                "opened with `with`.\nOpen it with `async with scope():`, so that its end can be awaited."
            )
        if self._colour is _ASYNC:
            if self._loop is None:
                raise self._on_other_loop(source)
            if running_loop() is None:
                raise NoScopeError(
                    f"an async session of {source.name} was asked for by {name_of(worker())} at {spell(here())} in "
                    f"{self.describe()}, in a thread that cannot await.\n"
                    "Use it in an `async def`, or a Database here."
                )

    def _on_other_loop(self, source: Any) -> NoScopeError:
        return NoScopeError(
            f"a session of {source.name} was asked for at {spell(here())} in {self.describe()}, which was opened "
            "on an event loop other than asyncio's, where its end cannot be awaited.\nRun this on asyncio; or use "
            "a sync database, in a worker thread that opens its own scope: `with scope(): ...`."
        )

    def _own_sessions(self) -> dict[Any, Any]:
        """The scope's sessions, to put one in: a dictionary of its own from the first on."""
        if self._sessions is _NO_SESSIONS:
            with _first_session:  # another thread of the same work may be here, too
                if self._sessions is _NO_SESSIONS:
                    self._sessions = {}
        return self._sessions

    def has(self, source: Any) -> bool:
        """Whether this scope has opened a session for `source`."""
        return source in self._sessions

    def forget(self, source: Any) -> Any | None:
        """Take the session for `source` out of the scope: the caller ends it, the next look-up makes a new one."""
        return self._sessions.pop(source, None)

    def put(self, source: Any, session: Any) -> None:
        """Make `session` the scope's session for `source`."""
        self._own_sessions()[source] = session

    def guest(self, key: Any) -> Any | None:
        """The object that `keep` was given for `key`, while the scope is open."""
        guests: dict[Any, tuple[Any, Callable[[], None]]] | None = getattr(self, "_guests", None)
        kept = None if guests is None else guests.get(key)
        return None if kept is None else kept[0]

    def keep(self, key: Any, thing: Any, close: Callable[[], None]) -> Any:
        """Tie something to this scope that other code made: `close()` is called when the scope ends.

        For registries of sessions that are not a `Database`'s.

        Returns:
            what is tied under `key`: another thread of the same work may have been faster.
        """
        if self._state is _ENDED:
            raise self.ended_error(repr(key))
        if getattr(self, "_guests", None) is None:
            self._guests: dict[Any, tuple[Any, Callable[[], None]]] = {}
        self._own_sessions().setdefault(_Guests, _Guests)  # or leaving would take the short way
        return self._guests.setdefault(key, (thing, close))[0]

    def dismiss(self, key: Any) -> None:
        """Untie what `keep` tied; its `close()` is not called."""
        guests = getattr(self, "_guests", None)
        if guests is not None:
            guests.pop(key, None)

    def after_commit(self, hook: Hook) -> None:
        """Call a hook at the end of this on-success scope, if all that is written in it, now or later, is committed."""
        self._own_sessions().setdefault(_Guests, _Guests)  # or leaving would take the short way
        self._hooks: tuple[Hook, ...] = (*getattr(self, "_hooks", ()), hook)

    def outer_lives(self, source: Any) -> Sequence[Lifecycle]:
        """The lives, in the scopes around this one, of sessions of `source` that cannot go on before this work ends."""
        if self._outer is None:
            return ()
        found: list[Lifecycle] = []
        scope: Scope | None = self._outer
        waits = getattr(self, "_joined", None) is not None
        me = [worker(), on_behalf.get()]
        if (mine := self._owner_of(source)) is not None:
            me.append(mine.worker)  # this may have been handed over
        while scope is not None:
            session = scope._sessions.get(source)
            if session is not None:
                life = life_of(session)
                owner = life.owner
                user = life.user
                if (
                    waits
                    or (owner is not None and owner.worker in me)
                    or (user is not None and (user in me or is_over(user)))
                ):
                    found.append(life)
            waits = waits or getattr(scope, "_joined", None) is not None
            scope = scope._outer
        return found

    def _owner_of(self, source: Any) -> Owner | None:
        session = self._sessions.get(source)
        return None if session is None else life_of(session).owner

    def refuse_async(self, instead: str) -> None:
        """Raise if ending this scope needs an await, because it has async sessions that hold a connection."""
        for source, session in self._sessions.items():
            if session is not _Guests and source.is_async and _in_transaction(session):
                raise ScopeMisuseError(
                    f"{self.describe()} was to be ended at {spell(here())} by a call that cannot wait, but it holds a "
                    f"connection of the async {source.name}. Use `await {instead}`."
                )

    def held(self, source: Any) -> tuple[int, bool]:
        """How many connections of `source` the calling work holds, and whether it is a part of a fan-out over it.

        In a part, what its own scopes hold; what is held further out is its caller's to count.
        """
        count, scope = 0, cast("Scope | None", self)
        while scope is not None:
            session = scope._sessions.get(source)
            if session is not None and (life := life_of(session)).connection is not None and not life.is_apart:
                count += 1
            if getattr(scope, "_joined", None) is source:
                return count, True
            scope = scope._outer
        return count, False

    def _managed(self) -> list[Any]:
        return [s for s in self._all() if (owner := life_of(s).owner) is not None and not owner.reader]

    def _to_commit(self) -> list[Any]:
        return [s for s in self._managed() if not cast("Owner", life_of(s).owner).rollback_only]

    def _all(self) -> list[Any]:
        return [session for session in self._sessions.values() if session is not _Guests]

    # -- ending ------------------------------------------------------------------------------------------------

    def _conclude(self, error: BaseException | None, *, veto: bool = False) -> Ending:
        """Commit if that is this scope's to do, release every session, and tell what failed and which hooks are due."""
        self._state = _ENDING
        failure: BaseException | None = None
        committed: list[Any] = []
        hooks: list[Hook] = []
        lost: list[tuple[Any, Any]] = []
        if error is None and not veto:
            try:
                yield from before_commit(self._to_commit)  # whose hooks may use one database more
                yield from commit_all(self._to_commit(), committed, self)
            except BaseException as problem:
                failure = problem
            managed = self._managed()
            if failure is None and len(committed) == len(managed):
                hooks += getattr(self, "_hooks", ())
            for source, s in self._sessions.items():
                if s not in managed and (place := _unsaved(s)) is not None:
                    lost.append((source, place))
        sessions = self._all()
        guests = getattr(self, "_guests", None)
        self._state = _ENDED
        self._sessions.clear()
        end = End(self, None if self.ending else here())  # a response's start is told, and no line of the user's did it
        for session in sessions:
            end_life(session, end)
        for session in sessions:
            try:
                yield OnSession(session, release)
            except BaseException as problem:
                failure = _first(failure, problem)
            life = life_of(session)
            if life.hooks:
                hooks += life.take_hooks(committed=session in committed)
            life.home = None
        for thing, close in (guests or {}).values():
            try:
                yield OnSession(thing, _ignoring(close))
            except BaseException as problem:
                failure = _first(failure, problem)
        for source, place in lost:
            failure = self._report(source, place, failure)
        return self._told_end(end.at, error, failure), hooks

    def _report(self, source: Any, place: Any, failure: BaseException | None) -> BaseException | None:
        policy = source.uncommitted
        if policy == "off":
            return failure
        what = f"the first at {spell(place)}" if isinstance(place, tuple) else place
        message = (
            f"{self.describe()} ended with writes to {source.name} that nobody committed ({what}); they are rolled "
            "back.\nWrite inside `with db.transaction():`, or call `session.commit()`; `session.rollback()` says that "
            "they are meant to go."
        )
        if policy == "raise":
            return _first(failure, UncommittedWritesError(message))
        file, line = line_of(place if isinstance(place, tuple) else self.place or here())
        try:
            warnings.warn_explicit(message, UncommittedWrites, file, line)
        except UncommittedWrites as raised:  # warnings are errors here
            return _first(failure, raised)
        return failure

    # -- what people read --------------------------------------------------------------------------------------

    @property
    def place(self) -> Place | None:
        """Where the scope was opened; None if nobody opened it, or nobody has yet."""
        code = getattr(self, "_code", None)
        return None if code is None else (code, self._instruction)

    @property
    def tag(self) -> tuple[str | None, Place | None]:
        """Its name and its place, without much ado: asked for with each transaction."""
        return self.name, self.place

    @property
    def is_inside(self) -> bool:
        """Whether another scope was open around this one when it was entered."""
        return self._outer is not None

    @property
    def ended(self) -> bool:
        """Whether the scope is over."""
        return self._state is _ENDED

    @property
    def ending(self) -> str:
        """What its end came with, as errors say it after "it ended"; nothing, where the block was simply left."""
        return ""

    def describe(self) -> str:
        """The scope as errors name it: its name, and the line that opened it."""
        place = self.place
        if place is None:
            return f"scope {self.name!r}" if self.name else "a scope"
        return f"scope {self.name!r} (opened at {spell(place)})" if self.name else f"the scope opened at {spell(place)}"

    def ended_error(self, wanted: str) -> ScopeEndedError:
        """The error for work that inherited this scope and outlived it."""
        return ScopeEndedError(
            f"a session of {wanted} was asked for by {name_of(worker())} at {spell(here())} in {self.describe()}, "
            f"which has ended{self.ending}.\nWork that outlives a scope (a background task, a stream, a thread) opens "
            "its own: `with scope(): ...`, or `async with`, and is handed ids instead of objects."
        )

    def __repr__(self) -> str:
        age = f", opened {ago(self.since)}" if self._state is _OPEN else ""
        return f"<{self.describe()}: {self._state.name.lower()}{age}>"


scope = Scope


class PlacedScope(Scope):
    """A scope that dbscope opens in the user's name: for a hook, a pass, a part of a fan-out, an id.

    Args:
        name: what errors and the live view call this work.
        place: the user's line that asked for it.
        joined: the database over which the work around this one fans out: it waits for this, and holds its locks
            meanwhile.
    """

    __slots__ = ("_given",)

    def __init__(
        self, name: str, place: Place | None, *, commit: Commit = None, writes: bool = True, joined: Any = None
    ) -> None:
        super().__init__(name, commit=commit, writes=writes)
        self._given = place
        self._joined = joined

    def __enter__(self) -> "Scope":
        self.enter(_SYNC)
        return self

    async def __aenter__(self) -> "Scope":
        self.enter(_ASYNC)
        return self

    def enter(self, colour: Colour) -> None:
        """Open the scope and make it current."""
        self._colour = colour
        code, instruction = self._given or _NOWHERE
        self._open(code, instruction)

    suspend = Scope._leave  # the work, or what is left of it, goes on after `resume`

    def resume(self) -> None:
        """Make the scope current again, here: in the same thread or another, be it open or not."""
        current = _get()
        if current is None or not current._inside(self):
            self._outer = current
        _set(self)


def current_scope() -> Scope | None:
    """The scope that this code runs in, or None; an ended one that was inherited counts as none."""
    found = _get()
    return None if found is None or found._state is _ENDED else found


class _Guests:
    """Stands among a scope's sessions while something is tied to it by `keep`."""


def _first(first: BaseException | None, later: BaseException) -> BaseException:
    if first is None:
        return later
    first.add_note(f"and then: {later!r}")
    return first


def _ignoring(close: Callable[[], None]) -> Callable[[Session], None]:
    return lambda _: close()


def _in_transaction(session: Any) -> bool:
    return bool(session.in_transaction())


def _unsaved(session: Any) -> Any:
    if session is _Guests:
        return None
    return life_of(session).unsaved(session if isinstance(session, Session) else session.sync_session)


_inherited: list[Any] = []


def disinherit(home: Scope, parent: int) -> None:
    """In the child of a fork: make a scope of the parent's dead, and never speak on its connections."""
    end = End(home, how=f"it belongs to process {parent}", pid=parent)
    for session in home._all():
        end_life(session, end)
    _inherited.append(dict(home._sessions))
    home._sessions.clear()


def open_scopes_of_this_context() -> list[Scope]:
    """The open scopes that this code runs in, the innermost first."""
    found: list[Scope] = []
    home = _get()
    while home is not None:
        if home._state is not _ENDED:
            found.append(home)
        home = home._outer
    return found
