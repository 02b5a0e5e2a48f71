"""Celery in this process: a scope for each task, and messages that wait for the commit. For real workers, see
tests/integrations/test_celery_workers.py."""

import itertools
import threading
import warnings
from importlib import metadata
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import sessionmaker

from dbscope import (
    ConfigurationError,
    GuardError,
    PartialCommit,
    SentBeforeCommit,
    UncommittedWrites,
    current_scope,
    guards,
    scope,
)
from dbscope.compat import RequestSessions, scoped_session
from dbscope.testing import capture_on_commit
from tests.support import needs
from tests.support.kits import LIMIT, Account, Payment, twice

celery: Any = needs.module("celery", extra="celery")
exceptions: Any = needs.module("celery.exceptions", extra="celery")
scopes: Any = needs.module("dbscope.integrations.celery", extra="celery")
errors: Any = needs.module("kombu.exceptions", extra="celery")
kombu: Any = needs.module("kombu.simple", extra="celery")

_names = (f"queue-{number}" for number in itertools.count())


@pytest.fixture
def app(monkeypatch):
    """An application without tasks; its broker is in memory."""
    # Where `shared_task`, and by default `app.task`, are kept for every application that there ever will be.
    state = needs.module("celery._state", extra="celery")
    monkeypatch.setattr(state, "_on_app_finalizers", set(state._on_app_finalizers))
    app = celery.Celery("shop", backend="cache+memory://", set_as_current=False)
    app.conf.broker_transport = "tests.support.workers:Memory"
    app.conf.broker_transport_options = {"polling_interval": 0.01}
    app.conf.task_default_queue = next(_names)
    with app:
        yield app


def sent(app):
    """The names of the tasks that are in the queue, which is empty afterwards."""
    names = []
    with app.connection_for_read() as connection:
        with kombu.SimpleQueue(connection, app.conf.task_default_queue) as queue:
            while queue.qsize():
                message = queue.get(block=False)
                names.append(message.headers["task"])
                message.ack()
    return names


def save(kit, amount=500):
    """Write, and commit nothing."""
    kit.session().add(Payment(amount=amount))
    kit.session().flush()


def save_the_same_twice(kit):
    """Leave to the commit what cannot be committed."""
    kit.session().add_all([Account(name="same"), Account(name="same")])


# -- a task ------------------------------------------------------------------------------------------------------------


def test_a_task_has_a_scope_named_by_it_and_its_id(app, sync_kit):
    """Which ends with it; the application may rename it, and its place is the function."""

    @app.task(name="shop.book")
    def book():
        work = current_scope()
        described = work.describe()
        work.name = "a booking"
        return work, described, work.name, sync_kit.session().scalar(text("SELECT 1"))

    scopes.CeleryScopes(app)
    result = book.apply(task_id="7")
    work, described, name, _ = result.get()
    assert (described[:22], name) == ("scope 'shop.book[7]' (", "a booking")
    assert f"test_celery.py:{book.run.__wrapped__.__code__.co_firstlineno}" in described
    assert work.ended
    assert (sync_kit.checked_out(), current_scope()) == (0, None)


@pytest.mark.parametrize("declared", ["before", "before, and used", "later", "much later", "as a class", "shared"])
def test_every_task_of_the_application_has_one(app, declared):
    """Whenever and however it was declared."""

    def name(self):
        return current_scope().name

    def declare():
        if declared == "as a class":
            made = type("name", (celery.Task,), {"run": name, "name": "shop.name"})
            return app.register_task(made())
        return (celery.shared_task if declared == "shared" else app.task)(bind=True, name="shop.name")(name)

    if declared.startswith("before"):
        task = declare()
        if declared.endswith("used"):
            assert task.name == "shop.name"
        scopes.CeleryScopes(app)
    else:
        scopes.CeleryScopes(app)
        if declared == "much later":
            app.finalize()
        task = declare()
    with app:
        assert app.tasks["shop.name"].apply(task_id="7").get() == "shop.name[7]"
        if declared != "shared":  # whose promise looks for the current application, and that is another test's
            assert task.apply(task_id="8").get() == "shop.name[8]"


