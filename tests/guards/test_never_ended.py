"""A session that is dropped, a scope that is never ended: the garbage collector's finds, and those at the exit."""

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

import dbscope
from dbscope import begin_scope, end_scope, guards, ids, scope
from dbscope.events import ScopesPileUp, SessionDropped
from tests.support.kits import LIMIT, Kit, SyncKit, twice

HERE = __file__.rpartition("/")[2]


def test_a_session_that_is_dropped_with_a_transaction_open_is_named(sync_kit: SyncKit, found: list[Any]) -> None:
    """By the line that took its connection, which is back; one that was closed, or used no SQL, is not."""

    def forget() -> None:
        sync_kit.db.new_session().scalar(text("SELECT 41"))

    def close() -> None:
        with sync_kit.db.new_session() as session:
            session.scalar(text("SELECT 41"))
        sync_kit.db.new_session()

    close()
    gc.collect()
    assert not found
    forget()
    gc.collect()
    (fact,) = found
    assert (fact.guard, fact.database) == ("session_dropped", sync_kit.db)
    assert f"{HERE}:" in fact.message
    assert "with a transaction open" in fact.message
    assert sync_kit.checked_out() == 0
    assert not sync_kit.db.holders


def test_a_scope_that_is_dropped_is_named_by_the_line_that_opened_it(sync_kit: SyncKit, found: list[Any]) -> None:
    """In a thread that is gone, and with it its context."""

    def enter() -> None:
        scope("import").__enter__()
        sync_kit.db.session.scalar(text("SELECT 41"))

    assert sync_kit.db
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(LIMIT)
    del thread
    gc.collect()
    (fact,) = found
    assert fact.guard == "scope_never_ended"
    assert f"scope 'import' (opened at tests/guards/{HERE}:" in fact.message
    assert "dropped and never ended" in fact.message


@twice
async def test_scopes_and_blocks_that_end_are_not_found(kit: Kit, found: list[Any]) -> None:
    """However they end."""
    for error in (None, ZeroDivisionError):
        try:
            async with kit.scope(), kit.transaction() as session:
                await kit.done(session.scalar(text("SELECT 41")))
                if error is not None:
                    raise error
        except ZeroDivisionError:
            pass
    del session
    gc.collect()
    assert not found


def test_a_plain_session_of_a_watched_engine_is_named_as_well(sync_kit: SyncKit, found: list[Any]) -> None:
    """At the level "raise", too, the pool gets the connection back."""
    engine = create_engine(sync_kit.url)

    def forget() -> None:
        Session(engine).scalar(text("SELECT 41"))

    with dbscope.watch(engine):
        for level in ("log", "raise"):
            guards.configure(session_dropped=level)
            forget()
            gc.collect()
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a QueuePool
    assert [fact.guard for fact in found] == ["session_dropped"] * 2
    assert HERE in found[0].message
    engine.dispose()


def test_scopes_by_id_that_pile_up_are_told_with_the_oldest(found: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and again when there are twice as many."""
    monkeypatch.setattr(ids, "many", [3])
    try:
        for number in range(8):
            begin_scope(number, f"request {number}")
    finally:
        for number in reversed(range(8)):
            end_scope(number)
    assert [fact.message[:40] for fact in found] == [
        "3 scopes by id are open at once; the old",
        "6 scopes by id are open at once; the old",
    ]
    assert "scope 'request 0' (opened at" in found[0].message


def test_off_for_everybody_observes_nothing() -> None:
    """And counts nothing."""
    guards.configure(session_dropped="off", scope_never_ended="off")
    assert not SessionDropped.observers
    assert not ScopesPileUp.observers
    assert not ids.many


AT_EXIT = """
import sys, threading
from sqlalchemy import text
from dbscope import Database, begin_scope, end_scope, guards, scope

guards.configure(scope_never_ended=sys.argv[1], idle_in_transaction="off")
db = Database("sqlite:///left.db")

def work():
    begin_scope("by id", "of a thread")
    db.session.scalar(text("SELECT 41"))

begin_scope("ended")
end_scope("ended")
thread = threading.Thread(target=work)
thread.start()
thread.join()
scope("entered by hand").__enter__()
"""


@pytest.mark.parametrize("level", ["log", "off"])
def test_a_scope_that_is_open_when_the_process_ends_is_named(tmp_path: Path, level: str) -> None:
    """Scopes by id, and those that were entered by hand; each once, by its line."""
    program = tmp_path / "program.py"
    program.write_text(AT_EXIT)
    ended = subprocess.run(
        [sys.executable, str(program), level], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=True
    )
    lines = [line for line in ended.stderr.splitlines() if "still open when the process ended" in line]
    if level == "off":
        assert not ended.stderr
    else:
        assert len(lines) == 2
        assert "scope 'of a thread' (opened at program.py:10)" in lines[0]
        assert "scope 'entered by hand' (opened at program.py:18)" in lines[1]
