"""`dbscope top`, as a user runs it: against real processes, in a pipe and on a terminal."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from dbscope.cli import main
from dbscope.cli.top import command
from tests.support import needs
from tests.support.monitored import environment, process, short_folder, top
from tests.support.web import wait_for

SHOP = """
import os, sys, threading
from sqlalchemy import text
from dbscope import Database, scope
db = Database(os.environ["TEST_URL"], name="shop", pool_size=3, max_overflow=0)
held = threading.Barrier(3)

def work(name, statement):
    with scope(name), db.transaction() as session:
        session.execute(text(statement), {"id": 17})
        held.wait()
        over.wait()

over = threading.Event()
for name in ("GET /orders", "nightly-report"):
    threading.Thread(target=work, args=(name, "SELECT :id -- " + name), daemon=True).start()
held.wait()
print("ready", flush=True)
sys.stdin.read()
over.set()
"""
SQLITE = SHOP.replace(", db.transaction() as session:", ":\n        session = db.session")  # which has one writer
TIMES = ("backend_start", "xact_start", "query_start", "state_change")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the processes of this test answer."""
    with short_folder() as made:
        yield made


@pytest.fixture
def shop(folder: Path, postgres_url: str) -> Iterator["subprocess.Popen[str]"]:
    """A process with two transactions on PostgreSQL."""
    with process(SHOP, folder, TEST_URL=postgres_url) as running:
        answering(folder, 1)
        yield running


def answering(folder: Path, count: int) -> None:
    """Wait until so many processes answer."""
    wait_for(lambda: len(list((folder / "dbscope").glob("*.sock"))) == count)


