"""Objects that are read too late, or where nobody can wait (statement 35; FAILURES 16, 17): the error says why."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from sqlalchemy.exc import MissingGreenlet, StatementError
from sqlalchemy.orm.attributes import InstrumentedAttribute, instance_state
from sqlalchemy.orm.exc import DetachedInstanceError

from dbscope.closings import Closing, closing_of, expiries_of, set_recording
from dbscope.events import Fact, WorkFailed
from dbscope.guards.policy import Guard, Level
from dbscope.where import Place, spell

__all__ = ["DetachedRead"]

_READ = InstrumentedAttribute.__get__.__code__
DEPTH = 20  # errors behind an error


class DetachedRead(Guard):
    """Adds a note to `DetachedInstanceError` and `MissingGreenlet`: what expired the object, where its session is.

    It looks at an error where it leaves a scope, a block, a middleware or a test, in the error's own traceback. The
    error stays SQLAlchemy's, whatever the level; `"off"` leaves the note out, `"log"` logs it besides.
    """

    name = "detached_read"
    default: Level = "warn"
    kinds: tuple[type[Fact], ...] = (WorkFailed,)

    def start(self) -> None:
        """Have closings recorded."""
        super().start()
        set_recording(True)

    def stop(self) -> None:
        """Have them recorded no more."""
        super().stop()
        set_recording(False)

    def look(self, fact: WorkFailed) -> None:
        """Look whether it, or what is behind it, is one of the two, and was not explained before."""
        for error in _behind(fact.error):
            if not _is_late(error) or "_dbscope_explained" in error.__dict__:
                continue
            read = _read_in(error.__traceback__)
            if read is not None:
                error.__dict__["_dbscope_explained"] = True
                instance, key, place = read
                state: Any = instance_state(instance)
                life = getattr(state.session, "_dbscope", None)
                database = None if life is None else life.source
                self.explain(error, lambda: _note(error, state, key, place), database)  # noqa: B023  # called now


def _behind(error: BaseException | None, depth: int = DEPTH) -> Iterator[BaseException]:
    """An error, and those that it came from, or holds."""
    if error is None or depth == 0:
        return
    yield error
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _behind(each, depth - 1)
    yield from _behind(error.__cause__ or error.__context__, depth - 1)


def _is_late(error: BaseException) -> bool:
    if isinstance(error, StatementError):
        return isinstance(error.orig, MissingGreenlet)
    return isinstance(error, DetachedInstanceError | MissingGreenlet)


def _read_in(traceback: TracebackType | None) -> tuple[Any, str, Place | None] | None:
    """The object that was read, its attribute and the line, from the frames that the error went through."""
    line: Place | None = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code is _READ:
            found = frame.f_locals
            return found["instance"], found["self"].key, line
        line = frame.f_code, traceback.tb_lasti
        traceback = traceback.tb_next
    return None


def _note(error: BaseException, state: Any, key: str, place: Place | None) -> str:
    what = f"{state.class_.__name__}.{key} was read at {spell(place)}"
    session = state.session
    life = getattr(session, "_dbscope", None)
    closing = closing_of(state) if session is None else None
    last = life.expiry if life is not None else closing.expiry if closing is not None else None
    expiry = max(expiries_of(state, last), key=lambda one: one.at, default=None)
    if key not in state.expired_attributes:
        why = "it was never loaded"
    elif expiry is None:
        why = "it was expired"
    else:
        why = f"it was expired by {expiry}"
    if session is None:
        return f"{what}: {why}, and {_closed(closing)}.\n{_advice(key in state.expired_attributes)}"
    whose = "" if life is None else f" The session is that of {life.whose}, and open." if life.ended is None else ""
    return (
        f"{what}, which would have to wait for the database: {why}.{whose}\n"
        f"Load it where it can be awaited: `await session.refresh({state.class_.__name__.lower()}, [{key!r}])`, "
        "or with the query (`selectinload()`); a rollback expires everything, whatever `expire_on_commit` says."
    )


def _closed(closing: Closing | None) -> str:
    if closing is None:
        return "it is in no session: that was closed, or it was expunged, too long ago to tell where"
    scope, opened = closing.scope, closing.opened
    if opened is None:
        whose = "" if scope is None else f"scope {scope!r}"
    else:
        whose = f"scope {scope!r} (opened at {spell(opened)})" if scope else f"the scope opened at {spell(opened)}"
    if closing.how is not None or not whose:
        return f"its session{f', of {whose},' if whose else ''} was closed at {spell(closing.place)}"
    return f"its session is closed: {whose} ended{f' at {spell(closing.place)}' if closing.place else ''}"


def _advice(expired: bool) -> str:
    if expired:
        return (
            "Read before that; keep what is loaded after a commit with `expire_on_commit=False` (a rollback expires "
            "nevertheless); or read in `with db.reader():`, whose objects stay readable."
        )
    return "Load it with the object, such as by `selectinload()`, while the session is open."
