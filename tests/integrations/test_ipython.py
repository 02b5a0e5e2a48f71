"""IPython and Jupyter: a scope for each cell, and what the next one finds."""

import asyncio
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
from sqlalchemy import select, text

from dbscope import ConfigurationError, Database, UncommittedWrites, current_scope
from tests.support import needs
from tests.support.gevented import ROOT
from tests.support.kits import LIMIT, Payment, make_kit

needs.module("IPython", extra="ipython")

EXTENSION = "dbscope.integrations.ipython"


@pytest.fixture
def shell(sync_kit, tmp_path, monkeypatch):
    """A shell with a database `db` and the class `Payment`, and with the extension."""
    from IPython.core import async_helpers
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    loop = asyncio.new_event_loop()  # IPython's own is made once for the process
    monkeypatch.setattr("IPython.core.async_helpers._asyncio_event_loop", loop, raising=False)
    monkeypatch.setattr(async_helpers, "get_asyncio_loop", lambda: loop)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config)
    shell.user_ns.update(db=sync_kit.db, Payment=Payment, current_scope=current_scope, select=select)
    shell.loop = loop
    shell.extension_manager.load_extension(EXTENSION)
    yield shell
    if hasattr(shell, "_dbscope"):
        shell.extension_manager.unload_extension(EXTENSION)
    loop.close()
    assert current_scope() is None


def run(shell, *cells):
    """The results of cells; of each its value, or the error it raised, as IPython shows it."""
    found: list[Any] = []
    for cell in cells:
        result = shell.run_cell(cell, store_history=True)
        found.append(result.error_before_exec or result.error_in_exec or result.result)
    return found if len(found) > 1 else found[0]


def test_each_cell_has_a_scope_named_by_its_number(shell):
    """It is open while the cell runs, and over when it is through; nothing is current between the cells."""
    names = run(shell, "work = current_scope(); work.name", "(current_scope().name, work.ended)")
    assert names == ["In [1]", ("In [2]", True)]
    assert current_scope() is None


def test_a_failed_cell_does_not_poison_the_next(shell, sync_kit):
    """Whatever it left: the next cell has a new session, and nothing of the failed one is saved."""
    found = run(
        shell,
        "db.session.add_all([Payment(id=1), Payment(id=1)]); db.session.flush()",
        "db.session.add(Payment(id=2)); db.session.commit()",
        "db.session.add(Payment(id=3)); db.session.flush(); 1 / 0",
        "1 +",
        "[payment.id for payment in db.session.scalars(select(Payment))]",
    )
    assert [type(one).__name__ for one in found[:4]] == [
        "IntegrityError",
        "NoneType",
        "ZeroDivisionError",
        "SyntaxError",
    ]
    assert found[4] == [2]
    assert sync_kit.checked_out() == 0


def test_what_is_interrupted_ends(shell, sync_kit):
    """Also by what is no `Exception`."""
    found = run(
        shell,
        "db.session.add(Payment(id=1)); db.session.flush(); raise KeyboardInterrupt",
        "db.session.get(Payment, 1)",
    )
    assert type(found[0]) is KeyboardInterrupt
    assert found[1] is None
    assert sync_kit.checked_out() == 0


def test_what_a_cell_forgot_to_commit_is_reported(shell, sync_kit):
    """In the output of the cell itself, with its number."""
    with pytest.warns(UncommittedWrites, match=r"scope 'In \[1\]' ended with writes"):
        run(shell, "db.session.add(Payment(id=1))")
    assert sync_kit.count() == 0


def test_what_was_read_stays_readable_in_the_next_cell(shell, sync_kit):
    """Objects of a query, of a commit, of a reader and of a managed block, as far as they were loaded."""
    found = run(
        shell,
        "db.session.add_all([Payment(id=1, amount=7), Payment(id=2)]); db.session.commit()",
        "read = db.session.get(Payment, 1)",
        "written = Payment(id=3, amount=8); db.session.add(written); db.session.commit()",
        "with db.transaction() as session: managed = session.get_one(Payment, 2); managed.amount = 9",
        "with db.reader() as session: only = session.get_one(Payment, 3)",
        "(read.amount, written.amount, managed.amount, only.amount)",
    )
    assert found[-1] == (7, 8, 9, 8)
    assert sync_kit.checked_out() == 0


def test_an_object_goes_on_in_another_cell(shell, sync_kit):
    """`merge()` takes it into the next cell's session."""
    found = run(
        shell,
        "db.session.add(Payment(id=1, amount=7)); db.session.commit()",
        "payment = db.session.get(Payment, 1)",
        "payment = db.session.merge(payment); payment.amount += 1; db.session.commit()",
    )
    assert found == [None, None, None]
    assert sync_kit.amounts() == [8]


def test_cells_that_await(shell, sync_kit):
    """On IPython's loop, with the sync database: the scope is the cell's there, too."""
    found = run(
        shell,
        "import asyncio; await asyncio.sleep(0)",
        "work = current_scope(); db.session.add(Payment()); db.session.commit(); await asyncio.sleep(0)",
        "await asyncio.sleep(0); (current_scope().name, work.name, work.ended)",
        "await asyncio.sleep(0); db.session.add(Payment()); db.session.flush(); 1 / 0",
        "await asyncio.sleep(0); len(db.session.scalars(select(Payment)).all())",
    )
    assert found[2] == ("In [3]", "In [2]", True)
    assert type(found[3]) is ZeroDivisionError
    assert found[4] == 1
    assert sync_kit.checked_out() == 0


