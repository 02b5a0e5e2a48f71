"""The server that the other tests rely on."""

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

STARTS_A_SERVER = """
from tests.support.postgres import Postgres

with Postgres() as server:
    print(server.pid, server._home, flush=True)
    input()
"""


def test_a_database_is_a_copy_of_its_template(postgres, postgres_database):
    """A test gets the tables of the template it asks for, and none of what another copy was filled with."""
    query = text("SELECT count(*) FROM payments")
    template = create_engine(postgres.url(database=postgres_database))
    with template.begin() as connection:
        connection.execute(text("CREATE TABLE payments AS SELECT 500 AS amount"))
    template.dispose()
    names = [postgres.create_database(template=postgres_database) for _ in range(2)]
    first, second = (create_engine(postgres.url(database=name)) for name in names)
    with first.begin() as connection:
        connection.execute(text("DELETE FROM payments"))
        assert connection.scalar(query) == 0
    with second.connect() as connection:
        assert connection.scalar(query) == 1
    first.dispose()
    second.dispose()


def test_two_phase_commit_is_possible(postgres_url):
    """The server keeps prepared transactions, which a stock server refuses."""
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("CREATE TABLE payments (id int)"))
        transaction.prepare()
        transaction.commit()
    engine.dispose()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can end a child with its parent")
def test_a_killed_run_leaves_no_server(postgres):
    """A test run that is killed takes its server with it."""
    run = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with run:
        pid, home = run.stdout.readline().split(maxsplit=1)
        server = os.pidfd_open(int(pid))
        run.send_signal(signal.SIGKILL)
        ended, _, _ = select.select([server], [], [], 10)
        os.close(server)
    shutil.rmtree(Path(home.strip()))
    assert ended
