"""The demo as a user runs it: `python -m dbscope demo`, in a process of its own."""

import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import OperationalError

import dbscope
from tests.support import needs

DEMO = [sys.executable, "-m", "dbscope", "demo"]
SHORT = ["--requests", "1"]  # each mistake is made once, through each door, in any case


@pytest.fixture(autouse=True)
def extras():
    """What the demo needs beside dbscope."""
    for name in ("httpx", "rich", "uvicorn", "waitress"):
        needs.module(name, extra="demo")
    needs.module("greenlet", extra="async")
    needs.module("aiosqlite", extra="aiosqlite")


@pytest.fixture
def env(tmp_path):
    """Its files go into a folder that can be looked at afterwards."""
    return os.environ | {"TMPDIR": str(tmp_path), "COLUMNS": "80", "TERM": "xterm"}


def demo(*arguments: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run it to its end."""
    return subprocess.run([*DEMO, *arguments], capture_output=True, text=True, env=env)


def told(done: "subprocess.CompletedProcess[str]") -> dict:
    """What it has printed as JSON."""
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def not_caught(said: dict) -> set[str]:
    """The mistakes that nobody has caught, each with the error that should have."""
    return {f"{mistake['number']} {mistake['by']}" for mistake in said["misbehaviours"] if not mistake["ok"]}


def broken(said: dict) -> set[str]:
    """The promises that do not hold."""
    return {check["promise"] for check in said["checks"] if not check["ok"]}


@pytest.mark.parametrize("driver", ["sqlite", "postgresql+psycopg", "postgresql+asyncpg"])
def test_the_books_hold(driver, env, tmp_path, request):
    """On each database every mistake is made and caught, everything is accounted for, and nothing is left behind."""
    chosen, url = [], None
    if driver != "sqlite":
        needs.module(driver.partition("+")[2], extra=driver.partition("+")[2].replace("psycopg", "postgresql"))
        url = make_url(request.getfixturevalue("postgres_url"))
        chosen = ["--database-url", url.set(drivername=driver).render_as_string(hide_password=False)]
    done = demo("--json", "--requests", "150", *chosen, env=env)
    said = told(done)
    assert (done.returncode, done.stderr, said["ok"]) == (0, "", True), [broken(said), not_caught(said), done.stderr]
    assert len(said["misbehaviours"]) >= 23
    assert {"pool_exhausted", "idle_in_transaction", "begun_by_read", "sync_on_loop"} <= {
        mistake["by"] for mistake in said["misbehaviours"]
    }
    for mistake in said["misbehaviours"]:
        assert 0 < mistake["sent"] == mistake["caught"], mistake
        if mistake["by"] != "IntegrityError":  # of the COMMIT, which no handler calls
            assert re.fullmatch(r"misbehaviour\.py:\d+", mistake["line"]), mistake
        if hasattr(dbscope, mistake["by"]):  # one of ours: it names the handler's line
            assert re.search(r"(misbehaviour|books|doors)\.py:\d+", mistake["example"]), mistake
    counts = said["counts"]
    assert counts["sent"] >= 150
    assert sum(door["answered"] + door["refused"] + door["failed"] for door in counts["doors"]) > 130
    for door in counts["doors"]:
        assert door["answered"] > 20, door
        assert (door["failed"] > 10, door["running"]) == (True, 0), door
    assert all(counts[name] for name in ("commits", "rollbacks", "jobs", "receipts", "scopes_seen", "hung_up")), counts
    assert (counts["scopes"], counts["sessions"], counts["connections"]) == (0, 0, 0)
    assert not list(tmp_path.iterdir())
    if url is not None:
        engine = create_engine(url)
        assert not inspect(engine).get_table_names()
        engine.dispose()


@pytest.mark.parametrize(
    ("protection", "mistakes", "promises"),
    [
        (
            "early-finish",
            {"3 ScopeEndedError", "5 IntegrityError", "40 UncommittedWritesError"},
            {"what was confirmed is saved"},
        ),
        (
            "ownership",
            {"19 NotTheOwnerError"},
            {"payments are booked whole, and once", "what was not confirmed is not saved"},
        ),
        ("overlap", {"7 OverlapError", "27 OverlapError"}, {"what was confirmed is saved"}),
        ("ended-sessions", {"3 ScopeEndedError", "9 ScopeEndedError"}, {"what was not confirmed is not saved"}),
        ("uncommitted", {"40 UncommittedWritesError"}, {"what was confirmed is saved"}),
    ],
)
def test_without_a_protection_the_audit_fails(protection, mistakes, promises, env):
    """Each protection matters: without it some mistakes get through, and the audit says what came of them."""
    done = demo("--json", *SHORT, "--without", protection, env=env)
    said = told(done)
    assert (done.returncode, said["ok"]) == (1, False)
    assert mistakes <= not_caught(said)
    assert len(not_caught(said)) < len(said["misbehaviours"]) / 2
    assert promises <= broken(said)


def test_unprotected_the_bank_loses_money(env):
    """On hand-written thread-local sessions nearly no mistake is named, and money is lost.

    Which of these promises a short run breaks is a matter of luck: threads share sessions as they come.
    """
    done = demo("--json", *SHORT, "--unprotected", env=env)
    said = told(done)
    assert done.returncode == 1
    assert len(not_caught(said)) >= 15
    lost = {
        "payments are booked whole, and once",
        "what was confirmed is saved",
        "what was not confirmed is not saved",
        "what is meant to work works",
    }
    assert len(lost & broken(said)) >= 2


def test_a_lock_does_not_end_the_wait_for_jobs():
    """Without dbscope somebody may hold the lock that a look at the jobs needs; the demo looks again."""
    from dbscope.cli.demo.service import Service  # not before the extras are known to be there

    looks = [OperationalError("SELECT", {}, Exception("database is locked")), 1, 0]

    def waiting():
        look = looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look

    Service(SimpleNamespace(jobs=SimpleNamespace(waiting=waiting, seen=lambda: 0)))._finish_jobs()
    assert not looks


def test_a_lock_does_not_keep_the_audit_from_reading(tmp_path):
    """Without dbscope somebody may hold the write lock to the end; the books can be read all the same."""
    from dbscope.cli.demo import unprotected
    from dbscope.cli.demo.audit import read_books
    from dbscope.cli.demo.bank import Bank
    from dbscope.cli.demo.command import both_urls
    from dbscope.cli.demo.service import Service

    urls = both_urls(f"sqlite:///{tmp_path / 'bank.db'}")
    service = Service(Bank(unprotected.open_doors(urls)))
    with service:
        holder = sqlite3.connect(tmp_path / "bank.db", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        assert read_books(urls[0]).balances
        holder.close()
    service.dispose()


def test_a_pipe_gets_plain_lines(env):
    """What is not a terminal gets the progress and the audit as text, without colours and cursor movements."""
    done = demo(*SHORT, "--seconds", "30", env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "dbscope demo on sqlite, 12 clients"
    assert "dbscope top" in lines[1]
    assert re.search(r"^ +\d+\.\d s: \d+ requests, \d+ commits, ", done.stdout, re.MULTILINE)
    assert re.match(r"The books hold. \d+ requests in ", lines[-1])
    assert "\033" not in done.stdout
    assert all(line == line.rstrip() and len(line) <= 80 for line in lines)


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_a_live_table(no_color, coloured, env):
    """A terminal sees the table change in place, in colours unless NO_COLOR is set, and the audit at the end."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([*DEMO, *SHORT], stdout=theirs, stderr=theirs, env=env | {"NO_COLOR": no_color}) as running:
        os.close(theirs)
        output = b""
        while part := read(ours):
            output += part
    os.close(ours)
    shown = output.decode()
    assert running.returncode == 0, shown
    for word in (
        "connections in use",
        "rollbacks",
        "errors, by name",
        "WSGI, in threads",
        "\033[1A",
        "The books hold.",
    ):
        assert word in shown
    assert bool(re.search(r"\033\[(\d;)*3\d", shown)) is coloured


def read(terminal: int) -> bytes:
    """What the terminal shows next; nothing when the program is through."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""


def test_a_pipe_that_is_closed_ends_it_quietly(env, tmp_path):
    """Where nobody reads on, as after `| head -1`, the demo ends without a traceback, and leaves nothing."""
    with subprocess.Popen(
        [*DEMO, *SHORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as running:
        assert running.stdout.readline().startswith("dbscope demo on sqlite")
        running.stdout.close()
        complaints = running.stderr.read()
    assert (running.returncode, complaints) == (1, "")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_it_cleanly(env, tmp_path):
    """An interrupted demo stops its servers, removes its files, says so, and ends with status 130."""
    with subprocess.Popen(
        [*DEMO, "--seconds", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as running:
        assert running.stdout.readline().startswith("dbscope demo on sqlite")
        running.send_signal(signal.SIGINT)
        _, complaints = running.communicate(timeout=60)
    assert (running.returncode, complaints) == (130, "dbscope demo: interrupted\n")
    assert not list(tmp_path.iterdir())
