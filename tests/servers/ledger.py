"""An application that books each payment twice, in both colours: what the servers serve, and what the load is put on.

A payment is two rows in two tables, written in one request with a commit on success. What half of it would look like
is so easy to find. `LEDGER_URL` says which PostgreSQL, `LEDGER_POOLER` whether PgBouncer is between, and
`LEDGER_PROCESSES` how many processes there are on all hosts together.

    POST /pay?id=        books it
    POST /fail?id=       writes the first row, and raises
    POST /clash?id=      writes what only the commit can refuse
    POST /late?id=       writes the first row, and is then stopped by its statement's time-out
    POST /slow?id=       books it, and takes long enough for the client to hang up in between
    GET  /rest           this process, and how many connections its pool has given out
"""

import contextlib
import os
import threading
import uuid
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import ForeignKey, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

URL = os.environ.get("LEDGER_URL", "")
PROCESSES = int(os.environ.get("LEDGER_PROCESSES", "1"))
POOL: dict[str, Any] = {"pool_size": 4, "max_overflow": 0, "pool_timeout": 60}
OPTIONS: dict[str, dict[str, Any]] = {"psycopg": {}, "asyncpg": {}}
if os.environ.get("LEDGER_POOLER"):  # each transaction may get another server connection: nothing may stay on one
    OPTIONS = {
        "psycopg": {"prepare_threshold": None},
        "asyncpg": {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
        },
    }
LATE = "20ms"
SLOW = 0.05  # seconds


class Base(DeclarativeBase): ...


class Debit(Base):
    __tablename__ = "debits"
    id: Mapped[str] = mapped_column(primary_key=True)


class Credit(Base):
    __tablename__ = "credits"
    id: Mapped[str] = mapped_column(ForeignKey("debits.id", deferrable=True, initially="DEFERRED"), primary_key=True)


def book(session: Session, kind: str, id: str) -> None:
    """Book a payment in the open transaction, as its kind says."""
    if kind == "clash":
        session.add(Credit(id=id))  # of a debit that is not there, which the server looks for when it commits
        session.flush()
        return
    session.add(Debit(id=id))
    session.flush()
    if kind == "fail":
        raise RuntimeError("out of luck")
    if kind == "late":
        session.execute(text(f"SET LOCAL statement_timeout = '{LATE}'"))
        session.execute(text("SELECT pg_sleep(60)"))
    if kind == "slow":
        session.execute(text(f"SELECT pg_sleep({SLOW})"))
    session.add(Credit(id=id))


def rest(engine: Any) -> dict[str, int]:
    """What a process holds when it has nothing to do."""
    return {"pid": os.getpid(), "checked_out": engine.pool.checkedout(), "threads": threading.active_count()}


def wsgi() -> Any:
    """The application in Flask."""
    from flask import Flask, request

    from dbscope import Database
    from dbscope.integrations.flask import Scopes

    db = Database(URL, connect_args=OPTIONS["psycopg"], **POOL)
    db.check_capacity(PROCESSES)
    app = Flask("ledger")
    app.logger.disabled = True
    Scopes(app, commit="on-success")

    @app.post("/<kind>")
    def pay(kind: str) -> tuple[str, int]:
        book(db.session(), kind, request.args["id"])
        return request.args["id"], 201

    @app.get("/rest")
    def at_rest() -> dict[str, int]:
        return rest(db.engine)

    return app


def asgi() -> Any:
    """The application in FastAPI, with endpoints of both kinds: `async def`, and `def`, which runs in a thread."""
    from fastapi import FastAPI, Response

    from dbscope import AsyncDatabase, Database
    from dbscope.integrations.asgi import ScopeMiddleware

    adb = AsyncDatabase(URL.replace("psycopg", "asyncpg"), connect_args=OPTIONS["asyncpg"], **POOL)
    db = Database(URL, connect_args=OPTIONS["psycopg"], **POOL)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        db.check_capacity(PROCESSES)
        await adb.check_capacity(PROCESSES)
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(ScopeMiddleware, commit="on-success")

    @app.get("/rest")
    async def at_rest() -> dict[str, int]:
        held = [rest(adb.engine.sync_engine), rest(db.engine)]
        return held[0] | {"checked_out": sum(each["checked_out"] for each in held)}

    @app.post("/sync/{kind}")
    def pay_in_a_thread(kind: str, id: str) -> Response:
        book(db.session(), kind, id)
        return Response(id, 201)

    @app.post("/{kind}")
    async def pay(kind: str, id: str) -> Response:
        await adb.session().run_sync(book, kind, id)
        return Response(id, 201)

    return app
