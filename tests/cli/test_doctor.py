"""`dbscope doctor`: what it finds in real databases, what it says to do, and how it ends."""

import json
import os
import pty
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import pytest
from sqlalchemy import create_engine, make_url, text

from dbscope.cli import main
from dbscope.cli.doctor import CannotCheck, Report, doctor, shown
from dbscope.monitor import checks
from tests.support import needs
from tests.support.kits import LIMIT
from tests.support.pgbouncer import PgBouncer, PgBouncerNotFound
from tests.support.postgres import Postgres


def levels(report: Report) -> dict[str, str]:
    """The worst that each check says."""
    return {found.check: found.level for found in reversed(report.findings)}


def remedy(report: Report, check: str) -> str:
    """What is to be done about it."""
    return next(found.remedy for found in report.findings if found.check == check)


@pytest.fixture(params=["psycopg", "asyncpg", "psycopg_async"])
def server(request: pytest.FixtureRequest, postgres: Postgres, postgres_database: str) -> str:
    """A URL of an empty database, by each driver."""
    if request.param != "psycopg":
        needs.module("greenlet", extra="async")
    if request.param == "asyncpg":
        needs.module("asyncpg", extra="asyncpg")
    return postgres.url(request.param, postgres_database)


def test_time_outs_that_are_off_are_found_and_the_remedy_ends_it(server, postgres, postgres_database):
    """Each remedy can be pasted: after all of them, nothing is left to say."""
    needs.module("psycopg", extra="postgresql")
    before = doctor(server)
    found = levels(before)
    assert found["idle_in_transaction_session_timeout"] == "problem"
    for name in ("statement_timeout", "lock_timeout", "client_connection_check_interval", "transaction_timeout"):
        assert found[name] == "advice"
    assert (found["capacity"], found["pooler"], found["sqlalchemy"]) == ("ok", "ok", "ok")
    assert not before.holds()
    admin = create_engine(postgres.url(), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for finding in before.findings:
            if finding.remedy:
                connection.execute(text(finding.remedy))
    admin.dispose()
    after = doctor(server)
    assert {finding.level for finding in after.findings} == {"ok"}
    assert after.holds(strict=True)


def test_a_lock_time_out_that_never_strikes_is_found(postgres, postgres_database):
    """It is longer than the statement may take."""
    url = postgres.url(database=postgres_database)
    report = doctor(f"{url}?options=-c%20statement_timeout=5s%20-c%20lock_timeout=5s")
    assert "never strikes" in next(found.message for found in report.findings if found.check == "lock_timeout")


def test_pools_that_ask_for_more_than_the_server_gives_are_found(server):
    """Processes x (pool_size + max_overflow) against max_connections; the remedy's figures fit."""
    assert levels(doctor(server, processes=13))["capacity"] == "ok"
    report = doctor(server, processes=14)
    assert levels(report)["capacity"] == "problem"
    assert "14 processes x 15 = 210 of 200" in next(f.message for f in report.findings if f.check == "capacity")
    assert remedy(report, "capacity").startswith("pool_size=14, max_overflow=0")
    assert levels(doctor(server, processes=14, pool_size=14, max_overflow=0))["capacity"] == "ok"
    assert levels(doctor(server, pool_size=0))["capacity"] == "problem"  # without a limit
    assert levels(doctor(server, max_overflow=-1))["capacity"] == "problem"


# -- a pooler ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """A pooler before the server, in transaction mode."""
    with ExitStack() as stack:
        try:
            pooler = stack.enter_context(PgBouncer(postgres.url(), pool_size=3))
        except PgBouncerNotFound as error:
            needs.missing(str(error))
        yield pooler


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("psycopg", {"prepare_threshold": None}),
        ("psycopg_async", {"prepare_threshold": None}),
        ("asyncpg", {"statement_cache_size": 0, "prepared_statement_cache_size": 0}),
    ],
)
def test_failures_34_prepared_statements_behind_a_pooler_are_found(
    driver, options, pgbouncer, postgres_database, tmp_path, monkeypatch
):
    """With the option of the driver that ends it; where an application has set that, all is well."""
    needs.module("greenlet", extra="async")
    needs.module("asyncpg", extra="asyncpg")
    url = f"postgresql+{driver}://postgres@127.0.0.1:{pgbouncer.port}/{postgres_database}"
    report = doctor(url)
    assert levels(report)["pooler"] == "problem"
    assert all(repr(name).replace("'", '"') in remedy(report, "pooler") for name in options)

    name = "Database" if driver == "psycopg" else "AsyncDatabase"
    if driver == "asyncpg":
        options = options | {"prepared_statement_name_func": "NAMES"}
    (tmp_path / f"behind_{driver}.py").write_text(
        f"import uuid\nfrom dbscope import {name}\ndb = {name}({url!r}, connect_args={options!r})\n".replace(
            "'NAMES'", "lambda: f'doctor_{uuid.uuid4()}'"
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    report = doctor(f"behind_{driver}:db")
    assert levels(report)["pooler"] == "ok"
    assert "prepares no statements" in next(found.message for found in report.findings if found.check == "pooler")
    assert levels(report)["capacity"] == "ok"


@pytest.mark.parametrize("pool_size", [1, 3])
def test_a_pooler_that_shares_nothing_is_no_problem(pool_size, postgres, postgres_database):
    """In session mode each client keeps its server connection, and so its prepared statements."""
    try:
        pooler = PgBouncer(postgres.url(), pool_size=pool_size, mode="session")
    except PgBouncerNotFound as error:
        needs.missing(str(error))
    with pooler:
        report = doctor(f"postgresql+psycopg://postgres@127.0.0.1:{pooler.port}/{postgres_database}")
    assert levels(report)["pooler"] == "ok"
    assert "no sign of transaction mode" in next(found.message for found in report.findings if found.check == "pooler")


# -- SQLite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_sqlites_settings_are_found_and_nothing_is_changed(driver, tmp_path):
    """The journal mode of the file, foreign keys, and the patience with locks; a plain file has the wrong ones."""
    if driver.endswith("aiosqlite"):
        needs.module("aiosqlite", extra="aiosqlite")
        needs.module("greenlet", extra="async")
    file = tmp_path / "a shop.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE payments (amount)")
    before = file.read_bytes()
    report = doctor(f"{driver}:///{file}?timeout=0.2")
    assert {"journal_mode": "problem", "busy_timeout": "problem", "foreign_keys": "advice"}.items() <= levels(
        report
    ).items()
    assert file.read_bytes() == before
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    report = doctor(f"{driver}:///{file}")
    assert (levels(report)["journal_mode"], levels(report)["busy_timeout"]) == ("ok", "ok")
    assert report.holds()
    assert not report.holds(strict=True)


def test_a_file_that_is_not_there_is_not_made(tmp_path, capsys):
    """It could not be checked."""
    assert main(["doctor", f"sqlite:///{tmp_path / 'none.db'}"]) == 2
    assert "none.db: unable to open database file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- an application's own ----------------------------------------------------------------------------------------


def test_an_applications_own_database_is_checked_as_it_is(tmp_path, monkeypatch, capsys):
    """`module:name`, also of an attribute: a Database's defaults are sound, a plain engine's are not."""
    (tmp_path / "doctored_shop.py").write_text(
        "from types import SimpleNamespace\nfrom dbscope import Database\nfrom sqlalchemy import create_engine\n"
        "db = Database('sqlite:///shop.db')\nplain = create_engine('sqlite:///plain.db')\n"
        "app = SimpleNamespace(db=db)\nnothing = 3\n"
        "class Proxy:\n    def __getattr__(self, name): raise RuntimeError('outside of the application')\n"
        "proxy = Proxy()\n"
    )
    (tmp_path / "doctored_program.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("db", "app.db"):
        assert main(["doctor", f"doctored_shop:{name}", "--strict"]) == 0
    assert main(["doctor", "doctored_shop:plain"]) == 1
    assert "foreign keys are not enforced" in capsys.readouterr().out
    for given, complaint in (
        ("doctored_shop:nothing", "is no Database, AsyncDatabase or engine, but int"),
        ("doctored_shop:none", "has no attribute 'none'"),
        ("doctored_shop:proxy", "outside of the application"),
        ("doctored_program:db", "SystemExit"),
        ("no_shop_here:db", "No module named 'no_shop_here'"),
    ):
        assert main(["doctor", given]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["doctor", "doctored_shop:db", "--pool-size", "3"]) == 2
    assert "has a pool of its own" in capsys.readouterr().err


def test_the_pool_of_an_application_counts(postgres, postgres_database, tmp_path, monkeypatch):
    """Its size, and whether connections are tried before they are given out."""
    url = postgres.url(database=postgres_database)
    (tmp_path / "doctored_pool.py").write_text(
        f"from sqlalchemy import create_engine\nengine = create_engine({url!r}, pool_size=20, max_overflow=5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    report = doctor("doctored_pool:engine", processes=9)
    assert "9 processes x 25 = 225 of 200" in next(f.message for f in report.findings if f.check == "capacity")
    assert levels(report)["pool_pre_ping"] == "advice"


# -- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("2.0.55", "2.0.56"),
        ("2.0.56", None),
        ("2.0.60", None),
        ("2.1.0b2", "2.1.7"),
        ("2.1.6", "2.1.7"),
        ("2.1.7", None),
        ("2.2.0", None),
    ],
)
def test_versions_that_lose_slots_are_known(version, wanted):
    """An async pool of theirs loses a connection for good when a task is cancelled."""
    assert checks.lost_slots(version) == wanted


@pytest.mark.parametrize(("is_async", "level"), [(True, "problem"), (False, "advice")])
def test_a_version_that_loses_slots_is_found(is_async, level, monkeypatch):
    """With the line that installs a good one; a sync pool is not concerned."""
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda package: "2.1.3")
    checked: Any = SimpleNamespace(is_async=is_async)
    (found,) = checks.sqlalchemy_version(checked, cast("Any", None))
    assert (found.level, found.remedy) == (level, 'pip install "SQLAlchemy>=2.1.7"')


