"""Celery workers as people run them: `celery -A … worker` in a process of its own, and no service beside it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
from celery import Celery
from kombu.transport import filesystem, memory
from kombu.utils import json

from tests.support.kits import LIMIT
from tests.support.web import wait_for

kombu_json: Any = json  # which says nothing of types
untyped: Any = kombu
ROOT = Path(__file__).parent.parent.parent


def _quick(drain_events: Any) -> Any:
    """A transport's `drain_events`, for which a worker that is to end does not wait two seconds."""

    def drain_quickly(self: Any, connection: Any, timeout: Any = None) -> Any:
        return drain_events(self, connection, timeout=0.05)

    return drain_quickly


class Channel(filesystem.Channel):
    """Kombu's, but for a race: a reader could take a message whose file was made, and not yet written."""

    def _put(self, queue: Any, message: Any, **options: Any) -> None:  # type: ignore[override]
        name = f"{time.monotonic_ns()}_{uuid.uuid4()}.{queue}.msg"
        folder = Path(self.data_folder_out)
        part = folder.parent / name
        part.write_text(kombu_json.dumps(message))
        part.rename(folder / name)


class Files(filesystem.Transport):
    """Messages are files in a folder, written whole."""

    Channel = Channel
    drain_events = _quick(filesystem.Transport.drain_events)


class Memory(memory.Transport):
    """Messages of this process."""

    drain_events = _quick(memory.Transport.drain_events)


def settings(folder: Path) -> dict[str, Any]:
    """The configuration of a worker, and of its clients: messages and results are files in a folder.

    A file `broker` in the folder is the URL of another broker.
    """
    for name in ("queue", "control", "results"):
        (folder / name).mkdir(exist_ok=True)
    broker = folder / "broker"  # if the test has written one there
    elsewhere: dict[str, Any] = {}
    if broker.exists():
        queue = untyped.Queue(f"dbscope-{folder.name}-{folder.stat().st_ino}", auto_delete=True)
        elsewhere = {"task_queues": [queue], "task_default_queue": queue.name}
        elsewhere |= {"broker_url": broker.read_text(), "broker_transport": None, "broker_transport_options": {}}
    return {
        "broker_url": None,
        "broker_transport": "tests.support.workers:Files",
        "broker_transport_options": {
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.02,
        },
        "broker_connection_retry_on_startup": True,
        "result_backend": f"file://{folder / 'results'}",
        "worker_prefetch_multiplier": 1,
        "worker_lost_wait": 0.5,
        **elsewhere,
    }


def answers(broker: str) -> bool:
    """Whether there is a broker at a URL."""
    with contextlib.suppress(Exception), untyped.Connection(broker, connect_timeout=2) as connection:
        connection.connect()
        return True
    return False


class Worker:
    """A running worker."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, app: Any) -> None:
        self.process = process
        self.log = log
        self.app = app  # a client of it

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """Send it a task; its `AsyncResult`."""
        return self.app.send_task(name, args, **options)

    def outcome(self, result: Any) -> tuple[str, Any]:
        """The state that a task comes to, and what it returned or raised."""
        done: list[Any] = []

        def ready() -> bool:
            with contextlib.suppress(ValueError, untyped.exceptions.DecodeError):  # the file is being written
                if result.state not in ("PENDING", "STARTED", "RETRY"):
                    done.append((result.state, result.result))
            return bool(done) or self.process.poll() is not None

        try:
            wait_for(ready)
        except AssertionError as error:
            error.add_note(self.log.read_text())
            raise
        state, value = done[0]
        return state, value

    def run(self, name: str, *args: Any) -> tuple[str, Any]:
        """Send it a task, and wait for the outcome."""
        return self.outcome(self.send(name, *args))


@contextlib.contextmanager
def celery_worker(
    folder: Path, app: str, pool: str, *options: str, cwd: Path = ROOT, kill: bool = False, **env: str
) -> Iterator[Worker]:
    """A worker of the application `app` (as for `celery -A`), until the end of the block.

    Args:
        folder: where its messages, its results and its log are.
        app: the module, which is found from the root of the project, or in the folder.
        pool: the kind.
        options: more of the command line.
        cwd: where it is started.
        kill: do not ask it to end, when the block is left.
        env: of the worker.
    """
    log = folder / f"log-{uuid.uuid4()}"
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "--pool", pool]
    command += ["--loglevel", "INFO", "--without-gossip", "--without-mingle"]
    command += ["--without-heartbeat", *options]
    path = os.pathsep.join([str(ROOT), str(folder)])
    env = os.environ | {"DBSCOPE_TEST_FOLDER": str(folder), "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"} | env
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: b" ready." in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        with Celery("client", set_as_current=False, config_source=settings(folder)) as client_app:
            yield Worker(process, log, client_app)
    finally:
        try:
            if not kill:
                process.terminate()
                process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
