"""What a database makes of its URL and of the options that come with it."""

import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dbscope import Database, UncommittedWrites
from tests.support import needs
from tests.support.postgres import free_port


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


async def test_a_server_that_is_down_is_named_whatever_the_driver_raises():
    """asyncpg's bare ConnectionRefusedError says which database could not be reached, without its password."""
    needs.module("asyncpg", extra="asyncpg")
    from dbscope import AsyncDatabase

    async with AsyncDatabase(f"postgresql+asyncpg://me:secret@127.0.0.1:{free_port()}/bank") as db:
        with pytest.raises(ConnectionRefusedError) as caught:
            async with db.transaction() as session:
                await session.scalar(text("SELECT 1"))
    (note,) = caught.value.__notes__
    assert "No connection could be made to postgresql+asyncpg://me:***@127.0.0.1" in note


def test_a_file_that_cannot_be_opened_is_not_called_a_server(tmp_path):
    """For SQLite the hint is about the folder."""
    with Database(f"sqlite:///{tmp_path}/nowhere/bank.db") as db:
        with pytest.raises(OperationalError) as caught:
            with db.transaction() as session:
                session.scalar(text("SELECT 1"))
    assert "Is its folder there, and writable?" in caught.value.__notes__[0]


def test_what_a_reader_was_given_to_save_is_reported():
    """An object that is added in a reader, and never flushed, does not vanish without a word."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)

    with Database("sqlite://") as db:
        with pytest.warns(UncommittedWrites, match="Note objects that were never flushed"):
            with db.reader() as session:
                session.add(Note())