@pytest.mark.parametrize(
    ("driver", "version", "said"),
    [("pg8000", "1", "not tested"), ("psycopg", "3.1.9", "older"), ("psycopg_async", "3.2", None)],
)
def test_drivers_are_judged(driver, version, said, monkeypatch):
    """Unknown ones and old ones are told."""
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda package: version)
    dialect = SimpleNamespace(driver=driver, name="postgresql")
    checked = checks.Checked(SimpleNamespace(dialect=dialect), False, 15, 1, False, lambda: None)
    (found,) = checks.driver(checked, cast("Any", None))
    assert said in found.message if said else found.level == "ok"
    assert bool(found.remedy) is (said is not None)


# -- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("payments:secret@", "this is not a database URL"),
        ("payments", "no module:name, such as shop.database:db"),
        ("postgresql://user@127.0.0.1:secret/x", "this is not a database URL"),
        ("postgresql+psycopg://user:o@secret@127.0.0.1/x", "as '%40'"),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/x", "onnection refused"),
        ("postgresql+psycopg://127.0.0.1:1/x?password=secret", "onnection refused"),
        ("oracle+nothing://user:secret@localhost/x", "SQLAlchemy knows no database"),
        ("postgresql+pg8000://user:secret@localhost/x", "pg8000, which is not installed"),
    ],
)
def test_what_cannot_be_checked_is_one_line_without_the_password(given, complaint, capsys):
    """And the exit status is 2."""
    needs.module("psycopg", extra="postgresql")
    assert main(["doctor", given]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert "secret" not in said.err
    assert not said.out


@pytest.mark.parametrize("password", ["secret", "se/cr@et", "se cret"])
def test_a_password_is_hidden_wherever_it_stands(password, monkeypatch, capsys):
    """Before the host, among the options, or in what an error of the driver's or the application's says."""
    quoted = quote(password, safe="")
    for url in (
        f"postgresql://app:{quoted}@db/shop",
        f"postgresql://app@db/shop?password={quoted}&sslpassword={quoted}",
    ):
        told = shown(make_url(url))
        assert "***" in told
        assert password not in told
        assert quoted not in told
    assert shown(make_url("postgresql://postgres:postgres@db/postgres")) == "postgresql://postgres:***@db/postgres"
    url = f"postgresql+psycopg://app:{quoted}@db/shop"

    def failing(*given: object) -> None:
        raise OSError(f"cannot connect to {url} with {password}")

    monkeypatch.setattr("dbscope.cli.doctor.target_of", failing)
    assert main(["doctor", url]) == 2
    said = capsys.readouterr().err
    assert "cannot connect to" in said
    assert password not in said
    assert quoted not in said


def test_a_server_that_does_not_answer_is_not_waited_for():
    """A port that takes a connection, and says nothing."""
    needs.module("psycopg", extra="postgresql")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://user@127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(CannotCheck, match=r"did not answer within 0\.2 s"):
            doctor(url, patience=0.2)


def test_json_is_for_programs(tmp_path, capsys):
    """The same findings; an error, too."""
    file = tmp_path / "shop.db"
    sqlite3.connect(file).close()
    file.touch()
    assert main(["doctor", f"sqlite:////{tmp_path}/none.db?password=secret", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["ok"] is False
    assert "secret" not in said.out + said.err
    assert main(["doctor", f"sqlite:///{file}", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert {"check": "journal_mode", "level": "problem"}.items() <= told["findings"][0].items()


def test_the_url_may_be_in_the_environment(tmp_path, monkeypatch, capsys):
    """Where the list of processes does not show it."""
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    assert main(["doctor"]) == 0
    assert "a database in memory" in capsys.readouterr().out
    monkeypatch.setenv("DATABASE_URL", "payments")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("dbscope doctor: DATABASE_URL: this is not a database URL")
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 2
    assert "say which database" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--processes", "0"], ["--pool-size", "many"], ["--max-overflow", "-2"]])
def test_bad_numbers_are_refused(given, capsys):
    """By what would be right."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "sqlite://", *given])
    assert ended.value.code == 2
    assert "is not a number of" in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_a_terminal_sees_colours_unless_it_wants_none(no_color, colours):
    """NO_COLOR turns them off; a pipe gets none."""
    here, there = pty.openpty()
    with os.fdopen(here, "rb", buffering=0) as screen:
        subprocess.run(
            [sys.executable, "-m", "dbscope", "doctor", "sqlite://"],
            stdout=there,
            env=os.environ | {"NO_COLOR": no_color, "TERM": "xterm"},
            timeout=LIMIT,
            check=True,
        )
        os.close(there)
        shown = b""
        while b"advice\r\n" not in shown:
            shown += screen.read(4096)
    assert (b"\x1b[" in shown) is colours


def test_a_pipe_gets_no_colours():
    """Nor do the checks need any extra."""
    command = [sys.executable, "-m", "dbscope", "doctor", "sqlite://"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True, cwd=Path.cwd())
    assert "\x1b[" not in done.stdout
    assert done.stdout.startswith("sqlite://: SQLite 3.")
