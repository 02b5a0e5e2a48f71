"""What a process answers on its socket, and to whom."""

import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import create_engine, text

from dbscope import ConfigurationError, Database, lifecycle, monitor, scope
from dbscope.monitor import client, server
from dbscope.monitor.snapshot import Holding, PoolState, without_secrets
from tests.support import needs
from tests.support.kits import LIMIT, SyncKit
from tests.support.monitored import process, short_folder
from tests.support.web import wait_for
from tests.test_fork import fork

HOLDER = """
import os, sys
from sqlalchemy import text
from dbscope import Database, scope
db = Database(os.environ.get("TEST_URL", "sqlite://"), name="books", pool_size=2, max_overflow=0)
with scope("a holder"):
    db.session.scalar(text("SELECT :secret"), {"secret": "swordfish"})
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets go in this test."""
    with short_folder() as made:
        monkeypatch.setenv("DBSCOPE_MONITOR", str(made))
        yield made


@pytest.fixture
def path(folder: Path) -> Iterator[Path]:
    """The socket of this process."""
    made = monitor.serve()
    yield made
    monitor.stop()


def say(path: Path, request: bytes, *, end: bool = True) -> dict[str, Any]:
    """What is answered to a request."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(LIMIT)
        asking.connect(str(path))
        asking.sendall(request)
        if end:
            asking.shutdown(socket.SHUT_WR)
        with asking.makefile("rb") as answer:
            return json.loads(answer.read())


def sockets(folder: Path) -> list[Path]:
    """The sockets there are, those that nobody listens to included."""
    return sorted((folder / "dbscope").glob("*"))


def test_each_process_answers_what_it_holds(folder: Path) -> None:
    """From its first connection on, without a call; and removes its socket when it ends."""
    with process(HOLDER, folder) as holder, process(HOLDER, folder) as other:
        wait_for(lambda: len(client.ask_all()) == 2)
        answers = client.ask_all()
        assert {answer.process for answer in answers} == {holder.pid, other.pid}
        for answer in answers:
            (held,) = answer.holdings
            assert (held.scope, held.state, held.process) == ("a holder", "idle in transaction", answer.process)
            assert held.statement == "SELECT ?"
            (pool,) = answer.pools
            assert (pool.database, pool.dialect) == ("books", "sqlite")
            assert answer.program == "-c"
    assert sockets(folder) == []


def test_nobody_else_may_open_it(path: Path) -> None:
    """The folder is its owner's alone, and so is the socket; and it is in no network."""
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_uid == os.geteuid()
    listening = server._server._listening
    assert listening is not None
    assert listening.family == socket.AF_UNIX


def test_another_user_is_refused_by_its_number(path: Path) -> None:
    """Should the folder be opened by mistake: the system tells who asks."""
    if os.geteuid() != 0 or not hasattr(socket, "SO_PEERCRED"):
        needs.spare("only root can ask as another user")
    nobody = pwd.getpwnam("nobody").pw_uid
    for opened in (path.parent.parent, path.parent):
        opened.chmod(0o755)
    path.chmod(0o777)
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9999).decode())"
    python = shutil.which("python3", path="/usr/bin:/bin") or os.path.realpath(sys.executable)  # nobody may enter there
    try:
        asked = subprocess.run([python, "-c", code, path], user=nobody, capture_output=True, text=True, cwd="/")
    except PermissionError:
        needs.spare("nobody may not run this Python")
    if asked.returncode == 126 or "Fatal Python error" in asked.stderr:
        needs.spare("nobody may not run this Python")
    assert "only user 0" in json.loads(asked.stdout)["error"], asked.stderr


@pytest.mark.parametrize("mode", [0o770, 0o701, 0o755])
def test_a_folder_that_others_may_enter_is_not_used(mode: int, folder: Path) -> None:
    """Neither by who answers nor by who asks."""
    (folder / "dbscope").mkdir()
    (folder / "dbscope").chmod(mode)
    with pytest.raises(ConfigurationError, match="others may enter it"):
        monitor.serve()
    (folder / "dbscope" / f"1-x{server.SUFFIX}").touch()
    assert client.ask_all() == []
    answer = client.ask(folder / "dbscope" / f"1-x{server.SUFFIX}")
    assert answer is not None
    assert "others may enter" in (answer.problem or "")


