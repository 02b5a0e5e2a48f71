"""A transaction that is opened by a read after a commit: statement 34, FAILURES 18."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from dbscope import GuardError, guards, scope
from dbscope.guards import policy
from dbscope.guards.policy import Found
from dbscope.where import place_of, spell
from tests.support.kits import Kit, Payment, SyncKit, twice

HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def told_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that other tests ran are new again."""
    monkeypatch.setattr(policy._guards["begun_by_read"], "_told", set())


async def committed(kit: Kit) -> tuple[Any, Payment]:
    """The scope's session, and an object that its commit has expired."""
    session = kit.session()
    session.add(payment := Payment(amount=500))
    await kit.done(session.commit())
    sync(session).expire(payment)  # an async session keeps what it has loaded
    return session, payment


def sync(session: Any) -> Any:
    """The sync session."""
    return getattr(session, "sync_session", session)


async def run(session: Any, function: Callable[[Any], Any]) -> Any:
    """Call a function that may read expired attributes, as the session's colour allows."""
    return await session.run_sync(function) if hasattr(session, "run_sync") else function(session)


@twice
async def test_failures_18_a_read_after_a_commit_is_named(kit: Kit, found: list[Found]) -> None:
    """With class, attribute, line and scope: `in_transaction()` was False, and is True."""
    async with kit.scope("checkout"):
        session, payment = await committed(kit)
        assert not session.in_transaction()
        await run(session, lambda _: payment.amount)
        assert session.in_transaction()
    (fact,) = found
    assert (fact.guard, fact.database) == ("begun_by_read", kit.db)
    for part in ("the read of Payment.amount at ", f"{HERE}:", "scope 'checkout' (opened at ", "It was expired."):
        assert part in fact.message


@twice
async def test_failures_18_the_line_is_the_one_that_reads(kit: Kit, found: list[Found]) -> None:
    """And no other of the user's on the way."""
    lines: list[str] = []

    def read(_: Any) -> None:
        lines.append(spell(place_of(sys._getframe())))
        _ = payment.amount

    async with kit.scope():
        session, payment = await committed(kit)
        await run(session, read)
    file, line = lines[0].rsplit(":", 1)
    assert f"at {file}:{int(line) + 1}, in" in found[0].message


@twice
async def test_statement_34_a_refresh_after_a_commit_is_named(kit: Kit, found: list[Found]) -> None:
    """In an `AsyncSession`, too."""
    async with kit.scope():
        session, payment = await committed(kit)
        await kit.done(session.refresh(payment))
        assert session.in_transaction()
    (fact,) = found
    assert "session.refresh() of Payment at " in fact.message
    assert f"{HERE}:" in fact.message


@twice
async def test_statement_34_what_is_asked_for_in_words_is_no_surprise(kit: Kit, found: list[Found]) -> None:
    """A query, a get, a merge, a flush, a block: whoever writes one of these knows that it begins a transaction."""
    uses: list[Callable[[Any, Payment], Any]] = [
        lambda s, _: s.scalars(select(Payment)).all(),
        lambda s, p: s.get(Payment, 1),
        lambda s, p: s.merge(Payment(id=1, amount=500)),
        lambda s, p: (s.add(Payment()), s.flush()),
        lambda s, p: s.execute(text("SELECT 1")),
    ]
    async with kit.scope():
        session, payment = await committed(kit)
        for use in uses:
            await run(session, lambda s, use=use: use(s, payment))
            await kit.done(session.rollback())
            sync(session).expire_all()
        async with kit.transaction() as session:
            await run(session, lambda _: payment.amount)
    assert not found


@twice
async def test_statement_34_before_any_commit_a_read_is_no_surprise(kit: Kit, found: list[Found]) -> None:
    """Nobody thought that the transaction was over."""
    async with kit.transaction() as session:
        session.add(Payment(id=7))
    async with kit.scope():
        session = kit.session()
        payment = await kit.done(session.get(Payment, 7))
        await kit.done(session.rollback())
        await run(session, lambda _: payment.amount)
    assert not found


@twice
async def test_statement_34_read_only_results_are_detached_and_begin_nothing(kit: Kit, found: list[Found]) -> None:
    """What a reader has given stays readable."""
    async with kit.scope():
        session, _ = await committed(kit)
        async with kit.reader() as reader:
            payment = await kit.done(reader.scalar(select(Payment)))
        assert payment.amount == 500
        assert not session.in_transaction()
    assert not found


@twice
async def test_failures_18_raise_refuses_it(kit: Kit) -> None:
    """The connection goes back at once; the session works on, and what was pending still is."""
    guards.configure(begun_by_read="raise")
    async with kit.scope():
        session, payment = await committed(kit)
        for use in (lambda _: payment.amount, lambda s: s.refresh(payment)):
            with pytest.raises(GuardError, match=r"Payment"):
                await run(session, use)
            assert not session.in_transaction()
            assert kit.checked_out() == 0
        session.add(Payment(amount=700))
        with pytest.raises(GuardError, match=r"Payment\.amount"):
            await run(session, lambda s: _without_autoflush(s, payment))
        assert kit.checked_out() == 0
        await kit.done(session.commit())
    assert kit.amounts() == [500, 700]


def _without_autoflush(session: Any, payment: Payment) -> Any:
    with session.no_autoflush:
        return payment.amount


@twice
async def test_failures_18_off_says_nothing(kit: Kit, found: list[Found]) -> None:
    """Neither in the log nor to those who observe."""
    guards.configure(begun_by_read="off")
    async with kit.scope():
        session, payment = await committed(kit)
        await run(session, lambda _: payment.amount)
    assert not found


@twice
async def test_failures_18_the_log_has_each_line_once(
    kit: Kit, found: list[Found], caplog: pytest.LogCaptureFixture
) -> None:
    """An application does it in each of its requests; who counts hears of all."""
    with caplog.at_level(logging.WARNING, "dbscope.guards"):
        for _ in range(3):
            async with kit.scope():
                session, payment = await committed(kit)
                await run(session, lambda _, payment=payment: payment.amount)
    assert caplog.text.count("begun_by_read: ") == 1
    assert len(found) == 3


class Base(AsyncAttrs, DeclarativeBase):
    """With attributes that can be awaited."""


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list["Book"]] = relationship()


class Book(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))


@twice
async def test_failures_18_a_lazy_relationship_is_named(kit: Kit, found: list[Found]) -> None:
    """Be it read, or awaited; it says how to load it with the object."""
    Base.metadata.create_all(kit.outside)
    async with kit.transaction() as session:
        session.add(Author(id=1))
    async with kit.scope():
        session = kit.session()
        sync(session).expire_on_commit = False
        author = await kit.done(session.get(Author, 1))
        await kit.done(session.commit())
        if kit.colour == "async":
            await author.awaitable_attrs.books
        else:
            assert author.books == []
    (fact,) = found
    assert "the read of Author.books at " in fact.message
    assert f"{HERE}:" in fact.message
    assert "selectinload()" in fact.message


def test_failures_18_a_line_of_a_registry_s_user_is_found(sync_kit: SyncKit, found: list[Found]) -> None:
    """`db.session.refresh(…)` passes by the registry."""
    with scope():
        sync_kit.db.session.add(payment := Payment())
        sync_kit.db.session.commit()
        sync_kit.db.session.refresh(payment)
    assert f"{HERE}:" in found[0].message
