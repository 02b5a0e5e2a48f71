"""Work that is no request: a job handler with a scope for each pass, and a pool of workers with one for each piece."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from sqlalchemy import func, select, update

from dbscope import Loop
from dbscope.cli.demo.books import Job, Order, Payment, Receipt, book
from dbscope.cli.demo.log import name_of

if TYPE_CHECKING:
    from dbscope.cli.demo.bank import Bank

__all__ = ["JobHandler", "ReceiptPool"]

__dbscope_user_code__ = True  # errors name the lines of these functions, as they would a user's


class JobHandler:
    """Takes one job after the other: standing orders, and now and then one that cannot be done (failure 8)."""

    def __init__(self, bank: "Bank") -> None:
        self.bank = bank
        self.loop = Loop(self.one_pass, interval=0.2, name="job handler", on_error=self.failed)
        self.done = 0
        self.given_up = 0
        self._job: str | None = None
        self._thread = threading.Thread(target=self.loop.run, name="job handler", daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Finish the running pass."""
        self.loop.stop()
        self._thread.join(timeout)

    def seen(self) -> int:
        """How many jobs it is through with."""
        return self.done + self.given_up

    def waiting(self) -> int:
        """How many jobs are yet to be done."""
        with self.bank.db.reader() as session:
            return session.scalar(select(func.count()).where(Job.state == "waiting")) or 0

    def one_pass(self) -> None:
        """Do the oldest job, if there is one; each pass has a scope of its own."""
        db = self.bank.db
        self.bank.watch.scope()
        self._job = None
        with db.reader() as session:
            job = session.scalars(select(Job).where(Job.state == "waiting").order_by(Job.id).limit(1)).first()
        if job is None:
            return
        self._job = job.id
        if job.broken:
            # The mistake: an error in the middle, no rollback, and with one session for all passes every later one
            # would fail, too.
            twice = [Payment(id=job.id, payee=job.payee, amount=job.amount) for _ in range(2)]
            db.session.add_all(twice)
            db.session.flush()
        with db.transaction() as session:
            book(session, Order(job.id, None, job.payee, job.amount))
            session.execute(update(Job).where(Job.id == job.id).values(state="done"))
            db.on_commit(self.bank.receipts.put, job.id)
        self.done += 1
        self.loop.wake()  # there may be more

    def failed(self, error: Exception) -> None:
        """A pass has failed: say so, in a scope of its own."""
        name = name_of(error)
        if self._job is None:
            self.bank.watch.failed(name)
            return
        self.bank.log.failed(self._job, error)
        try:
            with self.bank.scope("job that failed"), self.bank.db.transaction() as session:
                session.execute(update(Job).where(Job.id == self._job).values(state=f"failed: {name}"))
            self.given_up += 1
            self.loop.wake()
        except Exception as worse:  # as happens without dbscope: the session is still in the first failure
            self.bank.watch.failed(name_of(worse))


class ReceiptPool:
    """Threads that write a receipt for each payment that was committed: told so by `on_commit`, never before."""

    def __init__(self, bank: "Bank") -> None:
        self.bank = bank
        self.done = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="receipts")

    def put(self, payment: str) -> None:
        """A payment is booked."""
        self._threads.submit(self._write, payment).add_done_callback(self._through)

    def stop(self) -> None:
        """Write what is still to be written."""
        self._threads.shutdown()

    def _write(self, payment: str) -> None:
        with self.bank.scope("receipt"), self.bank.db.transaction() as session:
            self.bank.watch.scope()
            session.add(Receipt(payment=payment))

    def _through(self, written: "Future[None]") -> None:
        error = written.exception()
        if error is None:
            self.done += 1
        else:
            self.bank.watch.failed(name_of(error))
