"""The servers: uvicorn on a loop in a thread, waitress in threads, the job handler and the worker pool beside them."""

import asyncio
import contextlib
import gc
import socket
import threading
import time
from types import TracebackType
from typing import Any, Self

import uvicorn
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from waitress import wasyncore
from waitress.server import create_server

from dbscope.cli.demo.bank import Bank
from dbscope.cli.demo.books import Base, open_accounts
from dbscope.cli.demo.endpoints import ENDPOINTS
from dbscope.cli.demo.misbehaviour import MISBEHAVIOURS
from dbscope.cli.demo.watch import checked_out
from dbscope.cli.demo.web import ASGI, WSGI

__all__ = ["Service"]

THREADS = 8  # of waitress
STARTING = 10.0  # seconds for the servers to answer
STOPPING = 5.0  # seconds for the work that is left, without any progress


class Service:
    """The running bank, for one `with` block; its end waits for the work that is left.

    Args:
        bank: what the endpoints share.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.held: dict[str, int] = {}  # by pool: connections that nobody gave back
        self._loop_thread = threading.Thread(target=self._run_loop, name="uvicorn", daemon=True)
        self._wsgi_thread = threading.Thread(target=self._run_wsgi, name="waitress", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        endpoints = {e.name: e for e in (*ENDPOINTS, *(m.endpoint for m in MISBEHAVIOURS))}
        with self.bank.db.engine.begin() as connection:
            if connection.dialect.name == "sqlite":  # without dbscope some hold a lock to the end: the audit can read
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            drop_tables(connection)
            Base.metadata.create_all(connection)
        with self.bank.scope("opening"), self.bank.db.transaction() as session:
            open_accounts(session)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        app: Any = ASGI(self.bank, endpoints)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
        self._uvicorn = uvicorn.Server(config)
        self._waitress: Any = create_server(
            WSGI(self.bank, endpoints), host="127.0.0.1", port=0, threads=THREADS, clear_untrusted_proxy_headers=True
        )
        self.urls = {
            "asgi": f"http://127.0.0.1:{self._socket.getsockname()[1]}",
            "wsgi": f"http://127.0.0.1:{self._waitress.effective_port}",
        }
        self._loop_thread.start()
        self._wsgi_thread.start()
        self.bank.jobs.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self._finish_jobs()
        self.bank.jobs.stop(STOPPING)
        self._uvicorn.should_exit = True
        self._waitress.trigger.pull_trigger(lambda: wasyncore.close_all(self._waitress._map))
        self._wsgi_thread.join(STOPPING)
        self._loop_thread.join(2 * STOPPING)
        self.bank.receipts.stop()
        engines = self.bank.doors.engines
        self.held |= {name: checked_out(engine) for name, engine in engines.items() if name not in self.held}
        if self._failure is not None and error is None:
            raise self._failure

    def dispose(self) -> None:
        """Close the pools, and drop the tables."""
        for database in (self.bank.narrow, self.bank.dry):
            database.dispose()
            database.engine.dispose()
        self.bank.db.dispose()
        gc.collect()  # without dbscope connections are given back when their last user is collected, if at all
        engine = create_engine(self.bank.db.engine.url)
        with contextlib.suppress(SQLAlchemyError), engine.begin() as connection:  # and some hold a lock to the end
            drop_tables(connection)
        engine.dispose()

    def _finish_jobs(self) -> None:
        """Wait until the job handler has done everything, or does nothing any more."""
        progress, since = self.bank.jobs.seen(), time.monotonic()
        while self._jobs_wait() and time.monotonic() - since < STOPPING:
            time.sleep(0.02)
            if (now := self.bank.jobs.seen()) != progress:
                progress, since = now, time.monotonic()

    def _jobs_wait(self) -> bool:
        try:
            return self.bank.jobs.waiting() > 0
        except SQLAlchemyError:  # without dbscope somebody may hold a lock to the end
            return True

    def _run_wsgi(self) -> None:
        self._waitress.run()
        self._waitress.task_dispatcher.shutdown(timeout=STOPPING)

    def _run_loop(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error

    async def _serve(self) -> None:
        try:
            await self._uvicorn.serve(sockets=[self._socket])
            if self.bank.left_behind:
                await asyncio.wait([*self.bank.left_behind], timeout=STOPPING)
        finally:
            self.held["async"] = checked_out(self.bank.adb.engine.sync_engine)
            await self.bank.adb.dispose()


def drop_tables(connection: Connection) -> None:
    """Drop what an earlier demo, or this one, has made; wait for locks no longer than it takes a demo to end."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL lock_timeout = '{STOPPING:.0f}s'"))
    Base.metadata.drop_all(connection)