def test_a_folder_of_another_user_s_is_not_used(folder: Path) -> None:
    """As one that was made in the temporary folder beforehand, to listen in; nor is a link to one."""
    (folder / "elsewhere").mkdir(mode=0o700)
    (folder / "dbscope").symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigurationError, match="another user's"):
        monitor.serve()
    if os.geteuid() == 0:
        (folder / "dbscope").unlink()
        (folder / "dbscope").mkdir(mode=0o700)
        os.chown(folder / "dbscope", 65534, 65534)
        with pytest.raises(ConfigurationError, match="another user's"):
            monitor.serve()


@pytest.mark.parametrize(
    ("request_", "refusal"),
    [
        (b"", "a request is a line, with its end"),
        (b'{"ask": "holdings"}', "with its end"),
        (b"GET / HTTP/1.1\r\n\r\n", "one line"),
        (b"hello\n", 'a request is JSON, such as {"ask": "holdings"}'),
        (b"\xff\xfe\n", "JSON"),
        (b"[" * 900 + b"\n", "JSON"),
        (b"x" * 5000 + b"\n", "at most 1000 bytes"),
        (b"[]\n", "there is one request"),
        (b'{"ask": "passwords"}\n', "there is one request"),
        (b'{"ask": "holdings", "and": "more"}\n', "there is one request"),
        (b'{"ask": "holdings"}\n{"ask": "holdings"}\n', "one line"),
    ],
)
def test_a_bad_request_is_refused_with_what_would_be_right(request_: bytes, refusal: str, path: Path) -> None:
    """And the next one is answered."""
    assert refusal in say(path, request_)["error"]
    assert say(path, b'{"ask": "holdings"}\n')["process"] == os.getpid()


def test_noise_is_refused(path: Path) -> None:
    """Whatever is sent, each time there is one line of JSON that says why not, and nothing is logged as a failure."""
    dice = random.Random(6)
    words = [b'{"ask"', b": ", b'"holdings"', b"}", b"\n", b"\x00", b"\xf0\x9f", b"1e999", b"null", b"[", b'"\\ud800"']
    for _ in range(300):
        noise = b"".join(dice.choices(words, k=dice.randrange(12))) or dice.randbytes(20)
        said = say(path, noise)
        assert {"error", "holdings"} & set(said), noise
        assert "see its log" not in said.get("error", ""), noise
    assert say(path, b'{"ask": "holdings"}\n')["process"] == os.getpid()


def test_who_does_not_finish_a_request_is_not_waited_for_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes behind is served."""
    monkeypatch.setattr(server, "PATIENCE", 0.1)
    assert "seconds to arrive" in say(path, b'{"ask"', end=False)["error"]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        assert say(path, b'{"ask": "holdings"}\n')["process"] == os.getpid()


def test_what_cannot_be_told_is_logged_and_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process goes on, and answers the next."""

    def fail() -> None:
        raise RuntimeError("swordfish")

    monkeypatch.setattr(server, "holdings", fail)
    said = say(path, b'{"ask": "holdings"}\n')
    assert "RuntimeError in process" in said["error"]
    assert "swordfish" not in said["error"]
    assert "swordfish" in caplog.text
    monkeypatch.undo()
    assert "holdings" in say(path, b'{"ask": "holdings"}\n')


def test_a_name_that_is_no_text_is_told_as_one(path: Path, sync_kit: SyncKit) -> None:
    """Names may be set, and nothing looks at them then."""
    with scope() as work:
        sync_kit.session().scalar(text("SELECT 1"))
        work.name = cast("Any", uuid.UUID(int=7))
        answer = client.ask(path)
    assert answer is not None
    assert [held.scope for held in answer.holdings] == [str(uuid.UUID(int=7))]


HELD = dict.fromkeys(each.name for each in fields(Holding)) | {
    "database": "books",
    "worker": "thread 'MainThread'",
    "state": "idle",
    "taken": "shop.py:1",
    "age": 1.0,
    "process": 7,
}
POOL = dict.fromkeys(each.name for each in fields(PoolState)) | {
    "database": "books",
    "dialect": "sqlite",
    "unnamed": 0,
    "process": 7,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"process": float("inf")},
        {"holdings": [HELD | {"age": "long"}]},
        {"holdings": [HELD | {"age": float("nan")}]},
        {"holdings": [HELD | {"scope": ["a list"]}]},
        {"pools": [POOL | {"database": None}]},
        {"pools": [POOL | {"out": "2"}]},
        {"pools": [7]},
    ],
    ids=str,
)
def test_an_answer_that_makes_no_sense_is_told_as_one(wrong: dict[str, Any]) -> None:
    """The view of all other processes goes on."""
    good = {"version": 1, "process": 7, "program": "p", "since": 0.0, "pools": [POOL], "holdings": [HELD]}
    assert client._understood(7, json.dumps(good).encode()).problem is None
    said = client._understood(7, json.dumps(good | wrong).encode())
    assert said.problem is not None
    assert "makes no sense" in said.problem


