"""Structured logs: the events that structlog's own machinery gets, of real work."""

import gc
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError
from sqlalchemy.orm.exc import StaleDataError

from dbscope import ConfigurationError, Database, Retry, scope
from dbscope.events import ScopeEnded, StatementEnded
from tests.support import needs
from tests.support.kits import LIMIT, Kit, twice
from tests.support.web import wait_for

structlog: Any = needs.module("structlog", extra="structlog")

from dbscope.integrations.structlog import Logs, add_scope  # noqa: E402 - after the gate


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """What is logged while the test runs."""
    with structlog.testing.capture_logs() as events:
        logs = Logs(statements=True)
        yield events
        logs.stop()


def test_what_the_garbage_collector_finds_is_logged_in_another_thread(sync_kit):
    """It may run in the middle of a line: the thread, which has the lock of its file, would wait for itself."""
    threads = []

    class Logger:
        def info(self, event, **fields): ...

        debug = info

        def warning(self, event, **fields):
            threads.append(threading.get_ident())

    logs = Logs(Logger())
    sync_kit.db.new_session().scalar(text("SELECT 1"))
    gc.collect()
    wait_for(lambda: bool(threads))
    logs.stop()
    assert threading.get_ident() not in threads


@twice
async def test_what_happens_is_logged_with_fields(kit: Kit, logged: list[Any]) -> None:
    """Scopes at INFO, transactions and statements at DEBUG: scope, database, outcome, seconds, error; no parameters."""
    with pytest.raises(ZeroDivisionError):
        async with kit.scope("payment"):
            async with kit.transaction() as session:
                insert = text("INSERT INTO payments (amount) VALUES (:amount)")
                await kit.done(session.execute(insert, {"amount": 4711}))
            raise ZeroDivisionError
    told = [(event["event"], event["log_level"], event["scope"]) for event in logged]
    assert told == [
        ("statement ended", "debug", "payment"),
        ("transaction ended", "debug", "payment"),
        ("scope ended", "info", "payment"),
    ]
    statement, transaction, ended = logged
    assert statement["statement"].startswith("INSERT INTO payments")
    assert "4711" not in str(statement)
    assert (transaction["outcome"], transaction["database"]) == ("commit", kit.db.name)
    assert (ended["error"], ended["seconds"] > 0) == ("ZeroDivisionError", True)
    assert re.search(r"\.py:\d+$", ended["opened"])


def test_findings_and_exhausted_pools_stand_out(tmp_path, logged):
    """At WARNING and ERROR; the finding names the holder."""
    options: Any = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    with Database(f"sqlite:///{tmp_path / 'shop.db'}", name="shop", **options) as db:
        with scope("holder"), ThreadPoolExecutor(1) as threads:
            db.session.scalar(text("SELECT 1"))
            with pytest.raises(TimeoutError):
                threads.submit(scope("waiter")(lambda: db.session.scalar(text("SELECT 1")))).result(LIMIT)
    found = next(event for event in logged if event["event"] == "guard found something")
    assert (found["guard"], found["log_level"], found["database"]) == ("pool_exhausted", "warning", "shop")
    assert "scope 'holder'" in found["found"]
    exhausted = next(event for event in logged if event["event"] == "pool exhausted")
    assert (exhausted["log_level"], exhausted["database"], exhausted["scope"]) == ("error", "shop", "waiter")


def test_attempts_that_are_repeated_are_logged(sync_kit, logged):
    """With the conflict."""
    attempts = []

    @sync_kit.db.transactional(retry=Retry(2, first=0, stale_data=True))
    def work() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise StaleDataError("0 were matched")

    work()
    (failed,) = [event for event in logged if event["event"] == "attempt failed"]
    assert (failed["attempt"], failed["log_level"]) == (1, "warning")
    assert failed["work"].endswith("work()")


def test_the_scopes_name_is_in_the_applications_own_events():
    """Once the processor is among structlog's, down to the JSON line."""
    output = io.StringIO()
    log = structlog.wrap_logger(
        structlog.PrintLogger(output), processors=[add_scope, structlog.processors.JSONRenderer()]
    )
    with scope("GET /orders/{id}"):
        log.info("paid", cents=500)
        log.info("moved", scope="my own")
    log.info("outside")
    assert [json.loads(line) for line in output.getvalue().splitlines()] == [
        {"cents": 500, "event": "paid", "scope": "GET /orders/{id}"},
        {"event": "moved", "scope": "my own"},
        {"event": "outside"},
    ]


def test_a_logger_of_the_users_is_used():
    """And what is none is refused."""
    with structlog.testing.capture_logs() as events:
        logs = Logs(structlog.get_logger().bind(service="shop"))
        with scope("work"):
            pass
        logs.stop()
    assert [(event["service"], event["event"]) for event in events] == [("shop", "scope ended")]
    with pytest.raises(ConfigurationError, match=r"structlog\.get_logger"):
        Logs(logger="shop")


def test_a_threads_own_scope_is_no_work(sync_kit, logged):
    """Its end is the thread's, and is not logged; what is done in it is."""

    def work() -> None:
        sync_kit.db.session.scalar(text("SELECT 1"))
        sync_kit.db.session.remove()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT)
    gc.collect()
    assert [event["event"] for event in logged] == ["statement ended", "transaction ended"]


def test_only_what_is_asked_for_is_observed():
    """And nothing after `stop()`."""
    before = len(ScopeEnded.observers), len(StatementEnded.observers)
    logs = Logs(transactions=False)
    assert (len(ScopeEnded.observers), len(StatementEnded.observers)) == (before[0] + 1, before[1])
    logs.stop()
    logs.stop()
    assert (len(ScopeEnded.observers), len(StatementEnded.observers)) == before
