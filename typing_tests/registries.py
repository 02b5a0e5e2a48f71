"""`db.session` has every public member of the session, typed as the session's own."""

from collections.abc import Sequence
from typing import Any, assert_type

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_scoped_session
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    SessionTransaction,
    mapped_column,
    scoped_session,
)

from dbscope import AsyncDatabase, Database


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payment"
    id: Mapped[int] = mapped_column(primary_key=True)


db = Database("sqlite://")
adb = AsyncDatabase("sqlite+aiosqlite://")


def a_drop_in(registry: scoped_session[Session]) -> None:
    """What takes SQLAlchemy's registry takes this one."""


def an_async_drop_in(registry: async_scoped_session[AsyncSession]) -> None:
    """The same for async."""


a_drop_in(db.session)
an_async_drop_in(adb.session)


def used_as_the_session() -> None:
    """The members that `scoped_session` has."""
    assert_type(db.session.scalars(select(Payment)).all(), Sequence[Payment])
    assert_type(db.session.get(Payment, 1), Payment | None)
    assert_type(db.session.get_one(Payment, 1), Payment)
    assert_type(db.session.add(Payment()), None)
    assert_type(db.session.is_active, bool)
    db.session.autoflush = False
    db.session.remove()


def members_that_scoped_session_lacks() -> None:
    """And those that it has not."""
    assert_type(db.session.in_transaction(), bool)
    assert_type(db.session.in_nested_transaction(), bool)
    assert_type(db.session.get_transaction(), SessionTransaction | None)
    assert_type(db.session.get_nested_transaction(), SessionTransaction | None)
    assert_type(db.session.invalidate(), None)
    assert_type(db.session.expunge_all(), None)
    assert_type(db.session.expire_on_commit, bool)


async def used_as_the_async_session() -> None:
    """The same for async."""
    assert_type((await adb.session.scalars(select(Payment))).all(), Sequence[Payment])
    assert_type(await adb.session.get(Payment, 1), Payment | None)
    assert_type(await adb.session.run_sync(lambda session: session.is_active), bool)
    assert_type(adb.session.in_transaction(), bool)
    assert_type(adb.session.get_transaction(), AsyncSessionTransaction | None)
    assert_type(adb.session.sync_session, Session)
    await adb.session.remove()


info: dict[Any, Any] = db.session.info
