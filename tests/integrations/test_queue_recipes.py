"""The recipes for tasks and jobs: what a page tells its reader to write passes the conformance kit here."""

import asyncio
import contextlib
import importlib
import itertools
import os
import queue
import subprocess
import sys

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from dbscope import current_scope, scope
from dbscope.conformance import LoopThread, Outcome
from tests.docs.test_pages import complaint, examples
from tests.integrations.test_recipes import PAGES, Recipe, recipe
from tests.support import needs
from tests.support.kits import LIMIT, Account, make_kit
from tests.support.redis import redis_server


class Tasks(Recipe):
    """What the recipes have in common: tasks answer nobody."""

    not_applicable = {"veto": "a task has no status", "streams": "a task has no response"}


def nothing_of(handler):
    """The handler as a task, whose result can be kept: it returns nothing."""
    if asyncio.iscoroutinefunction(handler):

        async def task():
            await handler()
    else:

        def task():
            handler()

    return task


def first_example(page):
    """The program with which a page begins."""
    return examples((PAGES / f"{page}.md").read_text(encoding="utf-8"))[0].code


# -- APScheduler -------------------------------------------------------------------------------------------------------


class Outcomes:
    """A listener: what a scheduler tells of each job, for one who waits for it."""

    def __init__(self, scheduler):
        from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED

        self.executed = EVENT_JOB_EXECUTED
        self.scheduler = scheduler
        self.ids = itertools.count()
        self.waiting = {}
        scheduler.add_listener(self.tell, EVENT_JOB_EXECUTED | EVENT_JOB_ERROR)

    def tell(self, event):
        self.waiting[event.job_id].put(event)

    def of(self, job, *args):
        """Run a job at once; what was told."""
        name = str(next(self.ids))
        told = self.waiting[name] = queue.SimpleQueue()
        self.scheduler.add_job(job, id=name, args=args, misfire_grace_time=None)  # late rather than not at all
        return told.get(timeout=LIMIT)

    def send(self, job):
        event = self.of(job)
        return Outcome(event.code == self.executed, error=event.exception)


class TestAPScheduler(Tasks):
    """Jobs of a scheduler that runs, in its threads."""

    scope_name = "{}"
    needed = ("apscheduler",)

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        from apscheduler.schedulers.background import BackgroundScheduler

        jobs = {name: scope(name, commit=commit)(handler) for name, handler in handlers.items()}
        scheduler = BackgroundScheduler(timezone="UTC")
        outcomes = Outcomes(scheduler)
        scheduler.start()
        try:
            yield lambda name: outcomes.send(jobs[name])
        finally:
            scheduler.shutdown()


class TestAPSchedulerOnALoop(Tasks):
    """Coroutine functions, which it runs as tasks of its loop."""

    scope_name = "{}"
    database = "async"
    needed = ("apscheduler",)

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        from apscheduler.schedulers.asyncio import AsyncIOScheduler

        jobs = {name: scope(name, commit=commit)(handler) for name, handler in handlers.items()}
        with LoopThread() as loop:
            scheduler = AsyncIOScheduler(timezone="UTC", event_loop=loop.loop)
            outcomes = Outcomes(scheduler)

            async def call(function):
                function()

            loop.run(call(scheduler.start))
            try:
                yield lambda name: outcomes.send(jobs[name])
            finally:
                loop.run(call(scheduler.shutdown))