@pytest.mark.parametrize(
    "server", [False, pytest.param(True, marks=pytest.mark.postgres)], ids=["sqlite", "postgresql"]
)
def test_cells_that_await_an_async_database(shell, server, request, tmp_path):
    """`await adb.session...` in a cell: its connection is back before the next prompt, and a failed cell is over."""
    kit = make_kit("async", request.getfixturevalue("postgres_url") if server else f"sqlite:///{tmp_path / 'a.db'}")
    shell.user_ns.update(adb=kit.db)
    found = run(
        shell,
        "adb.session.add(Payment(id=1, amount=7)); await adb.session.commit()",
        "payment = await adb.session.get(Payment, 1); work = current_scope()",
        "(payment.amount, work.ended)",
        "adb.session.add(Payment(id=1)); await adb.session.flush()",
        "async with adb.transaction() as session: session.add(Payment(id=2))",
        "sorted([payment.id for payment in await adb.session.scalars(select(Payment))])",
    )
    assert found[2] == (7, True)
    assert type(found[3]).__name__ == "IntegrityError"
    assert found[5] == [1, 2]
    assert kit.checked_out() == 0
    shell.loop.run_until_complete(kit.aclose())


async def test_in_a_loop_that_runs_already(shell, async_kit):
    """As ipykernel does it: the cell, and the end of its scope, run on the loop that calls them."""
    shell.user_ns.update(adb=async_kit.db)

    async def cell(code):
        transformed = shell.transform_cell(code)
        result = await shell.run_cell_async(code, store_history=True, transformed_cell=transformed)
        shell.events.trigger("post_execute")
        shell.events.trigger("post_run_cell", result)
        assert current_scope() is None
        return result.error_before_exec or result.error_in_exec or result.result

    assert await cell("adb.session.add(Payment(id=1)); await adb.session.flush(); work = current_scope(); 1 / 0")
    assert await cell("adb.session.add(Payment(id=1, amount=5)); await adb.session.commit()") is None
    assert await cell("(await adb.session.get(Payment, 1)).amount") == 5
    await asyncio.gather(*shell._dbscope._ending)
    assert shell.user_ns["work"].ended
    assert async_kit.checked_out() == 0
    assert async_kit.amounts() == [5]


def test_a_cell_that_runs_another(shell):
    """Each has its own; the outer one's goes on."""
    run(
        shell,
        "outer = current_scope()\n"
        "inner = get_ipython().run_cell('current_scope()').result\n"
        "answer = (outer.ended, inner.ended, inner is outer, current_scope() is outer)",
    )
    assert shell.user_ns["answer"] == (False, True, False, True)


def test_loaded_and_unloaded_in_a_cell(shell):
    """`%load_ext`, `%reload_ext`, `%unload_ext`: from the next cell on, and never two scopes for one cell."""
    found = run(
        shell,
        f"%load_ext {EXTENSION}",
        f"%reload_ext {EXTENSION}",
        "(current_scope().name, current_scope().is_inside)",
        f"%unload_ext {EXTENSION}",
        "current_scope()",
        f"%load_ext {EXTENSION}",
        "current_scope().name",
        "",
    )
    assert found[2] == ("In [3]", False)
    assert found[4] is None
    assert found[6] == "In [7]"


def test_an_ipython_that_is_too_old(shell, monkeypatch):
    """Is told so when the extension is loaded."""
    monkeypatch.setattr(metadata, "version", lambda name: "7.34.0")
    from dbscope.integrations import ipython

    with pytest.raises(ConfigurationError, match=r"scopes need ipython 8\.12 or newer, and this is 7\.34\.0"):
        ipython.load_ipython_extension(shell)


CELLS = """\
%load_ext dbscope.integrations.ipython
from dbscope import Database, current_scope; from sqlalchemy import text; db = Database("sqlite:///cells.db")
db.session.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)")); db.session.commit()
db.session.execute(text("INSERT INTO t VALUES (1)")); db.session.execute(text("INSERT INTO t VALUES (1)"))
db.session.execute(text("INSERT INTO t VALUES (2)")); db.session.commit()
import asyncio; await asyncio.sleep(0); print("found", db.session.scalars(text("SELECT n FROM t")).all())
print(current_scope().name)
"""


def test_a_real_ipython(tmp_path):
    """In a terminal, from `%load_ext` on."""
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor", "--no-confirm-exit"],
        input=CELLS,
        cwd=tmp_path,
        env={**os.environ, "IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert "IntegrityError" in done.stdout
    assert "found [2]" in done.stdout
    assert "In [7]: In [7]" in done.stdout
    assert "Error in callback" not in done.stdout + done.stderr
    with Database(f"sqlite:///{tmp_path / 'cells.db'}") as db, db.reader() as session:
        assert session.scalars(text("SELECT n FROM t")).all() == [2]
