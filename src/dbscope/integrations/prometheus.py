"""Metrics for Prometheus: pools, scopes, transactions by outcome, how long they take, what the guards find.

No label has a value that users make up as they go: a database's name, an outcome, a guard. The names of scopes, which
may have ids in them, are in none.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakSet

from dbscope.errors import ConfigurationError
from dbscope.events import (
    ConnectionReturned,
    ConnectionTaken,
    PoolExhausted,
    ScopeEnded,
    ScopeOpened,
    StatementEnded,
    TransactionEnded,
    observe,
)
from dbscope.guards import Found
from dbscope.integrations._facts import database_of, elsewhere
from dbscope.retry import AttemptFailed

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:
    raise ImportError(
        'metrics need prometheus-client 0.20 or newer: pip install "dbscope[prometheus]"', name=error.name
    ) from error

__all__ = ["BUCKETS", "Metrics"]

M = TypeVar("M")

BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)


class Metrics:
    """Counts what happens in this process, from now on, in the metrics of a registry of prometheus_client's.

    Make one when the process starts: each process of a server has its own. `stop()` ends it.

    Args:
        registry: where the metrics are; prometheus_client's own if None is given.
        buckets: of the histograms, in seconds.
        statements: measure each statement, too, which costs each of them some microseconds.

    Raises:
        ConfigurationError: the registry has dbscope's metrics already.

    >>> from prometheus_client import CollectorRegistry
    >>> registry = CollectorRegistry()
    >>> metrics = Metrics(registry)
    >>> from dbscope import scope
    >>> with scope("nightly-report"): registry.get_sample_value("dbscope_scopes_open")
    1.0
    >>> metrics.stop()
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        buckets: Sequence[float] = BUCKETS,
        statements: bool = False,
    ) -> None:
        self._registry = REGISTRY if registry is None else registry
        self._made: list[Any] = []
        self._open: set[int] = set()  # scopes by id, taken out when they end
        self._pools: dict[str, tuple[int, int, int]] = {}  # what was found last, by the database's name
        self._lock = threading.RLock()  # what the garbage collector ends is told in the middle of anything
        _all.add(self)
        try:
            self._make(tuple(buckets), statements)
        except ValueError as error:
            self._unregister()
            if "Duplicated" not in str(error):
                raise ConfigurationError(f"prometheus_client refuses the metrics: {error}") from error
            raise ConfigurationError(
                "the registry has dbscope's metrics already: make one Metrics for the process, or give each a registry."
            ) from error
        self._stops = [
            observe(self._scope_opened, ScopeOpened),
            observe(self._scope_ended, ScopeEnded),
            observe(self._taken, ConnectionTaken),
            observe(self._returned, ConnectionReturned),
            observe(self._over, TransactionEnded),
            observe(self._exhausted, PoolExhausted),
            observe(self._found, Found),
            observe(self._attempt_failed, AttemptFailed),
        ]
        if statements:
            self._stops.append(observe(self._statement_ended, StatementEnded))

    def stop(self) -> None:
        """Count no more, and take the metrics out of their registry. A second call is harmless."""
        for stop in self._stops:
            stop()
        self._unregister()

    def after_fork(self) -> None:
        """In the child: another thread of the parent's may have had the lock; the scopes that are open are its."""
        self._lock = threading.RLock()
        self._open.clear()

    # -- the metrics -------------------------------------------------------------------------------------------------

    def _make(self, buckets: tuple[float, ...], statements: bool) -> None:
        of_database = ["database"]

        def counter(name: str, help: str, labels: Sequence[str] = ()) -> Counter:
            return self._keep(Counter(f"dbscope_{name}", help, labels, registry=self._registry))

        def gauge(name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
            made = Gauge(f"dbscope_{name}", help, labels, registry=self._registry, multiprocess_mode="livesum")
            return self._keep(made)

        def histogram(name: str, help: str, labels: Sequence[str] = ()) -> Histogram:
            return self._keep(Histogram(f"dbscope_{name}", help, labels, registry=self._registry, buckets=buckets))

        self.scopes_open = gauge("scopes_open", "Scopes that are open")
        self.scopes = counter("scopes", "Scopes that have ended", ["result"])
        self.scope_seconds = histogram("scope_seconds", "How long scopes were open")
        self.checked_out = gauge("pool_checked_out", "Connections in use", of_database)
        self.pool_size = gauge("pool_size", "Connections that the pool keeps", of_database)
        self.overflow = gauge("pool_overflow", "Connections beyond the pool's size", of_database)
        self.exhausted = counter("pool_exhausted", "Waits for a connection that ended in vain", of_database)
        self.held_seconds = histogram("connection_held_seconds", "How long sessions held connections", of_database)
        self.transactions = counter("transactions", "Transactions that have ended", ["database", "outcome"])
        self.transaction_seconds = histogram("transaction_seconds", "How long transactions were open", of_database)
        self.findings = counter("findings", "What guards have found", ["guard"])
        self.attempts_failed = counter("attempts_failed", "Attempts that met a conflict", ["conflict"])
        if statements:
            self.statement_seconds = histogram("statement_seconds", "How long statements took", of_database)

    def _keep(self, made: M) -> M:
        self._made.append(made)
        return made

    def _unregister(self) -> None:
        while self._made:
            self._registry.unregister(self._made.pop())

    # -- the facts ---------------------------------------------------------------------------------------------------

    def _scope_opened(self, fact: ScopeOpened) -> None:
        with self._lock:
            self._open.add(id(fact.scope))
            self.scopes_open.set(len(self._open))

    def _scope_ended(self, fact: ScopeEnded) -> None:
        with self._lock:
            if id(fact.scope) not in self._open:
                return  # it was open before; or it is a thread's, which is no work, and is told of at its end alone
            self._open.discard(id(fact.scope))
            self.scopes_open.set(len(self._open))
        self.scopes.labels("ok" if fact.error is None else "error").inc()
        self.scope_seconds.observe(fact.at - fact.scope.since)

    def _taken(self, fact: ConnectionTaken) -> None:
        self._look(fact.database)

    def _returned(self, fact: ConnectionReturned) -> None:
        self._look(fact.database)
        self.held_seconds.labels(label(fact.database)).observe(fact.held)

    def _over(self, fact: TransactionEnded) -> None:
        self.transactions.labels(label(fact.database), fact.outcome).inc()
        self.transaction_seconds.labels(label(fact.database)).observe(fact.lasted)

    def _exhausted(self, fact: PoolExhausted) -> None:
        self.exhausted.labels(label(database_of(fact.engine))).inc()

    def _found(self, fact: Found) -> None:
        if fact.collected:  # this thread may be in the middle of a metric, and has its lock
            elsewhere(lambda: self.findings.labels(fact.guard).inc())
        else:
            self.findings.labels(fact.guard).inc()

    def _attempt_failed(self, fact: AttemptFailed) -> None:
        self.attempts_failed.labels(fact.conflict.value).inc()

    def _statement_ended(self, fact: StatementEnded) -> None:
        self.statement_seconds.labels(label(fact.database)).observe(fact.lasted)

    def _look(self, database: Any) -> None:
        """Note what a database's pools have given out."""
        if database is None or database.apart_for is not None:
            return  # its pool is made for one piece of work, and goes with it
        name = label(database)
        with self._lock:  # so that who comes last has looked last
            pools = [pool for pool in database._pools() if hasattr(pool, "checkedout")]
            sizes = [pool for pool in pools if hasattr(pool, "overflow")]
            found = (
                sum(pool.checkedout() for pool in pools),
                sum(pool.size() for pool in sizes),
                sum(max(pool.overflow(), 0) for pool in sizes),
            )
            before = self._pools.get(name, (None, None, None))
            self._pools[name] = found
            for gauge, now, then in zip((self.checked_out, self.pool_size, self.overflow), found, before, strict=True):
                if now != then:
                    gauge.labels(name).set(now)


_all: "WeakSet[Metrics]" = WeakSet()


def _in_child() -> None:
    for metrics in _all:
        metrics.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def label(database: Any) -> str:
    """A database's name; work apart, which anybody may name, counts as one."""
    if database is None:
        return "watched"
    return "apart" if database.apart_for is not None else str(database.name)
