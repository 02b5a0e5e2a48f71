"""The application that tests/integrations/test_celery_workers.py runs under real workers."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from dbscope import Database, current_scope
from dbscope.integrations.celery import CeleryScopes
from tests.support.kits import LIMIT, Account, Payment
from tests.support.web import wait_for
from tests.support.workers import settings

FOLDER = Path(os.environ["DBSCOPE_TEST_FOLDER"])
BACKEND = text("SELECT pg_backend_pid()")

app = Celery("tests.support.tasks", config_source=settings(FOLDER))
scopes = CeleryScopes(app, commit="on-success", send="after-commit")
db = Database(os.environ["DBSCOPE_TEST_URL"])

with db.transaction() as session:  # the pool of the process that forks has a connection
    PARENT = session.scalar(BACKEND)


def save(amount: int) -> int:
    """Write, and commit nothing."""
    payment = Payment(amount=amount)
    db.session.add(payment)
    db.session.flush()
    return payment.id


def hang() -> None:
    """Wait for what never comes."""
    threading.Event().wait(LIMIT)


@app.task
def book(amount: int) -> dict[str, Any]:
    """Say who booked."""
    save(amount)
    work = current_scope()
    assert work is not None
    return {"scope": work.name, "process": os.getpid(), "backend": db.session.scalar(BACKEND), "parent": PARENT}


@app.task
def fail(amount: int) -> None:
    """Write, and fail."""
    save(amount)
    raise KeyError("the task's")


@app.task
def uncommittable() -> None:
    """Leave to the commit what cannot be committed."""
    db.session.add_all([Account(name="same"), Account(name="same")])


@app.task(bind=True)
def again(self: Any, amount: int) -> int:
    """Write and retry, twice."""
    save(amount)
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@app.task(bind=True, autoretry_for=(IntegrityError,), retry_kwargs={"countdown": 0})
def mended(self: Any, amount: int) -> int:
    """Fail at the first commit, and not at the second."""
    save(amount)
    if self.request.retries == 0:
        uncommittable()
    return int(self.request.retries)


@app.task
def found(id: int) -> int | None:
    """Look for a row that another task has written."""
    payment = db.session.get(Payment, id)
    return None if payment is None else payment.amount


@app.task
def announce(amount: int, *, failing: bool = False) -> str:
    """Write, and send a task about it before the commit."""
    sent = found.delay(save(amount))
    if failing:
        raise KeyError("the task's")
    return str(sent.id)


@app.task
def together(amount: int, parties: int) -> None:
    """Write, and go on when as many others have; an odd amount fails then."""
    save(amount)
    (FOLDER / f"here-{amount}").touch()
    wait_for(lambda: len([*FOLDER.glob("here-*")]) >= parties)
    if amount % 2:
        raise KeyError("the task's")


@app.task(soft_time_limit=0.2)
def soft(amount: int) -> None:
    """Write, and take too long."""
    save(amount)
    hang()


@app.task(time_limit=0.2)
def hard(amount: int) -> None:
    """Write, and take too long to be asked."""
    save(amount)
    hang()


@app.task(acks_late=True, reject_on_worker_lost=True)
def lost(amount: int) -> str:
    """Write; the first time, the process is killed before the commit."""
    save(amount)
    marker = FOLDER / "lost"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done at last"
