"""Where sessions were closed that held objects, and what had expired these: of the last ones, for who reads on.

A session's identity map goes with `close()`; what its objects keep is the weak reference to it, and that is how an
object is found again here. Nothing that is recorded keeps an object, a session or a scope alive.
"""

from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Any, NamedTuple

from dbscope.where import Place, here, spell

__all__ = ["Closing", "Expiry", "closing_of", "expired_all", "expired_alone", "kept", "remember", "set_recording"]

MOST = 500  # closings that are remembered

# One deque while anybody wants to know; otherwise nothing is recorded.
kept: list["deque[Closing]"] = []


class Expiry(NamedTuple):
    """What made objects of a session read again: a commit, a rollback, a call of the user's."""

    what: str
    owner: str | None  # the title of the block that did it
    place: Place | None
    at: float

    def __str__(self) -> str:
        if self.owner is None:
            return f"{self.what} at {spell(self.place)}"
        begun = f" begun at {spell(self.place)}" if self.place is not None else ""  # in a request by the middleware
        return f"{self.what} of {self.owner}{begun}"


class Closing(NamedTuple):
    """The end of a session's objects.

    Attributes:
        objects: the weak reference that they share.
        scope: the name of the scope; None where it has none.
        opened: where the scope was opened.
        how: what ended the session before its scope did; None for the scope's end.
        place: where that was.
        expiry: what had expired its objects last.
    """

    objects: Any
    scope: str | None
    opened: Place | None
    how: str | None
    place: Place | None
    expiry: Expiry | None


def set_recording(wanted: bool) -> None:
    """Begin to record, or end it and forget."""
    if not wanted:
        kept.clear()
    elif not kept:
        kept.append(deque(maxlen=MOST))


def remember(session: Any, life: Any, how: str | None = None, place: Place | None = None) -> None:
    """A session that holds objects is about to be closed."""
    for closings in kept:
        home: Any = life.home if life.ended is None else life.ended.whose
        of_scope = home is not None and not isinstance(home, str)
        closings.append(
            Closing(
                session.identity_map._wr,
                home.name if of_scope else None,
                home.place if of_scope else None,
                how or (None if life.ended is not None and of_scope else "close()"),
                place or (here() if how is not None or life.ended is None else life.ended.place),
                life.expiry,
            )
        )


def closing_of(state: Any) -> Closing | None:
    """The closing of the session that an object was in, if it is remembered."""
    objects: Any = state._instance_dict
    closing: Closing
    for closings in kept:
        for closing in reversed(list(closings)):
            if closing.objects is objects:
                return closing
    return None


def expired_all(life: Any, what: str) -> None:
    """All objects of a session are about to be expired."""
    owner = life.owner
    if owner is None:
        life.expiry = Expiry(what, None, here(), monotonic())
    else:
        life.expiry = Expiry(what, owner.title, owner.place, monotonic())


def expired_alone(state: Any, what: str) -> None:
    """One object was expired."""
    state.__dict__["_dbscope_expiry"] = Expiry(what, None, here(), monotonic())


def expiries_of(state: Any, last: Expiry | None) -> Iterator[Expiry]:
    """What may have expired an object: its own, and the last one of its session."""
    own = state.__dict__.get("_dbscope_expiry")
    yield from (expiry for expiry in (own, last) if expiry is not None)
