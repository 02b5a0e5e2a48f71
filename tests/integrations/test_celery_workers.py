"""Celery under real workers, one for each kind of pool: what is saved, what is not, and what is left behind."""

import contextlib
import sqlite3
from collections import Counter

import pytest
from sqlalchemy import NullPool, create_engine, make_url, select, text

from tests.support import needs
from tests.support.kits import Base, Payment
from tests.support.web import wait_for

pytestmark = pytest.mark.programs

celery = needs.module("celery", extra="celery")
workers = needs.module("tests.support.workers", extra="celery")
needs.module("psycopg", extra="postgresql")

TASKS = "tests.support.tasks"


class Pool:
    """A worker with a pool of one kind, and the database that its tasks write to."""

    def __init__(self, kind, worker, engine):
        self.kind = kind
        self.worker = worker
        self.engine = engine

    def send(self, task, *args):
        return self.worker.send(f"{TASKS}.{task}", *args)

    def run(self, task, *args):
        return self.worker.run(f"{TASKS}.{task}", *args)

    def outcome(self, result):
        return self.worker.outcome(result)

    def amounts(self):
        with self.engine.connect() as connection:
            return sorted(connection.scalars(select(Payment.amount)))

    def clients(self):
        """The state and process of each of the worker's connections."""
        query = text(
            "SELECT pid, state FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'worker'"
        )
        with self.engine.connect() as connection:
            return {row.pid: row.state for row in connection.execute(query)}


@pytest.fixture(scope="module")
def pools(postgres, tmp_path_factory):
    """A worker for each kind of pool, started when a test first asks for it."""
    with contextlib.ExitStack() as stack:
        running = {}

        def pool(kind):
            if kind not in running:
                url = make_url(postgres.url(database=postgres.create_database()))
                engine = create_engine(url, poolclass=NullPool)
                Base.metadata.create_all(engine)
                folder = tmp_path_factory.mktemp(kind)
                theirs = url.update_query_dict({"application_name": "worker"}).render_as_string(hide_password=False)
                options = ["--max-tasks-per-child", "6"] if kind == "prefork" else []
                worker = stack.enter_context(
                    workers.celery_worker(folder, TASKS, kind, "--concurrency", "2", *options, DBSCOPE_TEST_URL=theirs)
                )
                running[kind] = Pool(kind, worker, engine)
            return running[kind]

        yield pool
        for one in running.values():
            one.worker.process.terminate()  # all at once: each takes its time


@pytest.mark.parametrize("kind", ["prefork", "threads", "solo", "gevent"])
def test_failures_14_in_every_pool_a_task_is_saved_whole_or_not_at_all(pools, kind):
    """Committed before its success is told, and before what it sends; rolled back when it fails, retries, or its commit
    fails; two that wait for each other in the middle have a connection each; nothing stays."""
    if kind == "gevent":
        needs.module("gevent", extra="celery")
    pool = pools(kind)
    before = pool.amounts()
    sent = pool.send("book", 1)
    state, said = pool.outcome(sent)
    assert (state, said["scope"]) == ("SUCCESS", f"{TASKS}.book[{sent.id}]")
    assert pool.run("fail", 2)[0] == "FAILURE"
    state, error = pool.run("uncommittable")
    assert (state, "duplicate key" in str(error)) == ("FAILURE", True)
    assert pool.run("again", 3) == ("SUCCESS", 2)
    assert pool.run("mended", 4) == ("SUCCESS", 1)
    state, id = pool.run("announce", 5)
    assert (state, pool.outcome(pool.worker.app.AsyncResult(id))) == ("SUCCESS", ("SUCCESS", 5))
    if kind != "solo":
        results = [pool.send("together", amount, 2) for amount in (6, 7)]
        assert [pool.outcome(result)[0] for result in results] == ["SUCCESS", "FAILURE"]
    expected = [1, 3, 4, 5, *([6] if kind != "solo" else [])]
    assert Counter(pool.amounts()) - Counter(before) == Counter(expected)
    wait_for(lambda: "idle in transaction" not in pool.clients().values())


