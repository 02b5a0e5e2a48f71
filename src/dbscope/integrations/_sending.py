"""What integrations of task queues share: a message that is sent inside a transaction waits for its commit, or warns.

A worker may be faster than the commit, and not find the row that the message is about; and after a rollback it will
never be there. What counts are the transactions that the calling code works in: all those of its innermost scope, on
whichever databases, and the scope itself, if it commits on success. A scope inside another is work of its own, and so
is what it sends.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dbscope.events import SentInTransaction, emit
from dbscope.hooks import Hook
from dbscope.implicit import implicit_scope
from dbscope.lifecycle import Lifecycle, life_of
from dbscope.scope import Scope, current_scope
from dbscope.transaction import call_of
from dbscope.where import here, running_loop

__all__ = ["hold", "warn"]

_told = SentInTransaction.observers


class Held:
    """What is to be called when the last of several transactions has been committed, and never if one is not."""

    def __init__(self, send: Callable[[], Any], title: str, waits_for: int) -> None:
        self.send = send
        self.title = title
        self.waits_for = waits_for

    def __call__(self) -> None:
        self.waits_for -= 1
        if not self.waits_for:
            self.send()

    def __repr__(self) -> str:
        return self.title


def hold(prepare: Callable[[], Callable[[], Any]], title: str) -> bool:
    """Send a message when all that the calling code has open is committed; drop it if some of that is rolled back.

    The connections are back by then, and it is sent in a scope of its own. A savepoint that is rolled back drops what
    was sent in it.

    Args:
        prepare: makes of the message, now, what sends it later; not called where nothing is open.
        title: what errors call it.

    Returns:
        whether it is held; otherwise nothing is open, and the caller sends at once.
    """
    home = _home()
    if home is None:
        return False
    opened = [*_open(home)]
    parts = len(opened) + (home.commit is not None)
    if not parts:
        return False
    held = Held(prepare(), title, parts)
    call = call_of(held, (), {}, here(), is_async=False)
    for source, session, life in opened:
        due = call if source.capture is None else source.capture(call, held, (), {})
        savepoint = getattr(session, "sync_session", session).get_nested_transaction()
        life.hooks += (Hook(due, "commit", savepoint, name=title, blocking=True),)
    if home.commit is not None:
        home.after_commit(Hook(call, "commit", None, name=title, blocking=True))
    return True


def warn(title: str, advice: str) -> None:
    """Tell, for the guard `sent_in_transaction`, if the calling code has written in a transaction that is open.

    Args:
        title: what is sent.
        advice: what to do instead.
    """
    home = _home() if _told else None
    if home is None:
        return
    for source, session, life in _open(home):
        wrote = life.uncommitted(getattr(session, "sync_session", session))
        if wrote is not None:
            emit(SentInTransaction(task=title, database=source, wrote=wrote, advice=advice))
            return


def _home() -> Scope | None:
    """The scope whose transactions count: a reader's own commits nothing, and stands for the one around it."""
    home = current_scope()
    while home is not None and home.commit is None and (lives := [life_of(s) for s in home._all()]):
        if not all(life.owner is not None and life.owner.reader for life in lives):
            break
        home = home._outer
    if home is None and running_loop() is None:
        home = implicit_scope()
    return None if home is None or home.ended else home


def _open(home: Scope) -> Iterator[tuple[Any, Any, Lifecycle]]:
    """The transactions of a scope that may be committed, with their databases and sessions."""
    for session in home._all():
        life = life_of(session)
        owner = life.owner
        sync = getattr(session, "sync_session", session)
        if (owner is not None and not owner.reader) or (owner is None and life.uncommitted(sync) is not None):
            yield life.source, session, life
