"""Metrics: what a scrape of prometheus_client's real registry says of real work."""

import gc
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError
from sqlalchemy.orm.exc import StaleDataError

from dbscope import ConfigurationError, Database, Retry, guards, scope
from dbscope.events import PoolExhausted, ScopeEnded, ScopeOpened, StatementEnded
from tests.support import needs
from tests.support.kits import LIMIT, Kit, twice
from tests.support.web import wait_for
from tests.test_fork import fork

prometheus_client: Any = needs.module("prometheus_client", extra="prometheus")

from dbscope.integrations.prometheus import Metrics  # noqa: E402 - after the gate


@pytest.fixture
def registry() -> Any:
    """A registry of the test's own."""
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def metrics(registry: Any) -> Iterator[Metrics]:
    """Metrics in it, while the test runs."""
    made = Metrics(registry)
    yield made
    made.stop()


def value(registry: Any, name: str, **labels: str) -> float | None:
    """What a scrape would say."""
    found: float | None = registry.get_sample_value(f"dbscope_{name}", labels)
    return found


@twice
async def test_scopes_transactions_and_the_pool_are_counted(kit: Kit, registry: Any, metrics: Metrics) -> None:
    """Scopes by result, transactions by outcome, connections as they are now; how long each of them took."""
    name = kit.db.name
    async with kit.scope("first"):
        assert value(registry, "scopes_open") == 1
        assert value(registry, "pool_checked_out", database=name) is None
        async with kit.transaction() as session:
            await kit.done(session.execute(text("INSERT INTO payments (amount) VALUES (1)")))
            assert value(registry, "pool_checked_out", database=name) == 1
    with pytest.raises(ZeroDivisionError):
        async with kit.scope("second"):
            await kit.done(kit.session().scalar(text("SELECT 1")))
            raise ZeroDivisionError
    assert value(registry, "scopes_open") == 0
    assert value(registry, "scopes_total", result="ok") == 1
    assert value(registry, "scopes_total", result="error") == 1
    assert value(registry, "scope_seconds_count") == 2
    assert value(registry, "transactions_total", database=name, outcome="commit") == 1
    assert value(registry, "transactions_total", database=name, outcome="rollback") == 1
    assert value(registry, "transaction_seconds_count", database=name) == 2
    assert value(registry, "connection_held_seconds_count", database=name) == 2
    assert value(registry, "pool_checked_out", database=name) == 0
    assert value(registry, "pool_size", database=name) == 5
    assert value(registry, "pool_overflow", database=name) == 0


@twice
async def test_statements_are_measured_where_that_is_asked_for(kit: Kit, registry: Any) -> None:
    """And observed nowhere else."""
    before = len(StatementEnded.observers)
    plain = Metrics(prometheus_client.CollectorRegistry())
    assert len(StatementEnded.observers) == before
    measuring = Metrics(registry, statements=True)
    try:
        async with kit.scope():
            await kit.done(kit.session().scalar(text("SELECT 1")))
        assert value(registry, "statement_seconds_count", database=kit.db.name) == 1
    finally:
        plain.stop()
        measuring.stop()


def test_overflow_and_an_exhausted_pool_are_seen(tmp_path, registry, metrics):
    """With the guard's finding."""
    options: Any = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 0.05}
    with Database(f"sqlite:///{tmp_path / 'shop.db'}", name="shop", **options) as db:
        with scope("a"), ThreadPoolExecutor(1) as threads:
            db.session.scalar(text("SELECT 1"))
            with scope("b"):
                db.session.scalar(text("SELECT 1"))
                assert value(registry, "pool_checked_out", database="shop") == 2
                assert value(registry, "pool_overflow", database="shop") == 1
                with pytest.raises(TimeoutError):
                    threads.submit(scope("c")(lambda: db.session.scalar(text("SELECT 1")))).result(LIMIT)
    assert value(registry, "pool_exhausted_total", database="shop") == 1
    assert value(registry, "findings_total", guard="pool_exhausted") == 1
    assert value(registry, "pool_overflow", database="shop") == 0


def test_conflicts_that_are_repeated_are_counted(sync_kit, registry, metrics):
    """By their kind."""
    attempts = []

    @sync_kit.db.transactional(retry=Retry(2, first=0, stale_data=True))
    def work() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise StaleDataError("0 were matched")

    work()
    samples = [s for m in registry.collect() for s in m.samples if s.name == "dbscope_attempts_failed_total"]
    assert [(sample.value, sample.labels) for sample in samples] == [(1.0, {"conflict": "stale data"})]


def test_no_label_grows_with_the_work(sync_kit, registry, metrics):
    """A thousand scopes with a thousand names, in work apart with names of its own: no more series than after one."""

    def series(numbers: range) -> int:
        for number in numbers:
            with scope(f"GET /orders/{number}"), sync_kit.db.transaction() as session:
                session.execute(text("SELECT 1"))
            if number % 100 == 0:
                with sync_kit.db.apart(f"back-fill {number}") as apart, apart.transaction() as session:
                    session.execute(text("SELECT 1"))
        return sum(len(metric.samples) for metric in registry.collect())

    guards.configure(long_scope="log")
    assert series(range(1)) == series(range(1, 1000))
    assert b"back-fill" not in prometheus_client.generate_latest(registry)
    assert value(registry, "transactions_total", database="apart", outcome="commit") == 10