def test_failures_15_forked_processes_share_no_connection(pools):
    """Each has its own, and none has the one that the worker had before it forked, be it replaced after some tasks."""
    pool = pools("prefork")
    said = [pool.outcome(result)[1] for result in [pool.send("book", 30) for _ in range(20)]]
    backends = {}
    for one in said:
        backends.setdefault(one["backend"], set()).add(one["process"])
    assert len({one["process"] for one in said}) > 2  # of a pool of two: --max-tasks-per-child
    assert all(len(processes) == 1 for processes in backends.values())
    (parent,) = {one["parent"] for one in said}
    assert parent not in backends
    wait_for(lambda: len(pool.clients()) <= 3)  # the parent's, and one for each process that is alive


def test_time_limits_undo_the_work(postgres_url, tmp_path):
    """A soft one is an error in the task; a hard one kills its process, and the server drops the connection.

    In a worker of its own: on a busy machine Celery's own may be of no use after it has killed a process.
    """
    engine = create_engine(postgres_url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    theirs = make_url(postgres_url).update_query_dict({"application_name": "worker"}).render_as_string()
    options = ("--concurrency", "2")
    with workers.celery_worker(tmp_path, TASKS, "prefork", *options, kill=True, DBSCOPE_TEST_URL=theirs) as worker:
        pool = Pool("prefork", worker, engine)
        soft, hard = pool.send("soft", 40), pool.send("hard", 41)
        assert type(pool.outcome(soft)[1]).__name__ == "SoftTimeLimitExceeded"
        assert type(pool.outcome(hard)[1]).__name__ == "TimeLimitExceeded"
        wait_for(lambda: "idle in transaction" not in pool.clients().values())
    assert pool.amounts() == []


def test_a_task_that_is_acknowledged_late_is_saved_once(pools):
    """Its process is killed before the commit: it is done again, and what it did at first is gone."""
    pool = pools("prefork")
    assert pool.run("lost", 50) == ("SUCCESS", "done at last")
    assert pool.amounts().count(50) == 1


def test_two_workers_on_rabbitmq_save_each_task_once(postgres, postgres_url, tmp_path):
    """Between them they run all that was sent; what is told as a success is saved, and nothing else is."""
    broker = "amqp://guest:guest@127.0.0.1:5672//"
    if not workers.answers(broker):
        needs.spare("no RabbitMQ answers on 127.0.0.1; the other tests of this page use files for messages")
    (tmp_path / "broker").write_text(broker)
    engine = create_engine(postgres_url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    with contextlib.ExitStack() as stack:
        first, _ = (
            stack.enter_context(
                workers.celery_worker(
                    *(tmp_path, TASKS, "prefork", "--concurrency", "2", "--hostname", name),
                    DBSCOPE_TEST_URL=postgres_url,
                )
            )
            for name in ("first@host", "second@host")
        )
        sent = [first.send(f"{TASKS}.{'fail' if amount % 4 == 0 else 'book'}", amount) for amount in range(40)]
        outcomes = [first.outcome(result) for result in sent]
    assert [state for state, _ in outcomes] == ["FAILURE" if amount % 4 == 0 else "SUCCESS" for amount in range(40)]
    assert len({said["process"] for state, said in outcomes if state == "SUCCESS"}) > 2
    with engine.connect() as connection:
        assert sorted(connection.scalars(select(Payment.amount))) == [n for n in range(40) if n % 4]


def test_the_application_of_the_page_runs_under_a_worker(tmp_path):
    """As `celery -A shop worker` would run it, but for the broker: what an order sends finds the order."""
    page = (workers.ROOT / "docs" / "how-to" / "celery.md").read_text(encoding="utf-8")
    (tmp_path / "shop.py").write_text(page.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    (tmp_path / "shop_here.py").write_text(
        "import os, pathlib, shop, tests.support.workers\n"
        "app = shop.app\n"
        "app.conf.update(tests.support.workers.settings(pathlib.Path(os.environ['DBSCOPE_TEST_FOLDER'])))\n",
        encoding="utf-8",
    )
    with workers.celery_worker(tmp_path, "shop_here", "prefork", "--concurrency", "2", cwd=tmp_path) as worker:
        orders = [worker.send("shop.order", item) for item in ("tea", "cake", "tea")]
        assert sorted(worker.outcome(order)[0] for order in orders) == ["FAILURE", "SUCCESS", "SUCCESS"]
        wait_for(lambda: packed(tmp_path / "shop.db") == ["cake", "tea"])


def packed(file):
    """The items of the orders that are packed."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return [item for (item,) in connection.execute("SELECT item FROM orders WHERE packed ORDER BY item")]
