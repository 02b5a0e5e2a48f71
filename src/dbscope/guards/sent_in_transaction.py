"""A task that is sent to a queue inside of a transaction: a worker may be faster than the commit (FAILURES 14)."""

from dbscope.errors import SentBeforeCommit
from dbscope.events import Fact, SentInTransaction
from dbscope.guards.policy import Guard, Level
from dbscope.where import here, spell

__all__ = ["SentTooEarly"]


class SentTooEarly(Guard):
    """Integrations of queues tell of it; with `"raise"` the task is not sent."""

    name = "sent_in_transaction"
    default: Level = "warn"
    kinds: tuple[type[Fact], ...] = (SentInTransaction,)
    warning = SentBeforeCommit

    def look(self, fact: SentInTransaction) -> None:
        """Report it."""
        wrote = fact.wrote
        what = f"since {spell(wrote)}" if isinstance(wrote, tuple) else wrote
        self.found(
            f"{fact.task} was sent inside of a transaction of {fact.database.name} that has uncommitted writes "
            f"({what}): a worker may not find them yet, and after a rollback it never will.\n{fact.advice}",
            database=fact.database,
            place=here(),
        )
