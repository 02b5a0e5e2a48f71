"""The bank: what its audit says is checked from outside, with other means than its own."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.support import needs

BANK = Path(__file__).parent.parent.parent / "examples" / "bank.py"
EXTRAS = {"aiosqlite": "aiosqlite", "asyncpg": "asyncpg", "psycopg": "postgresql"}

# Whatever order they are booked in: of the 30 payments from A01 exactly 10 are covered, and of each X only one is
# booked. Every batch begins with its own of these, of other accounts, so that no account's lock keeps them apart.
RACE = [f"R{n},A01,A02,100.00" for n in range(30)]
TWINS = [[f"X{n},A{a},A{a + 1},1.00" for n in range(5)] for a in (11, 13, 15)]
BATCH = 50
BACK_AND_FORTH = [line for n in range(40) for line in (f"B{n},A07,A08,10.01", f"C{n},A08,A07,10.01")]
BAD = {
    b"M1,A09,A10,12.345": "bad amount",
    b"M2,A09,A10,twelve": "bad amount",
    b"M3,A09,A10,": "a field is missing",
    b"M4,A09,A10": "a field is missing",
    b"M5,A09,A10,1.00,x": "5 fields instead of 4",
    b"M6,A09,A99,1.00": "unknown account",
    b"M7,A09,A10,-1.00": "negative amount",
    b"M8,A09,A10,0.00": "amount is zero",
    b"M9,A09,A09,1.00": "payer and payee are one",
    b"M\xff,A09,A10,1.00": "not UTF-8",
    b'M11,A09,A10,"1.00': "not CSV: unexpected end of data",
    b"M\0,A09,A10,1.00": "bad id",
    b"": "a field is missing",
    b"M12,A09,A10,999999999999.99": "overdrawn",
}


def bank(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the script as a user does, warnings being errors."""
    command = [sys.executable, "-W", "error", str(BANK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))


def write_csv(folder: Path) -> Path:
    """The CSV of these tests, with a byte-order mark and the line ends of Windows."""
    good = [line.encode() for line in [*RACE, *BACK_AND_FORTH]]
    mixed = [*good[::2], *BAD, *good[1::2]]
    for batch, twins in enumerate(TWINS):
        mixed[batch * BATCH : batch * BATCH] = [line.encode() for line in twins]
    path = folder / "payments.csv"
    path.write_bytes(b"\xef\xbb\xbfid,payer,payee,amount\r\n" + b"\r\n".join(mixed) + b"\r\n")
    return path


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "psycopg async"])
def form(request, tmp_path):
    """The arguments that choose a database and a colour, and a URL to look at the same database from outside."""
    which = request.param
    driver = which.split()[0].partition("+")[2]
    is_async = which.endswith(("aiosqlite", "asyncpg", " async"))
    if is_async:
        needs.module("greenlet", extra="async")
    if driver:
        needs.module(driver, extra=EXTRAS[driver])
    if which.startswith("sqlite"):
        outside = make_url(f"sqlite:///{tmp_path / 'bank.db'}")
    else:
        outside = make_url(request.getfixturevalue("postgres_url"))
    url = outside.set(drivername="postgresql+psycopg" if which == "psycopg async" else which)
    chosen = ["--database-url", url.render_as_string(hide_password=False)]
    return ([*chosen, "--async", "--tasks", "8"] if is_async else [*chosen, "--threads", "8"]), outside


