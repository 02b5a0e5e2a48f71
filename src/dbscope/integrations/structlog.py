"""Structured logs: what happens, as events of structlog's with fields; and the scope's name in all of your own."""

from collections.abc import MutableMapping
from typing import Any

from dbscope.errors import ConfigurationError
from dbscope.events import PoolExhausted, ScopeEnded, StatementEnded, TransactionEnded, observe
from dbscope.guards import Found
from dbscope.integrations._facts import database_of, elsewhere, is_work, named
from dbscope.retry import AttemptFailed
from dbscope.scope import current_scope
from dbscope.where import spell

try:
    import structlog
except ImportError as error:
    raise ImportError(
        'structured logs need structlog 23.1 or newer: pip install "dbscope[structlog]"', name=error.name
    ) from error

__all__ = ["Logs", "add_scope"]


def add_scope(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor for `structlog.configure()`: the current scope's name as `scope`, unless the event has one."""
    work = current_scope()
    if work is not None and "scope" not in event:
        event["scope"] = named(work)
    return event


class Logs:
    """Logs what happens in this process, from now on, until `stop()`.

    Args:
        logger: structlog's, or anything with its methods; one named `dbscope` if None is given.
        transactions: log each transaction's end, at the level DEBUG.
        statements: log each statement, without its parameters, at the level DEBUG.

    >>> from structlog.testing import capture_logs
    >>> from dbscope import scope
    >>> logs = Logs()
    >>> with capture_logs() as events, scope("nightly-report"): pass
    >>> events[0]["event"], events[0]["scope"], events[0]["log_level"]
    ('scope ended', 'nightly-report', 'info')
    >>> logs.stop()
    """

    def __init__(self, logger: Any = None, *, transactions: bool = True, statements: bool = False) -> None:
        if logger is not None and not hasattr(logger, "info"):
            raise ConfigurationError(f"logger is what structlog.get_logger() gives, not {logger!r}.")
        self._log = structlog.get_logger("dbscope") if logger is None else logger
        self._stops = [
            observe(self._scope_ended, ScopeEnded),
            observe(self._exhausted, PoolExhausted),
            observe(self._found, Found),
            observe(self._attempt_failed, AttemptFailed),
        ]
        if transactions:
            self._stops.append(observe(self._transaction_ended, TransactionEnded))
        if statements:
            self._stops.append(observe(self._statement_ended, StatementEnded))

    def stop(self) -> None:
        """Log no more. A second call is harmless."""
        for stop in self._stops:
            stop()

    def _scope_ended(self, fact: ScopeEnded) -> None:
        work = fact.scope
        if not is_work(work):
            return
        fields: dict[str, Any] = {"opened": spell(work.place), "seconds": rounded(fact.at - work.since)}
        if fact.error is not None:
            fields["error"] = type(fact.error).__name__
        self._log.info("scope ended", scope=named(work), **fields)

    def _transaction_ended(self, fact: TransactionEnded) -> None:
        tell = self._log.error if fact.outcome == "unknown" else self._log.debug
        tell("transaction ended", **whose(fact), outcome=fact.outcome, seconds=rounded(fact.lasted))

    def _statement_ended(self, fact: StatementEnded) -> None:
        fields = {} if fact.error is None else {"error": type(fact.error).__name__}
        said = " ".join(fact.statement.split())
        self._log.debug("statement ended", **whose(fact), statement=said, seconds=rounded(fact.lasted), **fields)

    def _exhausted(self, fact: PoolExhausted) -> None:
        database = database_of(fact.engine)
        name = fact.engine.url.render_as_string(hide_password=True) if database is None else database.name
        self._log.error("pool exhausted", scope=named(current_scope()), database=name)

    def _found(self, fact: Found) -> None:
        if fact.collected:  # this thread may be in the middle of a line, and has the lock of its file
            elsewhere(lambda: self._tell_found(fact))
        else:
            self._tell_found(fact)

    def _tell_found(self, fact: Found) -> None:
        name = None if fact.database is None else fact.database.name
        self._log.warning("guard found something", guard=fact.guard, database=name, found=fact.message)

    def _attempt_failed(self, fact: AttemptFailed) -> None:
        self._log.warning(
            "attempt failed",
            work=fact.work,
            attempt=fact.attempt,
            conflict=fact.conflict.value,
            pause=rounded(fact.pause),
        )


def whose(fact: Any) -> dict[str, Any]:
    """The fields of what happens to a session."""
    return {"scope": named(fact.scope), "database": None if fact.database is None else fact.database.name}


def rounded(seconds: float) -> float:
    """As a person wants to read it."""
    return round(seconds, 6)
