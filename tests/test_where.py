"""Which line, and who."""

import asyncio
import os
import threading

from dbscope import where
from dbscope.where import ago, here, name_of, place_of, spell, task_now, user_frame, worker


def test_here_is_the_callers_line():
    """`here()` names the line that called it, as file:line, relative to the working directory."""
    line = test_here_is_the_callers_line.__code__.co_firstlineno + 3
    assert spell(here()) == os.path.relpath(__file__) + f":{line}"


def test_frames_of_the_machinery_are_skipped():
    """Between the user's line and ours stand SQLAlchemy, contextlib and dbscope: none of these is named."""
    space = {"__name__": "sqlalchemy.orm.made_up", "here": here}
    exec(compile("def call():\n    return here()", "<generated>", "exec"), space)  # as SQLAlchemy generates its methods
    assert f"{os.path.basename(__file__)}:" in spell(space["call"]())


def test_a_module_of_the_machinery_may_play_the_users_part():
    """A module inside of dbscope that says that it is a user's, as the demo's handlers do, is named like one."""
    for marker, expected in (({}, os.path.basename(__file__)), ({"__dbscope_user_code__": True}, "<made up>")):
        space = {"__name__": "dbscope.made_up", "here": here, **marker}
        exec(compile("def call():\n    return here()", "<made up>", "exec"), space)
        assert spell(space["call"]()).rpartition("/")[2].rpartition(":")[0] == expected


def test_a_place_keeps_no_frame():
    """A place is a code object and an instruction: it keeps nothing alive that the frame held."""
    code, instruction = here()
    assert code is test_a_place_keeps_no_frame.__code__
    assert isinstance(instruction, int)


def test_an_unknown_place():
    """Where no user's frame is found, that is said."""
    assert user_frame(None) is None
    assert place_of(None) is None
    assert spell(None) == "an unknown line"


def test_a_path_outside_of_the_working_directory_is_absolute(tmp_path, monkeypatch):
    """A file that is not below the working directory is named in full; so it is where that folder is gone."""
    monkeypatch.chdir(tmp_path)
    assert spell(here()).startswith("/")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert spell(here()).startswith("/")


async def test_the_worker_is_the_task():
    """On a loop the worker is the running task; in a thread of the loop's it is the thread."""
    assert worker() is asyncio.current_task() is task_now()
    assert await asyncio.to_thread(worker) != worker()
    assert await asyncio.to_thread(task_now) is None
    assert name_of(worker()) == f"task {asyncio.current_task().get_name()!r}"


def test_the_worker_is_the_thread():
    """Elsewhere it is the thread, named as a person would."""
    assert worker() == threading.get_ident()
    assert name_of(worker()) == f"thread {threading.current_thread().name!r}"
    assert name_of(1) == "thread 1"
    assert name_of(None) == "another thread or task"


def test_a_task_has_no_line_of_whoever_runs_the_loop():
    """A task's own frames count, and not those of `asyncio.run`'s caller, who knows nothing of what it does."""

    async def nobody():
        loop = asyncio.get_running_loop()
        found = loop.create_future()
        loop.call_soon(lambda: found.set_result(None))
        await found
        space = {"__name__": "asyncio.made_up", "here": here}
        exec(compile("async def call():\n    return here()", "<generated>", "exec"), space)
        return await asyncio.create_task(space["call"]())

    assert asyncio.run(nobody()) is None


def test_an_integration_says_which_frames_stand_between(monkeypatch):
    """Of a framework's package, too, no line is named, though one was before."""
    monkeypatch.setattr(where, "_BETWEEN", set(where._BETWEEN))
    space = {"__name__": "framework.made_up", "here": here}
    exec(compile("def call():\n    return here()", "framework.py", "exec"), space)
    assert "framework.py" in spell(space["call"]())
    where.pass_over("framework")
    assert f"{os.path.basename(__file__)}:" in spell(space["call"]())


def test_ago(monkeypatch):
    """An age in seconds, for people."""
    monkeypatch.setattr(where.time, "monotonic", lambda: 12.34)
    assert ago(10.0) == "2.3 s ago"