def test_every_good_line_is_booked_once_and_no_bad_one(form, tmp_path):
    """On each database and in each colour the books are right, looked at with plain SQL, and the audit says so."""
    arguments, outside = form
    path = write_csv(tmp_path)
    done = bank("--csv", str(path), "--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    engine = create_engine(outside)
    with engine.connect() as connection:
        payments = connection.execute(text("SELECT id, line, payer, payee, amount FROM bank_payments")).all()
        balances = dict(connection.execute(text("SELECT id, balance FROM bank_accounts")).all())
        ledger = connection.execute(text("SELECT account, amount FROM bank_entries")).all()
        rejected = dict(connection.execute(text("SELECT line, reason FROM bank_rejections")).all())
    engine.dispose()

    lines = dict(enumerate(path.read_bytes().split(b"\r\n")[1:-1], 2))
    assert {p.line for p in payments} | rejected.keys() == lines.keys()
    assert not {p.line for p in payments} & rejected.keys()
    for p in payments:
        assert lines[p.line] == f"{p.id},{p.payer},{p.payee},{p.amount // 100}.{p.amount % 100:02}".encode()
    booked = Counter(p.id[0] for p in payments)
    assert booked == {"R": 10, "X": 5, "B": 40, "C": 40}
    malformed = {number: BAD[raw] for number, raw in lines.items() if raw in BAD}
    others = Counter(reason for number, reason in rejected.items() if number not in malformed)
    assert malformed.items() <= rejected.items()
    assert others == {"overdrawn": 20, "duplicate id": 10}
    sums = Counter(dict.fromkeys(balances, 1000_00))
    for account, amount in ledger:
        sums[account] += amount
    assert balances == sums
    assert (balances["A01"], balances["A02"], balances["A07"], balances["A08"]) == (0, 2000_00, 1000_00, 1000_00)

    assert said["ok"] is True
    assert (said["booked"], said["lines"]) == (95, len(lines))
    assert {row["line"]: row["reason"] for row in said["rejected"]} == rejected
    assert all(check["ok"] and not check["faults"] for check in said["audit"])


@pytest.fixture(scope="module")
def booked(tmp_path_factory):
    """A bank that has been booked, with its CSV: copied by each test that spoils it."""
    folder = tmp_path_factory.mktemp("bank")
    path = write_csv(folder)
    done = bank("--csv", str(path), "--database-url", f"sqlite:///{folder / 'bank.db'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


ROW = "(SELECT min(line) FROM bank_payments)"


@pytest.mark.parametrize(
    ("statements", "fault"),
    [
        (["UPDATE bank_accounts SET balance = balance + 1 WHERE id = 'A08'"], "A08: the balance is 1000.01"),
        (["UPDATE bank_entries SET amount = amount + 1 WHERE account = 'A02' AND number = 4"], "A02: entry 4 says"),
        (["DELETE FROM bank_entries WHERE account = 'A02' AND number = 4"], "A02: entry 4 is missing"),
        (
            [
                "UPDATE bank_accounts SET balance = balance - 50000, opening = opening - 50000 WHERE id = 'A07'",
                "UPDATE bank_entries SET balance = balance - 50000 WHERE account = 'A07'",
            ],
            "A07: it was opened with 500.00",
        ),
        (["UPDATE bank_accounts SET opening = opening - 1, balance = balance - 1"], "the bank holds 19999.80"),
        ([f"UPDATE bank_payments SET amount = 1 WHERE line = {ROW}"], "was booked as"),
        ([f"UPDATE bank_payments SET payee = 'A20' WHERE line = {ROW}"], "has the entries"),
        ([f"DELETE FROM bank_payments WHERE line = {ROW}"], "was neither booked nor rejected"),
        (["INSERT INTO bank_payments VALUES ('M2', 999, 'A09', 'A10', 1)"], "line 999 is not in the CSV"),
        (["DELETE FROM bank_rejections WHERE reason = 'bad id'"], "was neither booked nor rejected"),
        (["UPDATE bank_rejections SET reason = 'bad id' WHERE reason = 'duplicate id'"], "rejected without cause"),
        (["UPDATE bank_rejections SET after = 0 WHERE reason = 'overdrawn'"], "rejected without cause: overdrawn"),
        ([f"INSERT INTO bank_rejections VALUES ({ROW}, 'overdrawn', 0)"], "was both booked and rejected"),
    ],
)
def test_an_audit_of_books_that_were_tampered_with_fails(booked, tmp_path, statements, fault):
    """Whatever is changed behind the bank's back, the audit fails and names it."""
    database = tmp_path / "bank.db"
    shutil.copy(booked / "bank.db", database)
    arguments = ["--csv", str(booked / "payments.csv"), "--database-url", f"sqlite:///{database}", "--audit-only"]
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
    tampered = bank(*arguments, "--verbose")
    assert tampered.returncode == 1, tampered.stdout + tampered.stderr
    assert fault in tampered.stdout
    assert "FAILED" in tampered.stdout
    assert "The books do NOT hold." in tampered.stdout


def test_the_demo_needs_no_arguments_and_leaves_nothing(tmp_path):
    """Alone it makes a CSV and a database of its own, the same each time, in a folder that is gone afterwards."""
    env = {"TMPDIR": str(tmp_path)}
    first, second, other = (
        bank("--lines", "300", "--threads", "1", *seed, env=env) for seed in ([], [], ["--seed", "2"])
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert untimed(first.stdout) == untimed(second.stdout) != untimed(other.stdout)
    for reason in ("overdrawn", "duplicate id", "negative amount", "a field is missing", "not UTF-8"):
        assert reason in first.stdout
    assert "\033" not in first.stdout + first.stderr
    assert not list(tmp_path.iterdir())


def untimed(output: str) -> str:
    """The output without the time it took."""
    return re.sub(r"in [0-9.]+ s\n", "", output)


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_sees_progress_and_colours(no_color, coloured):
    """A terminal gets progress, and colours unless NO_COLOR is set."""
    ours, theirs = pty.openpty()
    env = os.environ | {"NO_COLOR": no_color, "TERM": "xterm"}
    command = [sys.executable, str(BANK), "--lines", "60"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env) as running:
        os.close(theirs)
        output = b""
        while part := read(ours):
            output += part
    os.close(ours)
    assert running.returncode == 0
    assert b"50 of 60 lines\r" in output or b"10 of 60 lines\r" in output
    assert (b"\033[32mok" in output) is coloured


def read(terminal: int) -> bytes:
    """What the terminal shows next; nothing when the program is through."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--csv", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["--csv", str(BANK)], "the first line has to be id,payer,payee,amount"),
        (["--database-url", "payments"], "is not a database URL"),
        (["--database-url", "sqlite://"], "name a file"),
        (["--database-url", "sqlite:////nowhere/bank.db"], "unable to open database file"),
        (["--database-url", "oracle+oracledb_async://u@localhost/x"], "is an async driver"),
        (["--audit-only"], "no bank in this database"),
        (["--audit-only", "--reset"], "exclude each other"),
        (["--threads", "0"], "from 1 to 64"),
        (["--threads", "many"], "invalid workers value"),
    ],
)
def test_what_cannot_run_says_why(arguments, complaint):
    """Bad use ends with status 2 and one message, not a traceback."""
    done = bank(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_second_bank_is_not_booked_over_the_first(booked, tmp_path):
    """A database that has a bank is left alone, unless it is to be reset."""
    shutil.copy(booked / "bank.db", tmp_path / "bank.db")
    arguments = ["--database-url", f"sqlite:///{tmp_path / 'bank.db'}", "--csv", str(booked / "payments.csv")]
    refused = bank(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--reset" in refused.stderr
    assert bank(*arguments, "--audit-only").returncode == 0
    again = bank(*arguments, "--reset")
    assert again.returncode == 0, again.stdout + again.stderr


def test_help_teaches():
    """`--help` says what the CSV looks like, shows commands to copy, and fits a terminal of 80 columns."""
    done = bank("--help", env={"COLUMNS": "80"})
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.returncode == 0
    for word in ("id,payer,payee,amount", "--database-url postgresql+psycopg://", "exit status", "NO_COLOR"):
        assert word in done.stdout