def told(folder: Path, *arguments: str, **more: str) -> dict[str, Any]:
    """What is printed as JSON."""
    done = top(folder, "--json", *arguments, **more)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def mine(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The connections of processes that answer."""
    return [row for row in said["connections"] if row["process"] is not None]


def test_statement_33_states_and_times_next_to_the_work(
    folder: Path, shop: "subprocess.Popen[str]", postgres_url: str
) -> None:
    """Each connection's state, backend_start, xact_start, query_start, state_change and statement, as the server says
    at this moment, beside its process's scope, line and age; joined by the number of the server's process."""
    said = told(folder, "--url", postgres_url)
    rows = {row["scope"]: row for row in mine(said)}
    assert set(rows) == {"GET /orders", "nightly-report"}
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        server = {
            row.pid: row for row in connection.execute(text("SELECT * FROM pg_stat_activity WHERE datname IS NOT NULL"))
        }
    engine.dispose()
    for scope, row in rows.items():
        theirs = server[row["backend"]]
        assert row["state"] == row["state_of_server"] == theirs.state == "idle in transaction"
        assert [row[name] for name in TIMES] == [getattr(theirs, name).isoformat() for name in TIMES]
        assert (row["process"], row["line"], row["opened"]) == (shop.pid, "<string>:10", "<string>:9")
        assert row["statement"].endswith(f"-- {scope}")
        assert row["age"] >= 0
    assert said["pools"][0] | {"out": 2, "most": 3, "dialect": "postgresql"} == said["pools"][0]


def test_statement_33_the_three_states(folder: Path, postgres_url: str) -> None:
    """Active while a statement runs; idle in transaction behind it; idle where none was begun."""
    program = """
import os, sys, threading
from sqlalchemy import text
from dbscope import Database, scope
db = Database(os.environ["TEST_URL"], name="shop")

def run():
    with scope("active"):
        db.session.execute(text("SELECT pg_sleep(60)"))

threading.Thread(target=run, daemon=True).start()
with scope("idle in transaction"), db.transaction() as session, db.reader(autocommit=True) as reader:
    session.execute(text("SELECT 1"))
    reader.execute(text("SELECT 2"))
    print("ready", flush=True)
    sys.stdin.read()
os._exit(0)
"""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with process(program, folder, TEST_URL=postgres_url), engine.connect() as connection:
        sleeping = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)' AND state = 'active'")
        wait_for(lambda: connection.scalar(sleeping) == 1)
        answering(folder, 1)
        rows = mine(told(folder, "--url", postgres_url))
    engine.dispose()
    assert {row["statement"]: row["state_of_server"] for row in rows} == {
        "SELECT pg_sleep(60)": "active",
        "SELECT 1": "idle in transaction",
        "SELECT 2": "idle",
    }
    assert all(row["state"] == row["state_of_server"] for row in rows)


def test_others_are_shown_and_who_blocks_whom(folder: Path, shop: "subprocess.Popen[str]", postgres_url: str) -> None:
    """Connections of others have their user, application and statement, without the values in it unless asked."""
    engine = create_engine(postgres_url, connect_args={"application_name": "psql"})
    with engine.connect() as connection:
        connection.execute(text("SELECT 'swordfish', 42 AS n1"))
        said = told(folder, "--url", postgres_url)
        (other,) = [row for row in said["connections"] if row["process"] is None]
        assert (other["application"], other["user"], other["statement"]) == ("psql", "postgres", "SELECT ?, ? AS n1")
        assert "swordfish" not in json.dumps(said)
        assert "swordfish" in json.dumps(told(folder, "--url", postgres_url, "--literals"))
        assert len(mine(said)) == len(told(folder, "--url", postgres_url, "--mine")["connections"]) == 2
    engine.dispose()


def test_who_waits_for_whom(folder: Path, postgres_url: str) -> None:
    """A statement that waits for a lock names the server's process that holds it."""
    program = """
import os, sys, threading
from sqlalchemy import text
from dbscope import Database, scope
db = Database(os.environ["TEST_URL"], name="shop")
LOCK = text("SELECT pg_advisory_xact_lock(1)")

def wait():
    with scope("the waiter"), db.transaction() as session:
        session.execute(LOCK)

with scope("the holder"), db.transaction() as session:
    session.execute(LOCK)
    threading.Thread(target=wait, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
os._exit(0)
"""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with process(program, folder, TEST_URL=postgres_url), engine.connect() as connection:
        wait_for(lambda: connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")) == 1)
        answering(folder, 1)
        rows = {row["scope"]: row for row in mine(told(folder, "--url", postgres_url))}
        assert rows["the waiter"]["blocked_by"] == [rows["the holder"]["backend"]]
        done = top(folder, "--url", postgres_url)
        assert f"active, blocked by {rows['the holder']['backend']}" in done.stdout
    engine.dispose()


def test_sqlite_is_told_by_the_process_alone(folder: Path, tmp_path: Path) -> None:
    """Who holds what, since when, from which line; there is no server to ask."""
    with process(SQLITE, folder, TEST_URL=f"sqlite:///{tmp_path / 'shop.db'}"):
        answering(folder, 1)
        said = told(folder)
        done = top(folder)
    assert {row["scope"] for row in said["connections"]} == {"GET /orders", "nightly-report"}
    assert {row["state_of_server"] for row in said["connections"]} == {None}
    assert (said["server"], said["pools"][0]["dialect"]) == (None, "sqlite")
    assert done.returncode == 0
    assert "nightly-report" in done.stdout


def test_a_pipe_gets_plain_lines(folder: Path, shop: "subprocess.Popen[str]", postgres_url: str) -> None:
    """Columns that do not depend on a terminal, nothing cut off, no colours; sorted and filtered as asked."""
    done = top(folder, "--url", postgres_url, "--match", "NIGHTLY", COLUMNS="40", TERM="xterm", FORCE_COLOR="1")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].split() == ["POOL", "PROCESS", "OUT", "OF"]
    assert lines[1].split() == ["shop", str(shop.pid), "-c", "2", "3"]
    head, row = lines[3:]
    assert head.split() == [
        *("AGE", "STATE", "PROCESS", "BACKEND", "BACKEND_START", "XACT_START", "QUERY_START", "STATE_CHANGE"),
        *("SCOPE", "LINE", "STATEMENT"),
    ]
    assert "idle in transaction" in row
    assert "<string>:10" in row
    assert row.endswith("-- nightly-report")
    assert "\033" not in done.stdout
    assert "nothing of what was asked for is held; others: 2" in top(folder, "--match", "luck").stdout
    by_scope = [row["scope"] for row in mine(told(folder, "--sort", "scope"))]
    assert by_scope == ["GET /orders", "nightly-report"]


def test_database_url_is_used_if_it_is_a_postgresql(
    folder: Path, shop: "subprocess.Popen[str]", postgres_url: str
) -> None:
    """It is what applications have; `--no-server` asks none."""
    assert told(folder, DATABASE_URL=postgres_url)["server"]
    assert told(folder, "--no-server", DATABASE_URL=postgres_url)["server"] is None
    for other in ("sqlite:///x.db", "no url: swordfish", ""):
        assert told(folder, DATABASE_URL=other)["server"] is None


def test_nobody_answers(folder: Path) -> None:
    """Status 1, what may be the reason, and where was looked."""
    done = top(folder)
    assert f"Looked in {folder / 'dbscope'}." in done.stderr
    assert (done.returncode, done.stdout) == (1, "")
    assert "no process answers" in done.stderr
    assert "DBSCOPE_MONITOR" in done.stderr
    done = top(folder, "--json")
    assert (done.returncode, json.loads(done.stdout)["connections"]) == (1, [])


def test_a_server_that_is_out_of_reach(folder: Path, shop: "subprocess.Popen[str]") -> None:
    """The processes' own view is shown, and status 1 says that something was missing; no password is printed."""
    needs.module("psycopg", extra="postgresql")
    done = top(folder, "--url", "postgresql://app:swordfish@127.0.0.1:1/shop")
    assert done.returncode == 1
    assert "nightly-report" in done.stdout
    assert done.stderr.startswith("dbscope top: PostgreSQL at 127.0.0.1: ")
    assert "swordfish" not in done.stderr


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--url", "app:swordfish"], "this is not a database URL"),
        (["--url", "postgresql://app:o@swordfish@h/shop"], "as '%40'"),
        (["--url", "sqlite:///x.db"], "sqlite has no pg_stat_activity"),
        (["--interval", "0"], "'0' is not a number of seconds"),
        (["--sort", "luck"], "held"),
        (["--no-server", "--url", "postgresql://h/d"], "not allowed with"),
    ],
)
def test_bad_usage_is_explained(given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and one message without a password."""
    with pytest.raises(SystemExit) as ended:
        main(["top", *given])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert "swordfish" not in said.err + said.out


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown, who answers, keys, commands to copy, exit statuses: in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["top", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("--url postgresql://", "DBSCOPE_MONITOR", "keys:", "exit status", "NO_COLOR", "--json | jq"):
        assert word in shown


def test_once_and_json_need_no_extra(folder: Path, tmp_path: Path) -> None:
    """What scripts use runs on the standard library and SQLAlchemy."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'psycopg', 'psycopg2')))\n"
        "from dbscope.cli import main; sys.exit(main(['top', '--once']))"
    )
    with process(
        SQLITE,
        folder,
        TEST_URL=f"sqlite:///{tmp_path / 'shop.db'}",
    ):
        answering(folder, 1)
        done = subprocess.run([sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "GET /orders" in done.stdout


# -- on a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """`dbscope top` on a terminal of 120 columns and 30 lines."""

    def __init__(self, folder: Path, *arguments: str, **more: str) -> None:
        needs.module("rich", extra="top")
        self.ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 120, 0, 0))
        self.before = termios.tcgetattr(self._theirs)
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "dbscope", "top", *arguments],
            env=environment(folder, TERM="xterm-256color", **more),
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
        )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self._theirs)

    def type(self, keys: str) -> None:
        """Type, and forget what was shown before."""
        self.output = ""
        os.write(self.ours, keys.encode())

    def shows(self, *words: str) -> None:
        """Wait until all of this was shown."""
        try:
            wait_for(lambda: self._read() and all(word in self.output for word in words))
        except AssertionError as error:
            error.add_note(f"waited for {words}; shown last:\n{self.output[-6000:]}")
            raise

    def ended(self) -> int:
        """The exit status; the terminal is as it was before."""
        wait_for(lambda: self._read() and self.process.poll() is not None)
        assert termios.tcgetattr(self._theirs) == self.before
        return self.process.returncode

    def _read(self) -> bool:
        while select.select([self.ours], [], [], 0)[0]:
            self.output += os.read(self.ours, 65536).decode(errors="replace")
        return True


