"""FAILURES 15 under gunicorn --preload: the application connects before its workers are forked; they share nothing."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from tests.support import needs
from tests.support.gevented import ROOT
from tests.support.web import fetch, wait_for

pytestmark = pytest.mark.programs

needs.package("gunicorn")

APP = """
import json, os
from sqlalchemy import text
from dbscope import Database, current_scope
from dbscope.integrations.wsgi import ScopeMiddleware

db = Database(os.environ["DATABASE_URL"], pool_size=2, max_overflow=0)
BACKEND = text("SELECT pg_backend_pid()")
with db.transaction() as session:
    session.execute(text("CREATE TABLE IF NOT EXISTS orders (id serial PRIMARY KEY, backend int)"))
parents = [db.session.scalar(BACKEND)]  # in a transaction that stays open
with db.transaction(new=True) as session:
    parents.append(session.scalar(BACKEND))  # and goes back to the pool

def shop(environ, start_response):
    mine = db.session.scalar(BACKEND)
    db.session.execute(text("INSERT INTO orders (backend) VALUES (:mine)"), {"mine": mine})
    db.session.execute(text("SELECT pg_sleep(0.005)"))
    assert db.session.scalar(BACKEND) == mine
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"pid": os.getpid(), "backend": mine, "parents": parents}).encode()]

app = ScopeMiddleware(shop, commit="on-success")
"""
PATCHED = "from gevent import monkey; monkey.patch_all()\n"


@contextlib.contextmanager
def gunicorn(folder, url, worker, config=""):
    """gunicorn with two preloaded workers; gives its process, its port and the lines of its log."""
    (folder / "shop.py").write_text(APP)
    (folder / "gunicorn.conf.py").write_text(config)
    log = folder / "log"
    command = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--worker-class", worker, "--threads", "3"),
        *("--bind", "127.0.0.1:0", "--graceful-timeout", "2", "--no-control-socket", "shop:app"),
    ]
    environ = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": str(ROOT)}
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=sink, stderr=sink)
    listening = re.compile(r"Listening at: http://127.0.0.1:(\d+)")
    try:
        wait_for(lambda: bool(listening.search(log.read_text())) or process.poll() is not None)
        found = listening.search(log.read_text())
        assert found, log.read_text()
        yield process, int(found[1]), log
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()


def ask(port):
    """The answer to one request."""
    status, body = fetch(port, "/", method="POST")
    assert status == 200, body
    return json.loads(body)


def answers_of_both(port, before=frozenset()):
    """The answers to requests that come at the same time, until both workers have served some.

    Args:
        port: of the server.
        before: the workers that are being replaced, which may still answer, and hang up on a request at their end.
    """
    found = []

    def one(_):
        with contextlib.suppress(ConnectionError) if before else contextlib.nullcontext():
            found.append(ask(port))

    def both():
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(one, range(24)))
        return len({answer["pid"] for answer in found} - before) == 2

    wait_for(both)
    return found


@pytest.mark.postgres
@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_failures_15_gunicorn_preload(worker, sync_server_kit, tmp_path):
    """No worker is served on the parent's connections, or on another worker's; every request is committed; and when
    the workers are replaced the parent's own transaction is still open: nobody spoke on its connection."""
    if worker == "gevent":
        needs.package("gevent")
    url = sync_server_kit.url.render_as_string(hide_password=False)
    with gunicorn(tmp_path, url, worker, PATCHED if worker == "gevent" else "") as (process, port, log):
        answers = answers_of_both(port)
        first = {answer["pid"] for answer in answers}
        process.send_signal(signal.SIGHUP)  # which forks new workers from the same parent
        answers += answers_of_both(port, first)
        [parents] = {tuple(answer["parents"]) for answer in answers}
        served = {}
        for answer in answers:
            served.setdefault(answer["backend"], set()).add(answer["pid"])
        assert set(parents).isdisjoint(served)
        assert all(len(pids) == 1 for pids in served.values())
        with sync_server_kit.outside.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM orders")) >= len(answers)
            states = connection.execute(
                text("SELECT state FROM pg_stat_activity WHERE pid = ANY(:pids) ORDER BY state"),
                {"pids": list(parents)},
            )
            assert states.scalars().all() == ["idle", "idle in transaction"]
        assert "Traceback" not in log.read_text()


@pytest.mark.postgres
def test_failures_36_gunicorn_preload_that_patches_too_late(sync_server_kit, tmp_path):
    """gevent's workers patch after the application is loaded: with --preload that is too late, and the log says so, and
    where to patch."""
    needs.package("gevent")
    url = sync_server_kit.url.render_as_string(hide_password=False)
    with gunicorn(tmp_path, url, "gevent") as (_, port, log):
        assert fetch(port, "/")[0] == 500
        wait_for(lambda: "ConfigurationError: threads were turned into greenlets after" in log.read_text())
        assert "gunicorn.conf.py" in log.read_text()
