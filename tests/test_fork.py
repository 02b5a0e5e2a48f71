"""FAILURES 15: what a fork changes. The parent goes on, the child starts clean, no connection is spoken on twice."""

import contextvars
import gc
import json
import multiprocessing
import os
import threading
import traceback
import warnings

import pytest
from sqlalchemy import select, text

from dbscope import ScopeEndedError, ScopeMisuseError, begin_scope, current_scope, end_scope, scope
from dbscope.implicit import implicit_scope
from tests.support.kits import LIMIT, Payment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def fork(child):
    """What a function returns in a forked child of this process, as JSON; the child ends without any clean-up of ours,
    except that of the collector, which must not speak on the parent's connections either."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+ warns of threads: here they are the point
        pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = {"result": child()}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            os.write(write, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(pid, 0)
    assert "error" not in answer, answer["error"]
    return answer["result"]


def error_of(function):
    """The type and the text of what a function raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def backend(session):
    """The process of the server's that serves a session's connection."""
    return session.scalar(text("SELECT pg_backend_pid()"))


def test_failures_15_the_parents_session_is_refused_in_the_child(sync_server_kit):
    """In the child every use of the parent's session is refused, with both pids' story; its clean-up is silent, and the
    parent's transaction goes on unharmed."""
    kit = sync_server_kit
    with scope("parent"):
        session = kit.session()
        session.add(Payment(amount=1))
        session.flush()
        mine = backend(session)

        def child():
            errors = [
                error_of(lambda: session.scalar(text("SELECT 1"))),
                error_of(lambda: session.scalars(select(Payment))),
                error_of(session.commit),
                error_of(session.flush),
            ]
            harmless = [error_of(clean_up) for clean_up in (session.close, session.rollback, kit.db.dispose)]
            return errors, harmless

        errors, harmless = fork(child)
        for error in errors:
            assert error is not None
            assert error[0] == "ScopeMisuseError"
            assert "fork" in error[1]
            assert "'parent'" in error[1]
            assert str(os.getpid()) in error[1]
        assert harmless == [None, None, None]
        assert backend(session) == mine
        session.commit()
    assert kit.amounts() == [1]


def test_failures_15_the_child_works_with_a_connection_of_its_own(sync_server_kit):
    """In the child the block it was forked in, a new scope and a transaction get connections of its own."""
    kit = sync_server_kit
    with scope("parent"):
        mine = backend(kit.session())

        def child():
            inherited = backend(kit.session())
            kit.session().rollback()
            with scope("child"):
                own = backend(kit.session())
                kit.session().add(Payment(amount=2))
                kit.session().commit()
            with kit.db.transaction() as session:
                session.add(Payment(amount=3))
            return inherited, own

        assert mine not in fork(child)
        assert backend(kit.session()) == mine
    assert kit.amounts() == [2, 3]


def test_failures_15_a_block_that_goes_on_in_the_child(sync_server_kit):
    """The child leaves the blocks that it was forked in without a word to the server: the parent commits its work."""
    kit = sync_server_kit

    def leaves():
        work.__exit__(None, None, None)
        return current_scope() is None

    work = scope("parent", commit="on-success")
    with work:
        kit.session().add(Payment(amount=4))
        kit.session().flush()
        assert fork(leaves) is True
    assert kit.amounts() == [4]


def test_failures_15_threads_with_implicit_scopes(sync_server_kit):
    """Threads whose implicit scopes hold transactions do not exist in the child: their sessions are neither used nor
    closed there, also when the child collects its garbage and ends, and the parent's threads go on."""
    kit = sync_server_kit
    ready, go = threading.Barrier(4), threading.Event()
    sessions, results = [], []

    def work(amount):
        session = kit.session()
        session.add(Payment(amount=amount))
        session.flush()
        sessions.append(session)
        ready.wait(LIMIT)
        assert go.wait(LIMIT)
        session.commit()
        results.append(amount)

    threads = [threading.Thread(target=work, args=[amount]) for amount in range(3)]
    for thread in threads:
        thread.start()
    ready.wait(LIMIT)

    def child():
        errors = [error_of(lambda s=session: s.scalar(text("SELECT 1"))) for session in sessions]
        sessions.clear()
        gc.collect()
        with kit.db.transaction() as session:
            session.add(Payment(amount=10))
        return [error and error[0] for error in errors]

    assert fork(child) == ["ScopeMisuseError"] * 3
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2]
    assert kit.amounts() == [0, 1, 2, 10]


