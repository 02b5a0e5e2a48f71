"""Guards watch for what goes wrong with sessions, and say so: off, in the log, as a warning, as an error.

They are at work with `import dbscope`, at levels that a production service can live with; `configure` changes them.
What protects data is no guard, and always raises.
"""

from typing import Any

from dbscope.guards.begun_by_read import BegunByRead
from dbscope.guards.budgets import IdleInTransaction, LongScope, LongTransaction, set_budget
from dbscope.guards.detached import DetachedRead
from dbscope.guards.engines_again import EnginesAgain
from dbscope.guards.never_ended import ScopeNeverEnded, SessionWasDropped
from dbscope.guards.pending_rollback import FirstFailure
from dbscope.guards.policy import Found, Level, register, set_levels
from dbscope.guards.pool_exhausted import PoolHolders
from dbscope.guards.sent_in_transaction import SentTooEarly
from dbscope.guards.sync_on_loop import SyncOnSameLoop

__all__ = ["Found", "Level", "configure"]

for _guard in (
    PoolHolders(),
    IdleInTransaction(),
    LongTransaction(),
    LongScope(),
    BegunByRead(),
    DetachedRead(),
    FirstFailure(),
    SyncOnSameLoop(),
    SessionWasDropped(),
    ScopeNeverEnded(),
    EnginesAgain(),
    SentTooEarly(),
):
    register(_guard)


def configure(database: Any = None, *, budget: float | None = None, **levels: Level) -> None:
    """Set the levels of guards, by their names, and the budget of those that watch for what takes too long.

    Args:
        database: the one whose levels are set; None for all that have none of their own.
        budget: seconds that a transaction may be idle, or open, and a scope may last; for all databases.
        levels: such as `idle_in_transaction="raise"`: `"off"`, `"log"`, `"warn"` or `"raise"`.

    Raises:
        ConfigurationError: there is no such guard, or no such level.

    >>> configure(long_transaction="warn", budget=2.0)
    >>> configure(long_transaction="log", budget=5.0)
    """
    set_levels(levels, database)
    if budget is not None:
        set_budget(budget)
