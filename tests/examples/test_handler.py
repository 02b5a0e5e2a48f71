"""The job handler of the examples, as a process: poisoned jobs, and a database that goes away and returns."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from tests.support import needs
from tests.support.kits import LIMIT
from tests.support.proxy import Proxy
from tests.support.web import wait_for

HANDLER = Path(__file__).parent.parent.parent / "examples" / "handler.py"


class Running:
    """A running handler, seen from outside."""

    def __init__(self, process, log, engine):
        self.process = process
        self.log = log
        self.engine = engine

    def query(self, sql, **values):
        with self.engine.begin() as connection:
            result = connection.execute(text(sql), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    def add(self, *jobs):
        """Insert jobs as another program does."""
        for job in jobs:
            self.query("INSERT INTO jobs (numbers, state, handler, info) VALUES (:numbers, 'new', '', '')", numbers=job)

    def states(self):
        return dict(self.query("SELECT id, state FROM jobs"))

    def totals(self):
        return dict(self.query("SELECT job_id, total FROM results"))

    def said(self, what):
        return what in self.log.read_text()


@contextlib.contextmanager
def handler(folder, url, outside, *arguments):
    """A handler that has said that it is ready; it ends by SIGTERM, and well."""
    log = folder / "log"
    command = [sys.executable, "-W", "error", str(HANDLER), "--database-url", url, "--interval", "0.02", *arguments]
    engine = create_engine(outside, poolclass=NullPool)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        wait_for(lambda: "ready" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield Running(process, log, engine)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0, log.read_text()
        assert "ended after" in log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_poisoned_job_is_set_aside_and_the_others_are_done(tmp_path):
    """It is tried three times; what it had written each time is gone."""
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    with handler(tmp_path, url, url, "--add", "[1, 2]", "not JSON", "[3, 4]") as running:
        wait_for(lambda: running.states() == {1: "ok", 2: "error", 3: "ok"})
        assert running.totals() == {1: 3, 3: 7}
        assert running.log.read_text().count("job 2 failed, and will be tried again") == 2
        running.add("[5]")
        wait_for(lambda: running.totals() == {1: 3, 3: 7, 4: 5})


def test_a_handler_takes_on_what_the_one_before_it_left(tmp_path):
    """Jobs that were queued by a process that was killed."""
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    with handler(tmp_path, url, url):
        pass
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO jobs (numbers, state, handler, info) VALUES ('[9]', 'queued', 'handler', '')")
        )
    with handler(tmp_path, url, url) as running:
        wait_for(lambda: running.totals() == {1: 9})


@pytest.mark.parametrize("how", ["the connections are ended", "the server cannot be reached"])
def test_statements_24_and_25_the_database_goes_away_and_returns(postgres, postgres_database, tmp_path, how):
    """Passes fail meanwhile, and say so; the first one that finds it works, and no job is lost or done twice."""
    needs.module("psycopg", extra="postgresql")
    outside = make_url(postgres.url(database=postgres_database))
    with Proxy(outside.port) as proxy:
        url = outside.set(port=proxy.port).update_query_dict({"application_name": "handler"})
        with handler(tmp_path, url.render_as_string(hide_password=False), outside, "--add", "[1]", "{") as running:
            wait_for(lambda: running.totals() == {1: 1})
            for round in range(1, 4):
                proxy.away = how == "the server cannot be reached"
                running.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'handler'"
                )
                running.add(f"[{round}]")
                if proxy.away:
                    failed = running.log.read_text().count("the database is away")
                    wait_for(lambda n=failed: running.log.read_text().count("the database is away") > n + 1)
                    assert "new" in running.states().values()
                    proxy.away = False
                wait_for(lambda n=round: len(running.totals()) == n + 1)
            assert running.totals() == {1: 1, 3: 1, 4: 2, 5: 3}
            wait_for(lambda: running.states() == {1: "ok", 2: "error", 3: "ok", 4: "ok", 5: "ok"})