def test_failures_15_the_forking_threads_implicit_scope(sync_server_kit):
    """The thread that forks gets a new implicit scope in the child, and keeps its own in the parent."""
    kit = sync_server_kit

    def thread():
        session = kit.session()
        session.add(Payment(amount=1))
        mine = backend(session)

        def child():
            none_yet = implicit_scope() is None
            fresh = kit.session()
            refused = error_of(lambda: session.scalar(text("SELECT 1")))
            return none_yet, fresh is not session, backend(fresh) != mine, refused[0]

        answers.append(fork(child))
        answers.append([kit.session() is session, backend(session) == mine])
        session.commit()

    answers = []
    run = threading.Thread(target=thread)
    run.start()
    run.join()
    assert answers == [[True, True, True, "ScopeMisuseError"], [True, True]]
    assert kit.amounts() == [1]


def test_failures_15_scopes_by_id(sync_server_kit):
    """A scope that the parent began by id is the parent's to end: the child's `end_scope` does nothing."""
    kit = sync_server_kit
    begin_scope("request 1")
    try:
        kit.session().add(Payment(amount=1))
        kit.session().flush()

        def child():
            end_scope("request 1")
            begin_scope("request 1")
            kit.session().add(Payment(amount=2))
            kit.session().commit()
            end_scope("request 1")

        fork(child)
        kit.session().commit()
    finally:
        end_scope("request 1")
    assert kit.amounts() == [1, 2]


def test_failures_15_the_scopes_around_the_innermost_one(sync_server_kit):
    """The child leaves all of the scopes that it was forked in, and drops them: their transactions are the parent's."""
    kit = sync_server_kit
    scopes = [scope("outer"), scope("inner")]
    for amount, work in enumerate(scopes):
        work.__enter__()
        kit.session().add(Payment(amount=amount))
        kit.session().flush()

    def child():
        while scopes:
            scopes.pop().__exit__(None, None, None)
        gc.collect()
        return current_scope() is None

    try:
        assert fork(child) is True
        for work in reversed(scopes):
            kit.session().commit()
            work.__exit__(None, None, None)
    finally:
        for work in reversed(scopes):
            work.__exit__(None, None, None)
    assert kit.amounts() == [0, 1]


def test_failures_15_scopes_by_id_of_other_work(sync_server_kit):
    """In the child an id names new work, whose begin ends nothing of the parent's, wherever the parent uses it."""
    kit = sync_server_kit

    def elsewhere(function):
        contextvars.copy_context().run(function)

    def begin():
        begin_scope("request 1")
        kit.session().add(Payment(amount=1))
        kit.session().flush()

    def commit():
        begin_scope("request 1")
        kit.session().commit()

    def child():
        mine = begin_scope("request 1", "the child's")
        kit.session().add(Payment(amount=2))
        kit.session().commit()
        end_scope("request 1")
        gc.collect()
        return mine.name

    elsewhere(begin)
    try:
        assert fork(child) == "the child's"
        elsewhere(commit)
    finally:
        elsewhere(lambda: end_scope("request 1"))
    assert kit.amounts() == [1, 2]


def test_failures_15_sessions_outside_of_scopes(sync_server_kit):
    """A session that `new_session()` gave is the parent's, too."""
    kit = sync_server_kit
    with kit.db.new_session() as session:
        session.add(Payment(amount=1))
        session.flush()
        assert fork(lambda: error_of(lambda: session.scalar(text("SELECT 1"))))[0] == "ScopeMisuseError"
        session.commit()
    assert kit.amounts() == [1]


def test_failures_15_a_dropped_session_is_not_collected_in_the_child(sync_server_kit):
    """A session that only the collector would close in the child is never closed there: the parent's work goes on."""
    kit = sync_server_kit
    kept = [kit.db.new_session()]
    kept[0].add(Payment(amount=1))
    kept[0].flush()

    def child():
        kept.clear()
        gc.collect()

    fork(child)
    kept[0].commit()
    kept[0].close()
    assert kit.amounts() == [1]