def test_apscheduler_runs_a_decorated_job_in_another_process(tmp_path, monkeypatch):
    """It is found there by its name, as in a job store that keeps jobs; its work is committed, and its failure told."""
    needs.package("apscheduler")
    from apscheduler.executors.pool import ProcessPoolExecutor
    from apscheduler.schedulers.background import BackgroundScheduler

    (tmp_path / "reports.py").write_text(first_example("apscheduler"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    reports = importlib.import_module("reports")
    scheduler = BackgroundScheduler(timezone="UTC", executors={"default": ProcessPoolExecutor(1)})
    outcomes = Outcomes(scheduler)
    try:
        reports.Base.metadata.create_all(reports.db.engine)
        scheduler.start()
        assert scheduler.add_job(reports.count_orders, "cron", year=2999, args=[1]).func_ref == "reports:count_orders"
        told = [outcomes.of(reports.count_orders, 1) for _ in range(2)]  # the second one has the first one's number
        assert [event.retval for event in told] == ["0 orders, says count orders", None]
        assert type(told[1].exception).__name__ == "IntegrityError"
        with reports.db.reader() as session:
            assert session.scalars(select(reports.Report.number)).all() == [1]
    finally:
        if scheduler.running:
            scheduler.shutdown()
        reports.db.dispose()
        del sys.modules["reports"]


# -- dramatiq ----------------------------------------------------------------------------------------------------------


class Dramatiq:
    """A broker with a worker in this process, and what becomes of its messages."""

    def __init__(self, *middleware):
        import dramatiq
        from dramatiq.brokers.stub import StubBroker

        self.outcomes = {}

        class Tell(dramatiq.Middleware):
            def after_process_message(_, broker, message, *, result=None, exception=None):
                self.outcomes[message.message_id].put(Outcome(exception is None, error=exception))

        self.broker = StubBroker()
        for added in (Tell(), *middleware):
            self.broker.add_middleware(added)

    def actor(self, function, **options):
        import dramatiq

        return dramatiq.actor(function, broker=self.broker, **{"max_retries": 0} | options)

    @contextlib.contextmanager
    def working(self):
        import dramatiq

        worker = dramatiq.Worker(self.broker, worker_timeout=20, worker_threads=4)
        worker.start()
        try:
            yield self
        finally:
            worker.stop()

    def send(self, actor, *args, message_id):
        """Send a message; a function that waits for the outcome of its next attempt."""
        told = self.outcomes[message_id] = queue.SimpleQueue()
        self.broker.enqueue(actor.message(*args).copy(message_id=message_id))
        return lambda: told.get(timeout=LIMIT)


class TestDramatiq(Tasks):
    """Messages to a worker, by its threads."""

    scope_name = "{0}[{0}]"
    needed = ("dramatiq",)

    def app(self, commit):
        return Dramatiq(recipe("dramatiq").Scopes(commit=commit))

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        app = self.app(commit)
        actors = {name: app.actor(nothing_of(handler), actor_name=name) for name, handler in handlers.items()}
        with app.working():
            yield lambda name: app.send(actors[name], message_id=name)()


class TestDramatiqOnALoop(TestDramatiq):
    """Coroutine functions, by dramatiq's thread with a loop."""

    database = "async"

    def app(self, commit):
        return Dramatiq(needs.package("dramatiq.middleware").AsyncIO(), recipe("dramatiq").Scopes(commit=commit))


@pytest.fixture
def dramatiq_app():
    """A broker with the page's scopes, which commit on success."""
    needs.package("dramatiq")
    return Dramatiq(recipe("dramatiq").Scopes(commit="on-success"))


def test_dramatiq_retries_after_a_commit_that_failed(dramatiq_app, sync_kit):
    """The commit is the actor's, for `Retries` as well: the next attempt has a scope of its own, and starts clean."""
    seen = []

    def book():
        seen.append(current_scope())
        sync_kit.session().add_all([Account(name="same") for _ in range(3 - len(seen))])

    actor = dramatiq_app.actor(book, max_retries=1, min_backoff=1, max_backoff=2)
    with dramatiq_app.working():
        told = dramatiq_app.send(actor, message_id="7")
        assert type(told().error) is IntegrityError
        assert told().ok
    assert [work.name for work in seen] == ["book[7]", "book[7]"]
    assert seen[0] is not seen[1]
    assert sync_kit.count(Account) == 1


def test_dramatiq_takes_a_called_actor_for_a_part_of_its_caller(dramatiq_app):
    """It has the caller's scope, with which it is committed or rolled back; outside of a worker it has none."""
    seen = []

    @dramatiq_app.actor
    def part():
        seen.append(current_scope())

    @dramatiq_app.actor
    def whole():
        seen.append(current_scope())
        part()

    part()
    with dramatiq_app.working():
        assert dramatiq_app.send(whole, message_id="7")().ok
        assert dramatiq_app.send(part, message_id="8")().ok
    assert [work and work.name for work in seen] == [None, "whole[7]", "whole[7]", "part[8]"]
    assert seen[1] is seen[2]


def test_dramatiq_actors_of_earlier_have_scopes_too():
    """The middleware takes the actors that are there when it is added."""
    needs.package("dramatiq")
    app, seen = Dramatiq(), []

    @app.actor
    def early():
        seen.append(current_scope().name)

    app.broker.add_middleware(recipe("dramatiq").Scopes())
    with app.working():
        assert app.send(early, message_id="7")().ok
    assert seen == ["early[7]"]


# -- taskiq ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def taskiq_broker(loop, *middlewares):
    """A broker that runs its tasks on the loop, and in threads, and hands their results over."""
    from taskiq import InMemoryBroker

    broker = InMemoryBroker()
    broker.add_middlewares(*middlewares)
    loop.run(broker.startup())
    try:
        yield broker
    finally:
        loop.run(broker.shutdown())


async def outcome_of(task, task_id):
    """Send a task, and wait for what is kept of it."""
    sent = await task.kicker().with_task_id(task_id).kiq()
    result = await sent.wait_result(check_interval=0.005, timeout=LIMIT)
    del task.broker.result_backend.results[task_id]  # the next one has the same id
    return Outcome(not result.is_err, error=result.error)


class TestTaskiq(Tasks):
    """Coroutine functions, as tasks of a loop."""

    scope_name = "{0}[{0}]"
    database = "async"
    needed = ("taskiq",)

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        with LoopThread() as loop, taskiq_broker(loop, recipe("taskiq").Scopes(commit=commit)) as broker:
            tasks = {name: broker.register_task(nothing_of(handler), name) for name, handler in handlers.items()}
            yield lambda name: loop.run(outcome_of(tasks[name], name))


class TestTaskiqWithASyncDatabase(TestTaskiq):
    """Functions that are no coroutine functions, which taskiq runs in threads."""

    database = "sync"


def test_taskiq_retries_after_a_commit_that_failed(sync_kit):
    """The commit is the task's, for the retry middleware as well: the next attempt has a scope of its own."""
    needs.package("taskiq")
    from taskiq import SimpleRetryMiddleware

    seen = []

    def book():
        seen.append(current_scope())
        sync_kit.session().add_all([Account(name="same") for _ in range(3 - len(seen))])

    scopes = recipe("taskiq").Scopes(commit="on-success")
    with LoopThread() as loop, taskiq_broker(loop, SimpleRetryMiddleware(), scopes) as broker:
        task = broker.register_task(book, "book", retry_on_error=True, max_retries=2)
        assert loop.run(outcome_of(task, "7")).ok
    assert [work.name for work in seen] == ["book[7]", "book[7]"]
    assert seen[0] is not seen[1]
    assert sync_kit.count(Account) == 1


def test_taskiq_takes_a_called_task_for_a_part_of_its_caller():
    """It has the caller's scope, with which it is committed or rolled back; outside of a worker it has none."""
    needs.package("taskiq")
    seen = []

    with LoopThread() as loop, taskiq_broker(loop, recipe("taskiq").Scopes()) as broker:

        @broker.task("part")
        async def part():
            seen.append(current_scope())

        @broker.task("whole")
        async def whole():
            seen.append(current_scope())
            await part()

        loop.run(part())
        for task, task_id in ((part, "6"), (whole, "7"), (part, "8")):
            assert loop.run(outcome_of(task, task_id)).ok
    assert [work and work.name for work in seen] == [None, "part[6]", "whole[7]", "whole[7]", "part[8]"]
    assert seen[2] is seen[3]


# -- RQ ----------------------------------------------------------------------------------------------------------------

HANDLERS = {}


def handle(name):
    """A job of RQ's, which is sent by its name."""
    return HANDLERS[name]()


@pytest.fixture(scope="module")
def redis_url():
    """A Redis for the tests of this module."""
    with redis_server() as url:
        yield url


def runs_as_shown(page, redis_url, folder):
    """Run the two files of a page, `shop.py` and `run.py`, in an empty folder."""
    shop, run = examples((PAGES / f"{page}.md").read_text(encoding="utf-8"))
    for name, example in (("shop.py", shop), ("run.py", run)):
        (folder / name).write_text(example.code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "run.py"],
        cwd=folder,
        env=os.environ | {"REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert complaint(run, done.stdout) is None


class RQ:
    """A queue, and a worker that performs its jobs in this process."""

    def __init__(self, url, commit):
        from redis import Redis
        from rq import Queue

        class ScopedJob(recipe("rq").ScopedJob):
            pass

        ScopedJob.commit = commit
        self.job_class = ScopedJob
        self.connection = Redis.from_url(url)
        self.queue = Queue("conformance", connection=self.connection)

    def send(self, name, **options):
        """Enqueue a handler under its name, and work until there is nothing to do."""
        from rq import SimpleWorker

        raised = []
        job = self.queue.enqueue(handle, name, job_id=name, **options)
        worker = SimpleWorker(
            [self.queue],
            connection=self.connection,
            job_class=self.job_class,
            exception_handlers=[lambda job, kind, error, trace: raised.append(error)],
        )
        worker.work(burst=True, logging_level="CRITICAL")
        return Outcome(job.is_finished, error=raised[-1] if raised else None)


class TestRQ(Tasks):
    """Jobs of a worker that does not fork: the kit looks at what they have seen."""

    scope_name = f"{__name__}.handle[{{}}]"
    not_applicable = Tasks.not_applicable | {"together": "a worker does one job at a time"}
    needed = ("rq", "fakeredis")

    @pytest.fixture(autouse=True)
    def _redis(self, redis_url):
        self.redis_url = redis_url

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        HANDLERS.update({name: nothing_of(handler) for name, handler in handlers.items()})
        rq = RQ(self.redis_url, commit)
        try:
            yield rq.send
        finally:
            HANDLERS.clear()
            rq.connection.close()


@pytest.mark.parametrize("asked", ["by a commit that fails", "by what it returns"])
def test_rq_retries_after_a_rollback(redis_url, sync_kit, monkeypatch, asked):
    """An attempt is undone when RQ enqueues the next one, which has a scope of its own, and starts clean."""
    needs.package("rq")
    from rq import Retry

    seen = []

    def book():
        seen.append(current_scope())
        clash = len(seen) == 1 and asked == "by a commit that fails"
        sync_kit.session().add_all([Account(name="same") for _ in range(1 + clash)])
        return Retry(max=1) if len(seen) == 1 and not clash else None

    monkeypatch.setitem(HANDLERS, "book", book)
    rq = RQ(redis_url, "on-success")
    assert rq.send("book", **({"retry": Retry(max=1)} if "commit" in asked else {})).ok
    rq.connection.close()
    assert len({id(work) for work in seen}) == 2
    assert sync_kit.count(Account) == 1


def test_rq_performs_the_jobs_of_the_page_in_forked_processes(redis_url, tmp_path):
    """What the page's two files print, run as a reader would, is what the page shows."""
    needs.package("rq")
    runs_as_shown("rq", redis_url, tmp_path)


def test_rq_worker_takes_the_class_of_jobs_from_its_command_line(redis_url, tmp_path):
    """`rq worker --job-class` is all that a worker needs."""
    needs.package("rq")
    (tmp_path / "shop.py").write_text(first_example("rq"), encoding="utf-8")
    from redis import Redis
    from rq import Queue

    create = "import shop; shop.Base.metadata.create_all(shop.db.engine); shop.db.dispose()"
    subprocess.run([sys.executable, "-c", create], cwd=tmp_path, check=True, timeout=LIMIT)
    with Redis.from_url(redis_url) as connection:
        job = Queue("line", connection=connection).enqueue("shop.careless")
        command = [sys.executable, "-m", "rq.cli", "worker", "line", "--burst", "--job-class", "shop.ScopedJob"]
        done = subprocess.run(
            [*command, "--url", redis_url, "--path", "."], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr
        assert job.is_failed, done.stderr
        assert "IntegrityError" in job.latest_result().exc_string


# -- arq ---------------------------------------------------------------------------------------------------------------


arq_warns = pytest.mark.filterwarnings("ignore:Call to:DeprecationWarning")  # by what it asks of its client


def needs_arq():
    """arq wants an older client of Redis than RQ, and so is not among the suite's requirements: see the page."""
    try:
        import arq  # noqa: F401
    except ModuleNotFoundError:
        needs.spare("needs arq, which is installed in an environment of its own: docs/how-to/arq.md")


class TestArqsDecorator(Tasks):
    """The page's decorator, by itself: its functions are called as arq's worker calls them, in a task of its own."""

    scope_name = "{0}[{0}]"
    database = "async"

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        functions = {name: self.function(handler, commit) for name, handler in handlers.items()}

        async def work(name):
            task = asyncio.create_task(functions[name]({"job_id": name}))
            try:
                await asyncio.wait_for(task, self.limit)
            except Exception as error:
                return Outcome(False, error=error)
            return Outcome(True)

        with LoopThread() as loop:
            yield lambda name: loop.run(work(name))

    def function(self, handler, commit):
        async def job(ctx):
            await handler()

        job.__name__ = job.__qualname__ = handler.__name__
        return recipe("arq").scoped(commit=commit)(job)


class Arq:
    """A pool of connections, and a worker in a task of the loop's."""

    def __init__(self, loop, url, functions):
        from arq import create_pool
        from arq.connections import RedisSettings
        from arq.worker import Worker

        self.loop = loop

        async def start():
            self.redis = await create_pool(RedisSettings.from_dsn(url))
            self.worker = Worker(functions, redis_pool=self.redis, poll_delay=0.01, handle_signals=False)
            self.task = asyncio.create_task(self.worker.async_run())

        loop.run(start())

    def send(self, name, *args):
        """Send a job, which has its function's name for an id; what became of it."""

        async def send():
            job = await self.redis.enqueue_job(name, *args, _job_id=name)
            info = await job.result_info() if await self.over(job) else None
            await self.redis.delete(f"arq:result:{name}")  # the next one has the same id
            return Outcome(info.success, error=None if info.success else info.result)

        return self.loop.run(send())

    async def over(self, job):
        with contextlib.suppress(Exception):
            await job.result(timeout=LIMIT, poll_delay=0.01)
        return True

    def close(self):
        async def close():
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task
            await self.worker.close()

        self.loop.run(close())


@contextlib.contextmanager
def arq_at_work(url, functions):
    """A worker of these functions, which has stopped after the block."""
    with LoopThread() as loop:
        app = Arq(loop, url, functions)
        try:
            yield app
        finally:
            app.close()


@arq_warns
class TestArq(TestArqsDecorator):
    """Jobs of a worker of arq's."""

    @pytest.fixture(autouse=True)
    def _redis(self, redis_url):
        self.redis_url = redis_url

    @classmethod
    def setup_class(cls):
        super().setup_class()
        needs_arq()

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        with arq_at_work(self.redis_url, [self.function(handler, commit) for handler in handlers.values()]) as app:
            yield app.send


@arq_warns
def test_arq_retries_after_a_rollback(redis_url, tmp_path):
    """`Retry` undoes the attempt; the next one has a scope of its own, and what a job calls is a part of its work."""
    needs_arq()
    from arq import Retry

    kit = make_kit("async", f"sqlite:///{tmp_path / 'test.db'}")
    seen = []
    scoped = recipe("arq").scoped(commit="on-success")

    @scoped
    async def save(ctx):
        seen.append(current_scope())
        kit.session().add(Account(name="same"))
        await kit.session().flush()

    async def book(ctx):
        seen.append(current_scope())
        await save(ctx)
        if ctx["job_try"] == 1:
            raise Retry(defer=0)

    book.__qualname__ = "book"
    with arq_at_work(redis_url, [scoped(book)]) as app:
        assert app.send("book").ok
        app.loop.run(kit.db.dispose())
    assert [work.name for work in seen] == ["book[book]"] * 4
    assert len({id(work) for work in seen}) == 2
    assert kit.count(Account) == 1


def test_arq_performs_the_jobs_of_the_page(redis_url, tmp_path):
    """What the page's two files print, run as a reader would, is what the page shows."""
    needs_arq()
    runs_as_shown("arq", redis_url, tmp_path)