def test_by_default_the_tasks_commit_by_themselves(app, sync_kit):
    """What nobody committed is rolled back and reported."""

    @app.task
    def kept():
        with sync_kit.db.transaction() as session:
            session.add(Payment())

    @app.task
    def forgotten():
        save(sync_kit)

    scopes.CeleryScopes(app)
    assert kept.apply().successful()
    with pytest.warns(UncommittedWrites, match=r"forgotten\["):
        forgotten.apply()
    assert sync_kit.count() == 1


@pytest.mark.parametrize(
    "outcome",
    [
        ZeroDivisionError("the task's"),
        exceptions.Ignore("enough"),
        exceptions.Reject("not mine"),
        exceptions.Retry("later"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_leaves_a_task_by_an_exception_is_rolled_back(app, sync_kit, outcome):
    """Celery's own are no success either; each reaches Celery as it is."""
    seen = []

    @app.task
    def leave():
        save(sync_kit)
        try:
            raise outcome
        except BaseException as error:
            seen.append(error)
            raise

    scopes.CeleryScopes(app, commit="on-success")
    try:
        state = leave.apply().state
    except KeyboardInterrupt as error:
        state, seen = "INTERRUPTED", [error, *seen[1:]]
    names = {"ZeroDivisionError": "FAILURE", "Ignore": "IGNORED", "Reject": "REJECTED", "Retry": "RETRY"}
    assert state == names.get(type(outcome).__name__, "INTERRUPTED")
    assert seen == [outcome]
    assert (sync_kit.count(), sync_kit.checked_out(), current_scope()) == (0, 0, None)


def test_a_commit_that_fails_is_the_failure_of_the_task(app, sync_kit):
    """No success is recorded, no callback is sent, and `autoretry_for` sees it."""
    attempts, signals = [], []
    on_success = celery.signals.task_success.connect(lambda **_: signals.append("success"), weak=False)
    try:

        @app.task
        def once():
            save_the_same_twice(sync_kit)

        @app.task(bind=True, autoretry_for=(Exception,), retry_backoff=0, retry_kwargs={"countdown": 0})
        def mended(self):
            attempts.append(self.request.retries)
            save(sync_kit)
            if not self.request.retries:
                save_the_same_twice(sync_kit)

        @app.task
        def callback(value):
            signals.append("callback")

        scopes.CeleryScopes(app, commit="on-success")
        assert type(once.apply(link=callback.s()).result).__name__ == "IntegrityError"
        assert (signals, sync_kit.count()) == ([], 0)
        assert mended.apply().successful()
        assert (attempts, sync_kit.count()) == ([0, 1], 1)
    finally:
        celery.signals.task_success.disconnect(on_success)


def test_a_callback_finds_what_was_committed(app, sync_kit):
    """`link` and chains go on after the commit."""
    found = []

    @app.task
    def book():
        save(sync_kit)

    @app.task
    def callback(value):
        found.append(sync_kit.count())

    scopes.CeleryScopes(app, commit="on-success")
    app.conf.task_always_eager = True
    celery.chain(book.s(), callback.s()).apply()
    book.apply(link=callback.s())
    assert found == [1, 2]


def test_a_retry_starts_clean(app, sync_kit):
    """Whatever the attempts before it wrote is gone, and their sessions are over."""
    sessions = []

    @app.task(bind=True)
    def again(self):
        sessions.append(sync_kit.session())
        save(sync_kit)
        if self.request.retries < 2:
            raise self.retry(countdown=0)

    scopes.CeleryScopes(app, commit="on-success")
    assert again.apply().successful()
    assert (len(set(map(id, sessions))), sync_kit.count()) == (3, 1)


def test_a_task_inside_a_task(app, sync_kit):
    """Applied, it is work of its own, and has a scope; called as a function, it is a part of its caller's."""
    found = []

    @app.task(bind=True)
    def inner(self, depth=0):
        found.append((sync_kit.session(), current_scope().name.partition("[")[0].rpartition(".")[2]))
        if depth:
            self(depth - 1)

    @app.task
    def outer():
        inner(1)
        inner.apply(args=(1,)).get()
        found.append((sync_kit.session(), "outer"))

    scopes.CeleryScopes(app, commit="on-success")
    outer.apply().get(disable_sync_subtasks=False)
    sessions, names = zip(*found, strict=True)
    assert names == ("outer", "outer", "inner", "inner", "outer")
    assert [session is sessions[0] for session in sessions] == [True, True, False, False, True]
    assert sessions[2] is sessions[3]
    assert current_scope() is None
    with scope("a script"):
        mine = sync_kit.session()
        found.clear()
        inner(0)
        assert found[0][0] is mine


def test_a_task_whose_class_has_a_call_of_its_own(app, sync_kit):
    """It is called around the scope, as it is around the function."""
    seen = []

    class Base(celery.Task):
        def __call__(self, *args, **kwargs):
            seen.append(current_scope())
            result = super().__call__(*args, **kwargs)
            seen.append(sync_kit.count())
            return result

    @app.task(base=Base)
    def book():
        save(sync_kit)

    scopes.CeleryScopes(app, commit="on-success")
    book.apply().get()
    assert seen == [None, 1]


# -- sending -----------------------------------------------------------------------------------------------------------


def notify_of(app):
    """A task that is sent."""

    @app.task(name="shop.notify")
    def notify(id=0):
        return id

    return notify


WAYS = {
    "delay": lambda app, notify: notify.delay(1),
    "apply_async": lambda app, notify: notify.apply_async((1,), countdown=1),
    "send_task": lambda app, notify: app.send_task("shop.notify", (1,)),
    "signature": lambda app, notify: celery.signature("shop.notify", (1,), app=app).delay(),
    "unknown here": lambda app, notify: celery.signature("elsewhere", (1,), app=app).delay(),
    "chain": lambda app, notify: (notify.s(1) | notify.s()).delay(),
    "group": lambda app, notify: celery.group([notify.s(1), notify.s(2)], app=app).delay(),
    "chord": lambda app, notify: celery.chord([notify.s(1), notify.s(2)], app=app)(notify.s()),
}
IN_THE_QUEUE = {"group": 2, "chord": 2}


@pytest.mark.parametrize("way", WAYS)
def test_failures_14_what_is_sent_in_a_transaction_waits_for_its_commit(app, sync_kit, way):
    """However it is sent; and it is not sent if the transaction is rolled back."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    with sync_kit.db.transaction():
        result = WAYS[way](app, notify)
        assert result is not None
        assert sent(app) == []
    assert len(sent(app)) == IN_THE_QUEUE.get(way, 1)
    with pytest.raises(ZeroDivisionError), sync_kit.db.transaction():
        WAYS[way](app, notify)
        raise ZeroDivisionError
    assert sent(app) == []
    WAYS[way](app, notify)
    assert len(sent(app)) == IN_THE_QUEUE.get(way, 1)


def test_the_result_is_known_before_it_is_sent(app, sync_kit):
    """It has the id that the message will have, and the arguments are those of the call."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    id = ["mutable"]
    with sync_kit.db.transaction():
        result = notify.delay(id)
        chosen = notify.apply_async((1,), task_id="chosen", ignore_result=True)
        id.append("changed later")
        with pytest.raises(errors.EncodeError, match="not JSON serializable"):
            notify.delay(object())
    with app.connection_for_read() as connection, kombu.SimpleQueue(connection, app.conf.task_default_queue) as queue:
        first, second = queue.get(block=False), queue.get(block=False)
        assert first.headers["id"] == result.id
        assert first.payload[0] == [["mutable"]]
        assert second.headers["id"] == chosen.id == "chosen"
        assert (result.state, chosen.ignored, type(result)) == ("PENDING", True, app.AsyncResult)
        first.ack()
        second.ack()


def test_failures_14_without_being_asked_a_line_that_sends_too_early_is_flagged_once(app, sync_kit):
    """It is sent all the same. Where nothing was written there is nothing to miss."""
    notify = notify_of(app)
    scopes.CeleryScopes(app)

    def lines(*writes):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for write in writes:
                with sync_kit.db.transaction():
                    if write:
                        save(sync_kit)
                    notify.delay(1)
        return told

    assert lines(False, False) == []
    (told,) = lines(True, True, True)
    assert told.category is SentBeforeCommit
    assert told.filename == __file__
    assert "shop.notify was sent inside of a transaction" in str(told.message)
    assert "on_commit(notify.delay, ...)" in str(told.message)
    assert len(sent(app)) == 5


@pytest.mark.parametrize("level", ["off", "log", "raise"])
def test_failures_14_the_guard_decides_what_is_done_about_it(app, sync_kit, level, caplog):
    """Nothing; a line in the log; or the task is not sent."""
    notify = notify_of(app)
    scopes.CeleryScopes(app)
    guards.configure(sync_kit.db, sent_in_transaction=level)
    with caplog.at_level("WARNING", "dbscope.guards"), sync_kit.db.transaction():
        save(sync_kit)
        if level == "raise":
            with pytest.raises(GuardError, match=r"shop.notify was sent inside of a transaction"):
                notify.delay(1)
        else:
            notify.delay(1)
    assert len(sent(app)) == (level != "raise")
    told = [record.message for record in caplog.records if record.name == "dbscope.guards"]  # Celery logs, too
    assert [message[:32] for message in told] == ["sent_in_transaction: shop.notify"] * (level == "log")


def test_failures_14_what_is_pending_or_written_in_a_plain_scope_counts(app, sync_kit):
    """The user's own transaction is one, too: the message waits for `session.commit()`."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    with scope("by hand"):
        sync_kit.session().scalar(text("SELECT 1"))
        notify.delay(1)
        assert len(sent(app)) == 1
        sync_kit.session().add(Payment())
        notify.delay(1)
        assert sent(app) == []
        sync_kit.session().commit()
        assert len(sent(app)) == 1
        save(sync_kit)
        notify.delay(1)
        sync_kit.session().rollback()
    assert sent(app) == []


def test_a_message_belongs_to_the_innermost_work(app, sync_kit):
    """A savepoint that is rolled back drops it; a reader is not in its way; other work inside sends by itself."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    db = sync_kit.db
    with db.transaction():
        with pytest.raises(ZeroDivisionError), db.transaction(nested=True):
            notify.delay(1)
            raise ZeroDivisionError
        with db.reader():
            notify.delay(2)
        with scope("progress"):
            notify.delay(3)
        assert len(sent(app)) == 1
        with db.transaction(nested=True):
            notify.delay(4)
        assert sent(app) == []
    assert len(sent(app)) == 2
    with db.reader():
        notify.delay(5)
    assert len(sent(app)) == 1


def test_a_message_waits_for_all_databases_of_the_work(app, sync_kit, tmp_path):
    """And is not sent if one of them is not committed, be it used after the message was."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    other = sync_kit.file(tmp_path / "other.db")
    with sync_kit.db.transaction():
        with other.transaction():
            notify.delay(1)
        assert sent(app) == []
    assert len(sent(app)) == 1
    with scope("request", commit="on-success"):
        notify.delay(2)
        save(sync_kit)
        assert sent(app) == []
    assert len(sent(app)) == 1
    with pytest.raises(PartialCommit), scope("request", commit="on-success"):
        save(sync_kit)
        notify.delay(3)
        other.session.execute(text("PRAGMA defer_foreign_keys = ON"))
        other.session.add(Payment(account_id=404))
    assert sent(app) == []
    with scope("request", commit="on-success"):
        notify.delay(4)
        sync_kit.session()
        sync_kit.db.set_rollback_only()
    assert sent(app) == []
    assert sync_kit.count() == 2


@twice
async def test_work_of_both_colours_holds_what_it_sends(kit, app):
    """An on-success scope sends at its end, a block when it has committed."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    async with kit.scope("request", commit="on-success"):
        notify.delay(1)
        kit.session().add(Payment())
        notify.delay(2)
        async with kit.transaction():
            notify.delay(3)
        assert sent(app) == []
    assert len(sent(app)) == 3
    async with kit.transaction():
        notify.delay(1)
    assert len(sent(app)) == 1
    assert kit.count() == 1


def test_a_message_that_is_held_is_captured_in_tests(app, sync_kit):
    """As every hook is."""
    notify = notify_of(app)
    scopes.CeleryScopes(app, send="after-commit")
    with capture_on_commit(sync_kit.db) as hooks:
        with sync_kit.db.transaction():
            notify.delay(1)
    assert "send shop.notify[" in repr(hooks[0])
    assert sent(app) == []
    hooks[0]()
    assert sent(app) == ["shop.notify"]


@pytest.mark.parametrize("asked", [None, "after-commit"])
def test_a_retry_is_sent_although_the_attempt_is_rolled_back(app, sync_kit, asked):
    """Neither held, which would lose it, nor flagged."""

    @app.task(bind=True, name="shop.again")
    def again(self):
        save(sync_kit)
        raise self.retry(countdown=0)

    scopes.CeleryScopes(app, commit="on-success", send=asked)
    assert trace(again) == "RETRY"
    assert (sent(app), sync_kit.count()) == (["shop.again"], 0)


@pytest.mark.parametrize("asked", [None, "after-commit"])
def test_a_task_that_is_replaced_is_committed_first(app, sync_kit, asked):
    """What goes on in its place finds its rows, on a worker and eagerly; if the commit fails, nothing goes on."""
    counts = []

    @app.task(name="shop.rest")
    def rest():
        counts.append(sync_kit.count())
        return "replaced"

    @app.task(bind=True, name="shop.book")
    def book(self, twice=False):
        save(sync_kit)
        if twice:
            save_the_same_twice(sync_kit)
        return self.replace(celery.chain(rest.si(), rest.si()))

    scopes.CeleryScopes(app, commit="on-success", send=asked)
    assert trace(book) == "IGNORED"
    assert (sent(app), sync_kit.count()) == (["shop.rest"], 1)
    assert book.apply().get() == "replaced"
    assert counts == [2, 2]
    assert trace(book, twice=True) == "FAILURE"
    assert (sent(app), sync_kit.count()) == ([], 2)


def test_a_replacement_in_a_block_of_the_tasks_own_is_sent(app, sync_kit):
    """It leaves the block by an exception, and what was held would be lost with it."""
    rest = notify_of(app)

    @app.task(bind=True)
    def book(self):
        with sync_kit.db.transaction():
            save(sync_kit)
            return self.replace(rest.si())

    scopes.CeleryScopes(app, send="after-commit")
    assert trace(book) == "IGNORED"
    assert sent(app) == ["shop.notify"]


def trace(task, **kwargs):
    """Run a task as a worker does, without one; its state."""
    build_tracer = needs.module("celery.app.trace", extra="celery").build_tracer
    traced = build_tracer(task.name, task, app=task.app)("7", (), kwargs, {"id": "7", "delivery_info": {}})
    return "SUCCESS" if traced.info is None else traced.info.state


@pytest.mark.parametrize("asked", [None, "after-commit"])
def test_an_eager_task_sent_in_a_transaction_runs_after_it(app, sync_kit, asked):
    """As it would on a worker, and its result is there then; without being asked it runs at once, and is flagged."""
    app.conf.task_always_eager = True

    @app.task
    def count():
        return sync_kit.count()

    scopes.CeleryScopes(app, commit="on-success", send=asked)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with sync_kit.db.transaction():
            save(sync_kit)
            result = count.delay()
            assert result.state == ("SUCCESS" if asked is None else "PENDING")
    assert (result.state, result.get()) == ("SUCCESS", 0 if asked is None else 1)
    assert [one.category for one in told] == ([SentBeforeCommit] if asked is None else [])
    assert count.delay().get() == 1


# -- statement 26 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
def test_statement_26_ten_tasks_at_once_have_ten_sessions(app, sync_kit, fails):
    """On a worker; the registry is empty before and after; a background thread keeps its own throughout."""
    testing = needs.module("celery.contrib.testing.worker", extra="celery")
    factory = sessionmaker(sync_kit.outside)
    model, plain = RequestSessions(factory), scoped_session(factory)
    barrier = threading.Barrier(10)
    found, beside, stop, begun = [], [], threading.Event(), threading.Event()

    def background():
        beside.append(model.session())
        begun.set()
        stop.wait(LIMIT)
        beside.append(model.session())
        model.session.remove()

    @app.task
    def work():
        mine = sync_kit.session(), model.session(), plain()
        for session in mine:
            session.execute(text("SELECT 1"))
        barrier.wait(LIMIT)
        assert mine == (sync_kit.session(), model.session(), plain())
        found.append(mine)
        if fails:
            raise KeyError("the task's")

    scopes.CeleryScopes(app)
    thread = threading.Thread(target=background)
    thread.start()
    assert begun.wait(LIMIT)
    before = dict(model.scoped_registry.registry)
    assert list(before.values()) == beside
    with testing.start_worker(app, pool="threads", concurrency=10, perform_ping_check=False, shutdown_timeout=LIMIT):
        results = [work.delay() for _ in range(10)]
        states = {result.get(timeout=LIMIT, interval=0.01, propagate=False) and result.state for result in results}
        assert states <= ({"FAILURE"} if fails else {"SUCCESS", None})
        assert len({id(session) for mine in found for session in mine}) == 30
        assert dict(model.scoped_registry.registry) == before
        assert not plain.registry.has()
        assert sync_kit.checked_out() == 0
    stop.set()
    thread.join(LIMIT)
    assert beside[0] is beside[1]
    assert model.scoped_registry.registry == {}


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_scopes_are_installed_once(app):
    """Twice is a mistake that says so."""
    scopes.CeleryScopes(app)
    with pytest.raises(ConfigurationError, match="has scopes already"):
        scopes.CeleryScopes(app)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"commit": "always"}, "commit is None or"),
        ({"send": "later"}, "send is None or"),
    ],
)
def test_options_are_checked_when_the_application_starts(app, options, complaint):
    """An unknown one says which there are."""
    with pytest.raises(ConfigurationError, match=complaint):
        scopes.CeleryScopes(app, **options)


def test_what_is_no_application_is_refused():
    """Such as a task, or a name."""
    with pytest.raises(ConfigurationError, match="are given the application, not 'shop'"):
        scopes.CeleryScopes("shop")


def test_a_celery_that_is_too_old_says_so(app, monkeypatch):
    """Which is needed, and how to get it."""
    monkeypatch.setattr(metadata, "version", lambda name: "5.2.7")
    with pytest.raises(ConfigurationError, match=r"need Celery 5\.3 or newer, and this is 5\.2\.7"):
        scopes.CeleryScopes(app)


def test_scopes_come_before_the_worker(app):
    """A worker that runs has looked at its tasks already, and would go on without scopes."""
    task = notify_of(app)
    app.finalize()
    task.__trace__ = lambda *args: None
    with pytest.raises(ConfigurationError, match="runs already"):
        scopes.CeleryScopes(app)