def test_a_terminal_gets_a_live_view(folder: Path, shop: "subprocess.Popen[str]", postgres_url: str) -> None:
    """Who holds the pool, with the server's times; keys choose, filter and end it; it goes on by itself."""
    with Terminal(folder, "--url", postgres_url, "--interval", "0.1") as terminal:
        terminal.shows("2 of 3 out", "GET /orders", "nightly-report", "idle in trans.", "xact_start")
        assert "\033[3" in terminal.output
        terminal.type("/nightly\r")
        terminal.shows("with 'nightly'")
        terminal.type("\r")
        terminal.shows("taken at", "<string>:10", "backend_start", str(shop.pid))
        terminal.type("\x1b")
        terminal.type("\x1b")
        terminal.type("?")
        terminal.shows("show all about it")
        terminal.type("x")
        with process(SHOP, folder, TEST_URL=postgres_url):
            terminal.shows("2 processes")
        terminal.shows("1 process,")
        terminal.type(" ")
        terminal.shows("stopped: space goes on")
        terminal.type("q")
        assert terminal.ended() == 0


def test_no_color_and_ctrl_c(folder: Path, shop: "subprocess.Popen[str]") -> None:
    """NO_COLOR turns colours off; ctrl-C ends it with 130, and the terminal is as it was."""
    with Terminal(folder, NO_COLOR="1") as terminal:
        terminal.shows("GET /orders")
        assert not re.search(r"\033\[(\d;)*3\d", terminal.output)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.output


def test_a_terminal_without_rich_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, and the command that installs it, and the one that needs none."""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "dbscope.cli.top.live", raising=False)
    monkeypatch.delattr("dbscope.cli.top.live", raising=False)  # where another test has imported it
    monkeypatch.setattr(command, "_can_move", lambda environ: True)
    with pytest.raises(SystemExit) as ended:
        main(["top", "--no-server"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert 'pip install "dbscope[top]"' in said
    assert "dbscope top --once" in said
