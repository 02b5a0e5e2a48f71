"""A job handler: a process whose monitor thread looks after the jobs in a table, pass after pass, until it is to end.

Read it from the bottom up: `main` starts the thread and waits for a signal, `Handler.check_watched_items` is one pass,
`work_on` is the business logic for one job, which knows nothing of sessions that fail or servers that go away.
"""

import argparse
import json
import logging
import signal
import sys
import threading
from collections import Counter
from typing import Any

from sqlalchemy import ForeignKey, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dbscope import CommitOutcomeUnknown, Database, Loop

log = logging.getLogger("handler")


class Base(DeclarativeBase): ...


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    numbers: Mapped[str]  # JSON, such as [1, 2, 3]
    state: Mapped[str] = mapped_column(default="new")  # new, queued, ok, error
    handler: Mapped[str] = mapped_column(default="")
    info: Mapped[str] = mapped_column(default="")


class Result(Base):
    __tablename__ = "results"

    job_id: Mapped[int] = mapped_column(ForeignKey(Job.id), primary_key=True)
    total: Mapped[int]


def work_on(session: Session, job: Job) -> None:
    """The business logic: what one job needs. It commits nothing, and lets errors out."""
    result = Result(job_id=job.id, total=0)
    session.add(result)
    session.flush()
    result.total = sum(json.loads(job.numbers))  # of a poisoned job this fails, in the middle
    job.state = "ok"


class Handler:
    """Watches jobs, and works on each until it is done, or has failed too often."""

    def __init__(self, db: Database[Session], name: str, *, interval: float, patience: int = 3) -> None:
        self.db = db
        self.name = name
        self.patience = patience
        self.failures: Counter[int] = Counter()  # by the job's id: ids outlive every session, and objects do not
        self.loop = Loop(self.check_watched_items, interval=interval, name="monitor", on_error=self.pass_failed)
        self.thread = threading.Thread(target=self.loop.run, name="monitor")

    def check_watched_items(self) -> None:
        """One pass, in a scope of its own: take on what is new, then give each job a transaction."""
        with self.db.transaction() as session:
            for job in session.scalars(select(Job).where(Job.state == "new").with_for_update(skip_locked=True)):
                job.state, job.handler = "queued", self.name
        with self.db.reader() as session:  # what a handler before this one left, too
            mine = select(Job.id).where(Job.state == "queued", Job.handler == self.name).order_by(Job.id)
            watched = session.scalars(mine).all()
        for id in watched:
            self.check(id)

    def check(self, id: int) -> None:
        """Work on one job. Its own errors stay its own; the database's end the pass, for the next job has them too."""
        try:
            with self.db.transaction() as session:
                work_on(session, session.get_one(Job, id))
        except (OperationalError, InterfaceError):
            raise
        except Exception as error:
            self.failures[id] += 1
            if self.failures[id] < self.patience:
                log.warning("job %d failed, and will be tried again: %r", id, error)
                return
            with self.db.transaction() as session:
                job = session.get_one(Job, id)
                job.state, job.info = "error", repr(error)
            log.error("job %d failed %d times, and is set aside: %r", id, self.patience, error)
        else:
            log.info("job %d is done", id)
        self.failures.pop(id, None)

    def pass_failed(self, error: Exception) -> None:
        """The one place for what is nobody's job: say it, and let the next pass start clean."""
        if isinstance(error, OperationalError | InterfaceError | CommitOutcomeUnknown):
            log.error("the database is away: %s", str(error).splitlines()[0])
        else:
            log.error("pass %d failed", self.loop.passes, exc_info=error)

    def start(self) -> None:
        """Start the monitor thread."""
        self.thread.start()

    def stop(self) -> None:
        """Let the pass that is running come to its end."""
        self.loop.stop()
        self.thread.join()


def main(arguments: list[str] | None = None) -> None:
    """Run a handler until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Works on the jobs of a table, until SIGTERM or Ctrl-C.")
    parser.add_argument("--database-url", default="sqlite:///jobs.db")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two passes")
    parser.add_argument("--name", default="handler", help="of this handler, if there are several")
    parser.add_argument("--add", metavar="JSON", nargs="*", default=[], help="add jobs first, such as '[1, 2, 3]'")
    options = parser.parse_args(arguments)
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stderr)

    told = threading.Event()

    def end(*_: Any) -> None:
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with Database(options.database_url) as db:
        Base.metadata.create_all(db.engine)
        with db.transaction() as session:
            session.add_all([Job(numbers=numbers) for numbers in options.add])
        handler = Handler(db, options.name, interval=options.interval)
        handler.start()
        log.info("ready")
        told.wait()
        handler.stop()
    log.info("ended after %d passes", handler.loop.passes)


if __name__ == "__main__":
    main()
