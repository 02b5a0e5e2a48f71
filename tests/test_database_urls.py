"""What a database makes of its URL and of the options that come with it."""

import threading

import pytest
from sqlalchemy import text

from dbscope import Database
from tests.support import needs


def test_psycopg_is_a_driver_of_both_colours():
    """`postgresql+psycopg://` means psycopg's async side when it is given to an AsyncDatabase."""
    needs.module("greenlet", extra="async")
    needs.module("psycopg", extra="postgresql")
    from dbscope import AsyncDatabase

    db = AsyncDatabase("postgresql+psycopg://nobody@localhost/nothing")
    assert db.engine.dialect.is_async


@pytest.mark.parametrize("connect_args", [{}, {"timeout": 30}])
def test_a_database_in_memory_serves_all_threads_whatever_it_is_told(connect_args):
    """`connect_args` adds to the defaults, and takes none away that a database in memory stands on."""
    results = []

    def work():
        with db.transaction() as session:
            results.append(session.scalar(text("SELECT 42")))

    with Database("sqlite://", connect_args=connect_args) as db:
        other = threading.Thread(target=work)
        other.start()
        other.join()
        work()
    assert results == [42, 42]
