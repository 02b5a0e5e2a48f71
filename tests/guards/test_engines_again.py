"""Engines that are made again and again for one URL: FAILURES 39."""

import gc
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

import dbscope
from dbscope import GuardError, guards
from dbscope.events import EngineMade
from dbscope.guards import policy
from dbscope.guards.engines_again import SUSPICIOUS
from tests.support import needs
from tests.support.kits import Kit, SyncKit, twice

HERE = __file__.rpartition("/")[2]


@pytest.fixture(autouse=True)
def as_if_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine has been made yet."""
    monkeypatch.setattr(policy._guards["engines_again"], "_counts", {})


def another(kit: Kit) -> Any:
    """A new engine for the kit's URL, of its colour."""
    if kit.colour == "sync":
        return create_engine(kit.url, poolclass=NullPool)
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine(kit.url.set(drivername=kit.drivers[kit.url.get_backend_name()]), poolclass=NullPool)


@twice
async def test_failures_39_an_engine_for_each_request_is_named(kit: Kit, found: list[Any]) -> None:
    """With its URL, how many there are, and the line; the fifth, and the tenth."""
    engines = []
    for number in range(12):
        engines.append(another(kit))
        kit.database(engines[-1])
        assert len(found) == (number + 1 >= SUSPICIOUS) + (number + 1 >= 2 * SUSPICIOUS)
    assert [fact.guard for fact in found] == ["engines_again"] * 2
    assert found[0].message.startswith(f"5 engines were made for {engines[0].url} in this process")
    assert ("on one event loop" in found[0].message) == (kit.colour == "async")
    assert "There are 5 of them now" in found[0].message
    assert found[0].database is kit.databases[4]


@twice
async def test_failures_39_plain_engines_that_are_watched_are_counted(kit: Kit, found: list[Any]) -> None:
    """Gone or not, by the line that watches them; watching one again is no other engine."""
    for _ in range(SUSPICIOUS):
        engine = another(kit)
        for _ in range(SUSPICIOUS):
            dbscope.watch(engine)
    gc.collect()
    (fact,) = found
    assert f"the last at tests/guards/{HERE}:" in fact.message.replace("\\", "/")
    assert isinstance(fact.database, dbscope.watched.Watch)


def test_failures_39_raise_refuses_each_from_the_fifth_on(sync_kit: SyncKit) -> None:
    """Whether the others are gone or not."""
    guards.configure(engines_again="raise")
    for _ in range(SUSPICIOUS - 1):
        sync_kit.database(another(sync_kit))
    for _ in range(2):
        with pytest.raises(GuardError, match="engines were made for"):
            sync_kit.database(another(sync_kit))


def test_failures_39_off_for_everybody_counts_nothing(sync_kit: SyncKit, found: list[Any]) -> None:
    """The core then tells no such fact."""
    guards.configure(engines_again="off")
    assert not EngineMade.observers
    for _ in range(SUSPICIOUS):
        sync_kit.database(another(sync_kit))
    assert not found


def test_failures_39_what_is_meant_is_not_counted(sync_kit: SyncKit, found: list[Any]) -> None:
    """Several databases on one engine, databases in memory, pools apart, and different URLs."""
    engine: Engine = another(sync_kit)
    for number in range(SUSPICIOUS):
        sync_kit.database(engine)
        sync_kit.memory()
        with sync_kit.db.apart(f"back-fill {number}"):
            pass
        dbscope.watch(create_engine(f"sqlite:///{number}.db"))
    assert not found


def test_failures_39_the_password_is_not_shown(found: list[Any]) -> None:
    """In what is found."""
    needs.module("psycopg", extra="postgresql")
    for _ in range(SUSPICIOUS):
        dbscope.watch(create_engine("postgresql+psycopg://user:hunter2@nowhere/shop"))
    assert "user:***@nowhere/shop" in found[0].message
    assert "hunter2" not in found[0].message
