"""Processes of multiprocessing's and its executor, however they are started; tests/test_fork.py has bare forks."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest

import dbscope
from dbscope import ConfigurationError, scope
from tests.support import jobs
from tests.support.gevented import ROOT
from tests.support.kits import LIMIT, Payment

METHODS = ["fork", "spawn", "forkserver"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@contextmanager
def processes(kit, method):
    """An executor with one process; a forked one inherits the kit's database, the others make their own."""
    context = multiprocessing.get_context(method)
    url = kit.url.render_as_string(hide_password=False)
    options = {"initializer": jobs.connect, "initargs": (url,)} if method != "fork" else {}
    jobs.use(kit.db)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+ warns of forks beside threads
        with ProcessPoolExecutor(1, context, **options) as executor:
            yield executor


@pytest.mark.parametrize("method", METHODS)
def test_failures_15_jobs_of_a_process_pool(sync_server_kit, method):
    """A pool that is started in the middle of a transaction: its jobs have sessions of their own, on connections of
    their own, inside of nothing; the parent's work is the parent's to commit."""
    kit = sync_server_kit
    with scope("parent"):
        kit.session().add(Payment(amount=0))
        kit.session().flush()
        jobs.use(kit.db)
        mine = jobs.backend()
        with processes(kit, method) as executor:
            found = [executor.submit(jobs.pay, amount).result(LIMIT) for amount in (1, 2)]
        assert kit.amounts() == [1, 2]
        assert jobs.backend() == mine
        kit.session().commit()
    assert kit.amounts() == [0, 1, 2]
    assert {job["pid"] for job in found}.isdisjoint({os.getpid()})
    assert mine not in {job["backend"] for job in found}
    assert {(job["name"], job["inside"]) for job in found} == {("job", False)}


@pytest.mark.parametrize("method", METHODS)
def test_failures_15_a_process_is_in_no_scope_of_its_parents(sync_server_kit, method):
    """The function of a process runs in no block of the parent's, also where it was forked in one: without a scope of
    its own it has the implicit one, as a thread does."""
    with scope("parent"):
        mine = sync_server_kit.session()
        with processes(sync_server_kit, method) as executor:
            found = executor.submit(jobs.look).result(LIMIT)
        assert found["scope"] is None
        assert method != "fork" or found["session"] != id(mine)


def test_what_a_process_forgot_to_commit_is_reported(tmp_path):
    """The implicit scope of a process's main thread ends with the process, which runs no `atexit` functions."""
    program = (
        "import multiprocessing, sys\n"
        "from tests.support import jobs\n"
        "from tests.support.kits import Base\n"
        "if __name__ == '__main__':\n"
        "    jobs.connect(sys.argv[1])\n"
        "    Base.metadata.create_all(jobs._db.engine)\n"
        "    process = multiprocessing.get_context('fork').Process(target=jobs.forget, args=(7,))\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path / 'test.db'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.stderr.count("UncommittedWrites: scope 'thread MainThread' ended with writes") == 1


@pytest.mark.parametrize("method", METHODS)
def test_what_has_connections_is_not_sent_to_a_process(sync_server_kit, method):
    """A database, its registry and a session as arguments of a job: an error that says what to send instead."""
    kit = sync_server_kit
    with scope("parent"), processes(kit, method) as executor:
        for thing in (kit.db, kit.db.session, kit.session()):
            error = executor.submit(jobs.nothing, thing).exception(LIMIT)
            assert isinstance(error, ConfigurationError)
            assert "sent to another process" in str(error)
            assert "Hand over ids" in str(error)
        assert "a session of scope 'parent'" in str(error)
        assert executor.submit(jobs.nothing, 7).exception(LIMIT) is None


def test_what_has_connections_is_not_pickled_or_copied(sync_kit, tmp_path):
    """Whoever asks: `pickle`, `copy`, in both colours."""
    things = [sync_kit.db, sync_kit.db.session, sync_kit.db.new_session()]
    if "greenlet" in sys.modules:
        adb = dbscope.AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
        things += [adb, adb.session]
    for thing in things:
        for use in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(ConfigurationError, match="was to be copied"):
                use(thing)