def test_no_parameters_and_no_password(folder: Path, tmp_path: Path) -> None:
    """Neither the values of a statement, nor what may be a secret in a URL that names a database."""
    path = monitor.serve()
    try:
        url = f"sqlite:///file:{tmp_path / 'x.db'}?uri=true&password=swordfish"
        hidden = Database(create_engine(f"sqlite:///{tmp_path / 'y.db'}"), name=url)
        with scope("s"):
            hidden.session.scalar(text("SELECT :value"), {"value": "swordfish"})
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(str(path))
                asking.sendall(b'{"ask": "holdings"}\n')
                said = asking.makefile().read()
        assert "SELECT" in said
        assert "swordfish" not in said
        hidden.dispose()
    finally:
        monitor.stop()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("the bank", "the bank"),
        ("postgresql://app:swordfish@h/d?password=swordfish", "postgresql://app:***@h/d"),
        ("mssql+pyodbc:///?odbc_connect=PWD=swordfish", "mssql+pyodbc://"),
        ("x://a b:swordfish", "x://..."),
        ("postgresql://app:swordfish@h/d apart for 'x'", "postgresql://app:***@h/d apart for 'x'"),
    ],
)
def test_names_of_databases_have_no_password(name: str, shown: str) -> None:
    """A database is called by its URL where it has no name."""
    assert without_secrets(name).startswith(shown)
    assert "swordfish" not in without_secrets(name)


def test_the_socket_of_a_killed_process_is_removed(folder: Path) -> None:
    """By whoever asks next, and by the next process that serves."""
    for cleans in (lambda: client.ask_all(), lambda: monitor.serve()):
        with process(HOLDER, folder) as holder:
            wait_for(lambda: len(sockets(folder)) == 1)
            left = sockets(folder)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert sockets(folder) == left
            cleans()
            assert left[0] not in sockets(folder)
    monitor.stop()


def test_a_socket_that_lives_is_never_removed(folder: Path) -> None:
    """Not even where its process has a number of another container's."""
    path = monitor.serve()
    try:
        moved = path.with_name(f"999999999-x{server.SUFFIX}")
        path.rename(moved)
        server.remove_stale(path.parent)
        assert moved.exists()
        moved.rename(path)
    finally:
        monitor.stop()
    assert sockets(folder) == []


def test_a_process_that_is_stopped_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are shown, and who does not answer, and that it does not."""
    with process(HOLDER, folder) as stopped, process(HOLDER, folder) as holder:
        wait_for(lambda: len(client.ask_all()) == 2)
        monkeypatch.setattr(client, "PATIENCE", 0.2)
        stopped.send_signal(signal.SIGSTOP)
        os.waitpid(stopped.pid, os.WUNTRACED)  # until then it may still answer
        try:
            answers = {answer.process: answer for answer in client.ask_all()}
        finally:
            stopped.send_signal(signal.SIGCONT)
        assert "no answer in 0.2 s" in (answers[stopped.pid].problem or "")
        assert answers[holder.pid].holdings


FORKS = """
import os, sys
from sqlalchemy import text
from dbscope import Database, monitor, scope
db = Database(os.environ["TEST_URL"], name="books")
explicit = os.environ.get("EXPLICIT")
if explicit:
    monitor.serve()
with scope("in the parent"):
    db.session.scalar(text("SELECT 1"))
    down, up = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(up)
        with scope("in the child"):
            db.session.scalar(text("SELECT 2"))
            if os.environ.get("ABANDON"):
                os.read(down, 1)
            os.read(down, 1)
        os._exit(0)
    os.close(down)
    print("ready", flush=True)
    sys.stdin.read()
    os.close(up)
    os.waitpid(child, 0)