def use_in_a_thread(database: Any) -> None:
    """Outside of every scope, and so in the thread's own, which ends with it."""

    def work() -> None:
        database.session.scalar(text("SELECT 1"))
        database.session.remove()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT)
    gc.collect()


def test_a_threads_own_scope_is_no_work(sync_kit, registry, metrics):
    """It lasts as long as the thread does; its transactions count."""
    use_in_a_thread(sync_kit.db)
    assert value(registry, "scopes_open") == 0
    assert value(registry, "scope_seconds_count") == 0
    assert value(registry, "transactions_total", database=sync_kit.db.name, outcome="rollback") == 1


def test_a_scope_that_was_open_before_is_not_counted(registry):
    """Not as one that ended, nor as minus one."""
    with scope("early"):
        made = Metrics(registry)
    assert value(registry, "scopes_open") == 0
    assert value(registry, "scope_seconds_count") == 0
    made.stop()


def test_what_the_garbage_collector_finds_is_counted_in_another_thread(registry, metrics, sync_kit, monkeypatch):
    """It may run in the middle of a metric: the thread, which has its lock, would wait for itself."""
    threads = []
    real = metrics.findings.labels

    def labels(guard):
        threads.append(threading.get_ident())
        return real(guard)

    monkeypatch.setattr(metrics.findings, "labels", labels)
    sync_kit.db.new_session().scalar(text("SELECT 1"))
    gc.collect()
    wait_for(lambda: value(registry, "findings_total", guard="session_dropped") == 1)
    assert threading.get_ident() not in threads


def test_a_child_of_a_fork_counts_its_own_scopes_and_has_a_lock_of_its_own(registry, metrics):
    """Another thread of the parent's may have the lock, which is not in the child to give it back."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with metrics._lock:
            held.set()
            done.wait(LIMIT)

    def child():
        if not metrics._lock.acquire(blocking=False):
            return "locked"
        with scope():
            return value(registry, "scopes_open")

    with scope(), ThreadPoolExecutor(1) as thread:
        thread.submit(hold)
        assert held.wait(LIMIT)
        try:
            assert fork(child) == 1
        finally:
            done.set()


def test_stop_ends_it(registry):
    """Nothing is observed any more, and the registry is free."""
    kinds = (ScopeOpened, ScopeEnded, PoolExhausted)
    before = [len(kind.observers) for kind in kinds]
    made = Metrics(registry)
    assert [len(kind.observers) for kind in kinds] != before
    made.stop()
    made.stop()
    assert [len(kind.observers) for kind in kinds] == before
    assert not list(registry.collect())
    Metrics(registry).stop()


def test_two_in_one_registry_are_refused(registry, metrics):
    """They would count everything twice; the first goes on."""
    with pytest.raises(ConfigurationError, match="has dbscope's metrics already"):
        Metrics(registry)
    with scope():
        assert value(registry, "scopes_open") == 1


def test_bad_buckets_are_refused(registry):
    """With what prometheus_client says, and nothing is left behind."""
    with pytest.raises(ConfigurationError, match="refuses the metrics"):
        Metrics(registry, buckets=[5, 1])
    assert not list(registry.collect())


def test_a_scrape_has_all_of_it(registry, metrics, sync_kit):
    """By HTTP, as Prometheus does."""
    with sync_kit.db.transaction() as session:
        session.execute(text("SELECT 1"))
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=LIMIT) as answer:
            told = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(LIMIT)
    names = set(re.findall(r"^# TYPE dbscope_(\w+)", told, re.MULTILINE))
    assert {"scopes_open", "scope_seconds", "pool_checked_out", "transactions_total", "findings_total"} <= names
    assert 'outcome="commit"} 1.0' in told


PREFORK = """
import os, sys
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from sqlalchemy import text
from dbscope import Database, scope
from dbscope.integrations.prometheus import Metrics
db = Database(f"sqlite:///{sys.argv[2]}", name="shop")
workers = []
for _ in range(2):
    if not (pid := os.fork()):
        Metrics()
        with db.transaction() as session:
            session.execute(text("SELECT 1"))
        os._exit(0)
    workers.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in workers)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(registry.get_sample_value("dbscope_transactions_total", {"database": "shop", "outcome": "commit"}))
print(registry.get_sample_value("dbscope_pool_checked_out", {"database": "shop"}))
"""


def test_processes_of_one_server_add_up(tmp_path):
    """In prometheus_client's multiprocess mode, as under gunicorn."""
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    command = [sys.executable, "-c", PREFORK, str(metrics), str(tmp_path / "shop.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.stdout.split(), done.stderr) == (["2.0", "0.0"], "")
