"""The command line: what it refuses, what it teaches, and what it says where something is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbscope.cli import main
from dbscope.cli.demo import arguments
from tests.support import needs


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "COMMAND"),
        (["demo", "--seconds", "0"], "'0' is not a number of seconds"),
        (["demo", "--seconds", "soon"], "'soon' is not a number of seconds"),
        (["demo", "--clients", "0"], "'0' is not a number from 1 to 40"),
        (["demo", "--clients", "many"], "'many' is not a number from 1 to 40"),
        (["demo", "--without", "luck"], "early-finish"),
        (["demo", "--without", "overlap", "--unprotected"], "not allowed with"),
    ],
)
def test_bad_usage_is_explained(given, complaint, capsys):
    """Bad usage ends with status 2, and one message that says what would be right."""
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("payments:secret", "this is not a database URL"),
        ("sqlite://h:secret/x", "this is not a database URL"),
        ("sqlite://", "name a file"),
        ("sqlite:////nowhere/bank.db", "unable to open database file"),
        ("oracle://user:secret@localhost/x", "the demo knows sqlite, postgresql+psycopg and postgresql+asyncpg"),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/x", "Is the server up, and the address right?"),
    ],
)
def test_a_database_that_cannot_be_used_is_explained(url, complaint, capsys):
    """The demo says what is wrong with a database, without its password, and ends with status 2."""
    for name in ("httpx", "rich", "uvicorn", "waitress"):
        needs.module(name, extra="demo")
    needs.module("aiosqlite", extra="aiosqlite")
    needs.module("psycopg", extra="postgresql")
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--database-url", url])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert "secret" not in said.err
    assert not said.out


@pytest.mark.parametrize("missing", ["rich", "httpx", "uvicorn", "waitress"])
def test_a_missing_extra_says_what_to_install(missing):
    """Without one of the demo's packages there is a message with the command that installs them, no traceback."""
    code = f"import sys; sys.modules[{missing!r}] = None; from dbscope.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dbscope demo: ")
    assert 'pip install "dbscope[' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches(capsys, monkeypatch):
    """`--help` says what the demo shows, gives commands to copy, and fits a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for word in (
        "misbehave",
        "--database-url postgresql+asyncpg://",
        "exit status",
        "NO_COLOR",
        *arguments.PROTECTIONS,
    ):
        assert word in shown


def test_every_mistake_is_documented():
    """The page on the demo lists each mistake by its number and its error."""
    needs.module("greenlet", extra="async")
    from dbscope.cli.demo.misbehaviour import MISBEHAVIOURS

    page = (Path(__file__).parent.parent.parent / "docs" / "demo.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if re.match(r"\| \d", line)]
    documented = {(int(row[1]), error) for row in rows for error in re.findall(r"`(\w+)`", row[4])}
    assert documented == {(m.number, m.by) for m in MISBEHAVIOURS}


def test_every_protection_can_be_turned_off():
    """The command line offers what there is."""
    needs.module("greenlet", extra="async")
    from dbscope.cli.demo.without import PROTECTIONS

    assert tuple(PROTECTIONS) == arguments.PROTECTIONS
