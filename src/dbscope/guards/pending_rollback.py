"""A session that goes on after a failure, and was not rolled back: the error quotes the first (FAILURES 8, 28)."""

from dbscope.events import Fact, RollbackPending
from dbscope.guards.policy import Guard, Level
from dbscope.lifecycle import life_of

__all__ = ["FirstFailure"]


class FirstFailure(Guard):
    """Adds a note to `PendingRollbackError`: the statement that failed first, its line, and what it failed with.

    The error stays SQLAlchemy's, whatever the level; `"off"` leaves the note out, `"log"` logs it besides.
    """

    name = "pending_rollback"
    default: Level = "warn"
    kinds: tuple[type[Fact], ...] = (RollbackPending,)

    def look(self, fact: RollbackPending) -> None:
        """Quote it, if it is known."""
        if fact.failure is not None:
            self.explain(fact.error, lambda: _note(fact), fact.database)


def _note(fact: RollbackPending) -> str:
    note = f"The first failure: {fact.failure}."
    if life_of(fact.session).owner is not None:
        return note  # what to do in a block the core says itself
    return (
        f"{note}\nGive each piece of work a scope of its own, or roll back: `session.rollback()`. What may fail goes "
        "into `transaction(nested=True)`."
    )
