"""Workers that are forked from an application that is loaded already, and engines that are only watched."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbscope.monitor import client
from tests.support import needs
from tests.support.monitored import environment, process, short_folder
from tests.support.web import fetch, wait_for

APP = """
import os
from sqlalchemy import text
from dbscope import Database
from dbscope.integrations.wsgi import ScopeMiddleware

db = Database(os.environ["TEST_URL"], name="shop")
db.session.scalar(text("SELECT 1"))  # in the parent, which has a socket from here on

def shop(environ, start_response):
    db.session.scalar(text("SELECT 2"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]

app = ScopeMiddleware(shop)
"""


@pytest.mark.parametrize("worker", ["sync", "gevent"])
def test_preloaded_workers_have_sockets_of_their_own(worker: str, tmp_path: Path) -> None:
    """Each answers for itself once it has served a request, and the parent for what it holds; all are gone with them,
    and nothing is in the log."""
    needs.package("gunicorn")
    if worker == "gevent":
        needs.package("gevent")
    (tmp_path / "shop.py").write_text(APP)
    patched = "from gevent import monkey; monkey.patch_all()\n" if worker == "gevent" else ""
    (tmp_path / "gunicorn.conf.py").write_text(patched)
    log = tmp_path / "log"
    command = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--worker-class", worker),
        *("--bind", "127.0.0.1:0", "--graceful-timeout", "2", "--no-control-socket", "shop:app"),
    ]
    with short_folder() as folder, log.open("w") as sink:
        environ = environment(folder, TEST_URL=f"sqlite:///{tmp_path / 'shop.db'}")
        running = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=sink, stderr=sink)
        sockets = folder / "dbscope"
        try:
            listening = re.compile(r"Listening at: http://127.0.0.1:(\d+)")
            wait_for(lambda: bool(listening.search(log.read_text())) or running.poll() is not None)
            found = listening.search(log.read_text())
            assert found, log.read_text()
            served: set[int] = set()

            def both_have_served() -> bool:
                served.add(int(fetch(int(found[1]), "/")[1]))
                return len(served) == 2

            wait_for(both_have_served)
            wait_for(lambda: len(list(sockets.glob("*.sock"))) == 3)
            answers = {answer.process: answer for answer in client.ask_all(sockets.glob("*.sock"))}
        finally:
            running.terminate()
            assert running.wait(30) == 0, log.read_text()
        assert set(answers) == served | {running.pid}
        assert [held.statement for held in answers[running.pid].holdings] == ["SELECT 1"]
        assert all(not answers[pid].holdings and not answers[pid].problem for pid in served)
        assert list(sockets.iterdir()) == []
        assert "Traceback" not in log.read_text()


def test_an_engine_that_is_only_watched_is_answered_for() -> None:
    """`dbscope.watch(engine)` is enough: sessions of SQLAlchemy's own are listed by their line."""
    program = """
import sys
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from dbscope import watch
engine = create_engine("sqlite://")
watching = watch(engine)
with Session(engine) as session:
    session.execute(text("SELECT 1"))
    print("ready", flush=True)
    sys.stdin.read()
"""
    with short_folder() as folder, process(program, folder) as running:
        sockets = folder / "dbscope"
        wait_for(lambda: len(list(sockets.glob("*.sock"))) == 1)
        (answer,) = client.ask_all(sockets.glob("*.sock"))
        assert answer.process == running.pid
        (held,) = answer.holdings
        assert (held.scope, held.taken) == (None, "<string>:9")