"""


def test_a_child_of_a_fork_has_no_socket_that_its_parent_is_about_to_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would seem to live as long as the child does, and nobody would answer."""
    rename, closed = Path.rename, []

    def fork_and_rename(path: Path, to: Path) -> Path:
        listening = server._server._listening
        closed.append(listening is not None and fork(lambda: listening.fileno() == -1))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fork_and_rename)
    monitor.serve()
    monitor.stop()
    assert closed == [True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_fork_has_a_socket_of_its_own(folder: Path, tmp_path: Path) -> None:
    """It answers for itself, and never for its parent; one that was killed, or left by `os._exit`, is cleaned up."""
    program = "import warnings; warnings.simplefilter('ignore')\n" + FORKS
    with process(program, folder, TEST_URL=f"sqlite:///{tmp_path / 'x.db'}") as parent:
        wait_for(lambda: len(client.ask_all()) == 2)
        answers = {answer.process: answer for answer in client.ask_all()}
        (child,) = set(answers) - {parent.pid}
        assert [held.scope for held in answers[parent.pid].holdings] == ["in the parent"]
        assert [held.scope for held in answers[child].holdings] == ["in the child"]
    assert client.ask_all() == []
    assert sockets(folder) == []


def test_the_parent_s_end_ends_its_socket(folder: Path, tmp_path: Path) -> None:
    """A child that lives on does not keep it open: nobody would answer there."""
    program = "import warnings; warnings.simplefilter('ignore')\n" + FORKS
    with process(program, folder, TEST_URL=f"sqlite:///{tmp_path / 'x.db'}") as parent:
        wait_for(lambda: len(client.ask_all()) == 2)
        parent.send_signal(signal.SIGSTOP)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: parent.pid not in {answer.process for answer in client.ask_all()})


@pytest.mark.parametrize("value", ["0", "off", "No"])
def test_it_can_be_turned_off(value: str, folder: Path, tmp_path: Path) -> None:
    """By the environment; and `serve()` in the program says otherwise."""
    told = "from dbscope.monitor import server\n" + HOLDER.replace(
        'print("ready"',
        "import threading\n    assert all(t.name != 'dbscope-monitor' for t in threading.enumerate())"
        '\n    assert server._server.path is None\n    print("ready"',
    )
    with process(told, folder, DBSCOPE_MONITOR=value, TMPDIR=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)):
        assert not list(tmp_path.glob("dbscope*"))


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's runtime folder first, then one in the temporary folder with the user's number; or the chosen one."""
    monkeypatch.setenv("DBSCOPE_MONITOR", "1")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/of-mine")
    found = server.folders()
    assert found[0] == Path("/run/user/of-mine/dbscope")
    assert Path(f"/tmp/dbscope-{os.geteuid()}") in found
    monkeypatch.setenv("DBSCOPE_MONITOR", "/run/shop")
    assert server.folders() == [Path("/run/shop/dbscope")]


def test_a_folder_that_cannot_be_is_explained(folder: Path, tmp_path: Path) -> None:
    """Who asks for it in the program gets an error; nobody else is disturbed."""
    with pytest.raises(ConfigurationError, match="DBSCOPE_MONITOR=/the/folder"):
        monitor.serve(folder / "nowhere" / "at all")
    server._server.chosen = []
    longest = 107 - len(f"{folder}//dbscope/{os.getpid()}-01234567.sock")
    for length in (longest + 1, 120):
        long = folder / ("x" * length)
        long.mkdir()
        with pytest.raises(ConfigurationError, match="too long"):
            monitor.serve(long)
    server._server.chosen = []


def test_a_thread_that_cannot_begin_is_no_matter_of_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has none to give: the next connection asks for it again."""
    own = server._Server()
    monkeypatch.setattr(lifecycle, "sleepers", [own.wake])

    def refuse(target: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(server, "_start", refuse)
    lifecycle.wake()
    assert lifecycle.sleepers == [own.wake]


def test_serve_and_stop_may_be_called_again(folder: Path) -> None:
    """There is one socket, and then none, and no thread."""
    assert monitor.serve() == monitor.serve()
    assert len(sockets(folder)) == 1
    monitor.stop()
    monitor.stop()
    assert sockets(folder) == []
    wait_for(lambda: all(thread.name != "dbscope-monitor" for thread in threading.enumerate()))
    assert monitor.serve().exists()
    monitor.stop()


def test_what_the_engine_gave_to_others_is_counted(path: Path, sync_kit: SyncKit) -> None:
    """A connection that was taken without a session is out, and has no scope to be named by."""
    kit = sync_kit
    kit.database(pool_size=3, max_overflow=2)
    with kit.db.engine.connect(), kit.db.reader() as session:
        session.scalar(text("SELECT 1"))
        answer = client.ask(path)
    assert answer is not None
    pool = next(pool for pool in answer.pools if pool.most == 5)
    assert (pool.out, pool.unnamed) == (2, 1)