def test_failures_15_the_pools_idle_connections_are_the_parents(sync_server_kit):
    """A connection that lay in the pool at the fork is used by the parent alone."""
    kit = sync_server_kit
    with scope():
        idle = backend(kit.session())
    with scope():
        assert fork(lambda: backend(kit.session())) != idle
        assert backend(kit.session()) == idle


def test_failures_15_a_fork_in_a_managed_transaction(sync_server_kit):
    """A fork in the middle of `db.transaction()` leaves the parent's block to the parent."""
    kit = sync_server_kit
    with kit.db.transaction() as session:
        session.add(Payment(amount=1))
        session.flush()

        def child():
            with kit.db.transaction() as own:
                assert own is not session
                own.add(Payment(amount=2))

        fork(child)
    assert kit.amounts() == [1, 2]


def _work_in_a_process(kit, parents, queue):
    try:
        with scope("worker"):
            own = backend(kit.session())
            kit.session().add(Payment(amount=own != parents))
            kit.session().commit()
        queue.put("done")
    except BaseException:
        queue.put(traceback.format_exc())


def test_failures_15_multiprocessing(sync_server_kit):
    """A process that multiprocessing forks in the middle of a scope works with connections of its own."""
    kit = sync_server_kit
    context = multiprocessing.get_context("fork")
    with scope("parent"):
        mine = backend(kit.session())
        queue = context.SimpleQueue()
        process = context.Process(target=_work_in_a_process, args=(kit, mine, queue))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        answer = queue.get()
        process.join()
        assert answer == "done"
        assert process.exitcode == 0
        assert backend(kit.session()) == mine
    assert kit.amounts() == [1]


def test_failures_15_a_database_in_memory(sync_kit):
    """A SQLite database in memory is the parent's with its data; the parent's use of it goes on."""
    db = sync_kit.memory()
    with scope("parent"):
        session = db.session()
        session.execute(text("CREATE TABLE t (n int)"))
        session.execute(text("INSERT INTO t VALUES (1)"))

        def child():
            return error_of(lambda: session.scalar(text("SELECT n FROM t")))

        assert fork(child)[0] == "ScopeMisuseError"
        assert session.scalar(text("SELECT n FROM t")) == 1
        session.commit()


def test_failures_15_a_fork_from_a_loop(sync_server_kit):
    """The threads in which dbscope ends sync sessions of async scopes are made anew in the child."""
    import asyncio

    kit = sync_server_kit

    async def use(amount):
        async with scope(commit="on-success"):
            kit.session().add(Payment(amount=amount))

    asyncio.run(use(1))
    fork(lambda: asyncio.run(use(2)))
    asyncio.run(use(3))
    assert kit.amounts() == [1, 2, 3]


def test_failures_15_the_error_is_one_of_dbscopes(sync_kit):
    """A kept session of a scope that ended before the fork says so, in the child as well."""
    with scope("early"):
        session = sync_kit.session()
    name, message = fork(lambda: error_of(lambda: session.scalars(select(Payment))))
    assert name in (ScopeEndedError.__name__, ScopeMisuseError.__name__)
    assert "'early'" in message


def test_failures_15_locks_are_watched_in_the_child(sync_server_kit):
    """Statements of work apart are watched in the child, whose parent's watching thread did not come along."""
    kit = sync_server_kit
    kit.database()
    with kit.db.apart("migration", lock_timeout=60) as beside, beside.transaction() as session:
        session.execute(text("SELECT 1"))  # its watch is not due yet, and the thread that would begin it waits

        def child():
            with kit.outside.connect() as holder, kit.db.apart("child", lock_timeout=1.0) as mine:
                holder.execute(text("LOCK TABLE payments"))
                try:
                    with scope(), mine.transaction(new=True) as other:
                        other.execute(select(Payment))
                except Exception as error:
                    return "".join(error.__notes__)

        assert "It waited for payments (AccessShareLock), held by" in fork(child)
