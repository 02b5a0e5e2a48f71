"""Which session comes out of which database. mypy reads this; nobody runs it."""

from typing import assert_type

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlmodel import Session as ModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as AsyncModelSession

from dbscope import AsyncDatabase, Database


class Audited(Session):
    """A session class of the user's."""


# By a URL, an engine, a session maker, a class.

db = Database("sqlite://", pool_size=1, expire_on_commit=False)
assert_type(db, Database[Session])
assert_type(db.session(), Session)
assert_type(db.session(autoflush=False), Session)
assert_type(db.new_session(), Session)
assert_type(db.engine, Engine)

assert_type(Database(create_engine("sqlite://")), Database[Session])
assert_type(Database(sessionmaker(create_engine("sqlite://"))), Database[Session])
assert_type(Database(sessionmaker(create_engine("sqlite://"), class_=Audited)), Database[Audited])

audited = Database("sqlite://", session_class=Audited)
assert_type(audited, Database[Audited])
assert_type(audited.session(), Audited)

models = Database("sqlite://", session_class=ModelSession, name="models")
assert_type(models.session(), ModelSession)
assert_type(models.new_session(), ModelSession)

adb = AsyncDatabase("sqlite+aiosqlite://")
assert_type(adb, AsyncDatabase[AsyncSession])
assert_type(adb.session(), AsyncSession)
assert_type(adb.engine, AsyncEngine)
assert_type(AsyncDatabase(create_async_engine("sqlite+aiosqlite://")), AsyncDatabase[AsyncSession])
assert_type(AsyncDatabase(async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))), AsyncDatabase[AsyncSession])

amodels = AsyncDatabase("sqlite+aiosqlite://", session_class=AsyncModelSession)
assert_type(amodels.session(), AsyncModelSession)


# Apart, for long work.

assert_type(audited.apart("migration"), Database[Audited])
assert_type(amodels.apart("migration", connections=2, lock_timeout=None), AsyncDatabase[AsyncModelSession])


# As context managers.


def opened() -> None:
    """A database yields itself."""
    with Database("sqlite://", session_class=Audited) as mine:
        assert_type(mine, Database[Audited])


async def aopened() -> None:
    """So does an async one."""
    async with AsyncDatabase("sqlite+aiosqlite://") as mine:
        assert_type(mine, AsyncDatabase[AsyncSession])
    await mine.dispose()


# What the checker refuses.

Database(create_async_engine("sqlite+aiosqlite://"))  # type: ignore[call-overload]
AsyncDatabase(create_engine("sqlite://"))  # type: ignore[call-overload]
Database("sqlite://", uncommitted="ignore")  # type: ignore[call-overload]
