"""Threads: what a job of an executor finds, what it is told, and what to give it instead."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text

from dbscope import ConfigurationError, OverlapError, ScopeEndedError, UncommittedWrites, current_scope, scope
from tests.support.kits import LIMIT, Payment, of_colour, twice


def test_a_job_of_an_executor_inherits_no_scope(sync_kit):
    """A job that is submitted in a scope works outside of it, on a session of its thread's own."""
    with scope("request"), ThreadPoolExecutor(1) as executor:
        mine = sync_kit.session()

        def job():
            return current_scope(), sync_kit.session()

        inherited, session = executor.submit(job).result(LIMIT)
        assert inherited is None
        assert session is not mine


def test_jobs_without_a_scope_share_their_threads_session(sync_kit):
    """The implicit scope is the thread's and not the job's: the next job finds the session as it was left; with the
    thread it is released, and reported if something was lost."""

    def job():
        session = sync_kit.session()
        session.add(Payment())
        session.flush()
        return session

    executor = ThreadPoolExecutor(1, "pool")
    assert executor.submit(job).result(LIMIT) is executor.submit(job).result(LIMIT)
    assert sync_kit.checked_out() == 1
    with pytest.warns(UncommittedWrites, match="scope 'thread pool_0'"):
        executor.shutdown()
    assert sync_kit.checked_out() == 0
    assert sync_kit.count() == 0


def test_a_job_under_the_decorator_has_a_scope_of_its_own(sync_kit):
    """`scope(…)(function)` is what to submit: one session for each job, given back at its end, committed if asked."""

    def job(amount):
        sync_kit.session().add(Payment(amount=amount))
        return sync_kit.session(), current_scope().name, current_scope().is_inside

    with scope("request"), ThreadPoolExecutor(1) as executor:
        sync_kit.session()
        pay = scope("pay", commit="on-success")(job)
        futures = [executor.submit(pay, amount) for amount in (1, 2)]
        [(first, name, inside), (second, _, _)] = [future.result(LIMIT) for future in futures]
        assert (name, inside) == ("pay", False)
        assert first is not second
    assert sync_kit.amounts() == [1, 2]


def test_a_failed_job_does_not_poison_the_next(sync_kit):
    """What one job under the decorator leaves broken is gone for the next one in the same thread."""

    @scope("pay", commit="on-success")
    def pay(amount):
        sync_kit.session().add(Payment(id=1, amount=amount))
        sync_kit.session().flush()

    with ThreadPoolExecutor(1) as executor:
        results = [executor.submit(pay, amount) for amount in (1, 2)]
        assert results[0].exception(LIMIT) is None
        assert type(results[1].exception(LIMIT)).__name__ == "IntegrityError"
        with scope():
            sync_kit.session().delete(sync_kit.session().get_one(Payment, 1))
            sync_kit.session().commit()
        assert executor.submit(pay, 3).exception(LIMIT) is None
    assert sync_kit.amounts() == [3]


def test_a_job_that_was_given_the_context_and_outlives_its_scope(sync_kit):
    """With a copy of the submitter's context a job is told when the scope has ended, and to open its own."""
    go = threading.Event()

    def job():
        assert go.wait(LIMIT)
        return sync_kit.session()

    with ThreadPoolExecutor(1, "pool") as executor:
        with scope("request"):
            future = executor.submit(contextvars.copy_context().run, job)
        go.set()
        error = future.exception(LIMIT)
    assert isinstance(error, ScopeEndedError)
    assert "'request'" in str(error)
    assert "'pool_0'" in str(error)
    assert "opens its own: `with scope(): ...`" in str(error)


def test_a_job_that_was_given_the_context_and_overlaps(sync_kit):
    """With a copy of the submitter's context a job shares the session: at the same moment, both are named."""
    started, go = threading.Event(), threading.Event()
    overlaps = []

    def slow(value):
        started.set()
        assert go.wait(LIMIT)
        return value

    def job():
        sync_kit.session().connection().connection.driver_connection.create_function("slow", 1, slow)
        sync_kit.session().execute(text("SELECT slow(1)"))

    with scope("request"), ThreadPoolExecutor(1, "pool") as executor:
        future = executor.submit(contextvars.copy_context().run, job)
        assert started.wait(LIMIT)
        try:
            sync_kit.session().scalars(select(Payment))
        except OverlapError as error:
            overlaps.append(str(error))
        go.set()
        future.result(LIMIT)
    [told] = overlaps
    assert "'MainThread'" in told
    assert "'pool_0'" in told
    assert "fan_out" in told


@twice
async def test_the_decorator_opens_a_scope_for_each_call(kit):
    """Sync or async, nested or not, under the function's own name or another; what it raises rolls back."""
    seen = []

    async def body(amount, error=None):
        seen.append((current_scope().name, kit.session()))
        kit.session().add(Payment(amount=amount))
        await kit.done(kit.session().flush())
        if error is not None:
            raise error

    work = scope(commit="on-success")(of_colour(kit, body))
    other = scope("other", commit="on-success")(of_colour(kit, body))
    async with kit.scope("outer") as outer:
        await kit.done(work(1))
        await kit.done(other(2))
        with pytest.raises(KeyError):
            await kit.done(work(3, KeyError("three")))
        assert current_scope() is outer
    assert [name.rpartition(".")[2] for name, _ in seen] == ["body", "other", "body"]
    assert len({id(session) for _, session in seen}) == 3
    assert work.__name__ == "body"
    assert kit.amounts() == [1, 2]


def test_the_decorator_refuses_what_would_run_outside():
    """A generator's lines run after its call, and so outside of the scope: refused where it is decorated."""
    with pytest.raises(ConfigurationError, match=r"rows is a generator.*the scope would be over"):

        @scope()
        def rows():
            yield

    with pytest.raises(ConfigurationError, match=r"@scope\(\) decorates functions, not 7"):
        scope()(7)
    with pytest.raises(ConfigurationError, match=r"@scope\(\) was put on a staticmethod"):
        scope()(staticmethod(len))
