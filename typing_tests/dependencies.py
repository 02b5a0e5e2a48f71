"""What `Depends(db.session)` is given is typed as the session class that the database was given."""

from typing import Annotated, assert_type

import sqlmodel
import sqlmodel.ext.asyncio.session
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from dbscope import AsyncDatabase, Database
from dbscope.integrations.asgi import ScopeMiddleware

db = Database("sqlite://")
adb = AsyncDatabase("sqlite+aiosqlite://")
heroes = Database("sqlite://", session_class=sqlmodel.Session)
aheroes = AsyncDatabase("sqlite+aiosqlite://", session_class=sqlmodel.ext.asyncio.session.AsyncSession)

app = FastAPI()
app.add_middleware(ScopeMiddleware, commit="on-success", veto=lambda status: status >= 500)


@app.get("/sync")
def endpoint(session: Annotated[Session, Depends(db.session)]) -> None:
    """A plain endpoint."""


@app.get("/async")
async def async_endpoint(session: Annotated[AsyncSession, Depends(adb.session)]) -> None:
    """An async one."""


assert_type(db.session(), Session)
assert_type(adb.session(), AsyncSession)
assert_type(heroes.session(), sqlmodel.Session)
assert_type(aheroes.session(), sqlmodel.ext.asyncio.session.AsyncSession)
