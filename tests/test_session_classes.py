"""Session classes of the user's, and what the registry makes of them."""

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session

from dbscope import ConfigurationError, Database, scope
from tests.support import needs


class Audited(Session):
    """A session class with a member of its own."""

    def audit(self, what: str) -> str:
        """Say what is audited."""
        return f"audited {what}"


def test_the_registry_has_what_the_users_class_adds():
    """`db.session.exec(...)` works as `db.session().exec(...)` does, whatever the session class calls it."""
    with Database("sqlite://", session_class=Audited) as db, scope():
        assert db.session.audit("this") == "audited this"
        assert isinstance(db.session, scoped_session)


def test_the_end_of_a_scope_closes_by_the_users_own_close():
    """What a class does in its `close()` is done at the scope's end, be there objects to let go of or not."""
    closed = []

    class Noting(Session):
        def close(self) -> None:
            closed.append(self)
            super().close()

    with Database("sqlite://", session_class=Noting) as db:
        with scope():
            session = db.session()
            session.scalar(text("SELECT 42"))
        assert closed == [session]


async def test_the_async_registry_has_what_the_users_class_adds():
    """So does the async one."""
    needs.module("greenlet", extra="async")
    needs.module("aiosqlite", extra="aiosqlite")
    from sqlalchemy.ext.asyncio import AsyncSession

    from dbscope import AsyncDatabase

    class AsyncAudited(AsyncSession):
        async def audit(self) -> int:
            return int(await self.scalar(text("SELECT 42")) or 0)

    async with AsyncDatabase("sqlite+aiosqlite://", session_class=AsyncAudited) as db, scope():
        assert await db.session.audit() == 42


def test_a_misspelled_member_is_an_attribute_error_without_a_session():
    """What no session has is not looked for in a session: nothing is opened, and hasattr() says no."""
    with Database("sqlite://", session_class=Audited) as db, scope():
        with pytest.raises(AttributeError, match="no attribute 'sclars'"):
            _ = db.session.sclars
        assert not hasattr(db.session, "__wrapped__")
        assert not db.session.registry.has()


def test_an_async_session_class_is_refused_by_a_sync_database():
    """The mix of colours is named where it is made, not where it is used."""
    needs.module("greenlet", extra="async")
    from sqlalchemy.ext.asyncio import AsyncSession

    with pytest.raises(ConfigurationError, match="session_class"):
        Database("sqlite://", session_class=AsyncSession)
    from dbscope import AsyncDatabase

    needs.module("aiosqlite", extra="aiosqlite")
    with pytest.raises(ConfigurationError, match="session_class"):
        AsyncDatabase("sqlite+aiosqlite://", session_class=Session)


@pytest.mark.parametrize("wrong", [None, "Session", Session(), dict])
def test_what_is_no_session_class_is_refused(wrong):
    """`session_class` is a class, and says so."""
    with pytest.raises(ConfigurationError, match="session_class"):
        Database("sqlite://", session_class=wrong)
