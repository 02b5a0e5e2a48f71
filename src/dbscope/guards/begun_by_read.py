"""A transaction that nobody meant to open: a read, or a refresh, after a commit (statement 34; FAILURES 18)."""

import sys
from types import FrameType
from typing import Any

from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import InstrumentedAttribute, instance_state

from dbscope.events import Fact, TransactionBegunAgain, emit
from dbscope.guards.policy import Found, Guard, Level, level_of
from dbscope.lifecycle import life_of
from dbscope.where import Place, here, spell, user_frame

__all__ = ["BegunByRead"]

_READ = InstrumentedAttribute.__get__.__code__
_REFRESH = Session.refresh.__code__
_SESSION = Session.__module__
MOST = 1000  # lines that are remembered


class BegunByRead(Guard):
    """Names the class, the attribute and the line of the read. It looks at the stack, in which the read still stands.

    At `"log"` a line of the user's is told once in a process: an application that does this does it with each request.
    """

    name = "begun_by_read"
    default: Level = "log"
    kinds: tuple[type[Fact], ...] = (TransactionBegunAgain,)

    def __init__(self) -> None:
        super().__init__()
        self._told: set[Place | None] = set()

    def look(self, fact: TransactionBegunAgain) -> None:
        """Report it, if it was a read that began the transaction, and no block."""
        if life_of(fact.session).owner is not None:
            return
        read = _read_on(sys._getframe(1))
        if read is None:
            return
        place = here()
        whose = "" if fact.scope is None else f", in {fact.scope.describe()}"
        message = (
            f"{_what(read)} at {spell(place)}{whose}, began a transaction after a commit: it is open, and holds a "
            f"connection, until somebody ends it.\n{_advice(read)}"
        )
        if level_of(self.name, fact.database) != "log":
            self.found(message, database=fact.database, place=place)
        elif place not in self._told:
            if len(self._told) < MOST:
                self._told.add(place)
            self.found(message, database=fact.database, place=place)
        elif Found.observers:
            emit(Found(guard=self.name, message=message, database=fact.database))


def _read_on(frame: FrameType | None) -> FrameType | None:
    """The call of SQLAlchemy's by which the user reads an attribute, or refreshes; None if it is any other."""
    user = user_frame(frame)
    found = None
    while frame is not None and frame is not user:
        if frame.f_code is _READ or frame.f_code is _REFRESH:
            found = frame
        elif frame.f_globals.get("__name__") == _SESSION:
            found = None  # reads on behalf of a get(), a merge(), a flush()
        frame = frame.f_back
    return found


def _what(read: FrameType) -> str:
    instance = read.f_locals["instance"]
    if read.f_code is _REFRESH:
        return f"session.refresh() of {type(instance).__name__}"
    return f"the read of {type(instance).__name__}.{read.f_locals['self'].key}"


def _advice(read: FrameType) -> str:
    if read.f_code is _REFRESH:
        return (
            "Refresh before the commit, after a flush; or leave it out: with `expire_on_commit=False` the object keeps "
            "what was written."
        )
    state: Any = instance_state(read.f_locals["instance"])
    attribute = read.f_locals["self"]
    if attribute.key in state.expired_attributes:
        return (
            "It was expired. Read before the commit, keep what is loaded with `expire_on_commit=False`, or "
            "read in `with db.reader():`, whose objects stay readable."
        )
    return (
        "It was not loaded. Load it with the object, such as by `selectinload()`, or read in `with db.transaction():`."
    )
