"""The servers that people run, each in a process of its own, with the application that tests/servers/ has; and wrk."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tests.support import needs
from tests.support.hosts import Host
from tests.support.kits import LIMIT
from tests.support.postgres import free_port
from tests.support.web import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
APP = "tests.servers.ledger"

# How each is started with the application's factory, at an address.
_GUNICORN = ("gunicorn", "--bind={host}:{port}", "--workers=2", "--log-level=critical", "--graceful-timeout=5")
COMMANDS = {
    "uvicorn": ("uvicorn", "--host={host}", "--port={port}", "--log-level=critical", "--factory", f"{APP}:asgi"),
    "hypercorn": ("hypercorn", "--bind={host}:{port}", "--log-level=critical", f"{APP}:asgi()"),
    "granian-asgi": (
        "granian",
        "--port={port}",
        "--log-level=critical",
        "--interface=asgi",
        "--factory",
        f"{APP}:asgi",
    ),
    "granian-wsgi": (
        *(
            "granian",
            "--host={host}",
            "--port={port}",
            "--log-level=critical",
            "--interface=wsgi",
            "--blocking-threads=8",
        ),
        *("--factory", f"{APP}:wsgi"),
    ),
    "gunicorn-asgi": (*_GUNICORN, "--worker-class=asgi", f"{APP}:asgi()"),
    "gunicorn-gthread": (*_GUNICORN, "--worker-class=gthread", "--threads=8", f"{APP}:wsgi()"),
    "gunicorn-gevent": (*_GUNICORN, "--worker-class=gevent", f"{APP}:wsgi()"),
    "waitress": ("waitress", "--listen={host}:{port}", "--threads=8", "--call", f"{APP}:wsgi"),
}


@contextlib.contextmanager
def served(server: str, url: str, host: Host | None = None, **environment: str) -> Iterator[tuple[str, int]]:
    """Serve the application on a server; gives its address. Everything is over when the block is left."""
    port = free_port()
    module, *options = COMMANDS[server]
    if find_spec(module) is None:
        needs.missing(f"{module} is not installed (requirements/dev.txt has it)")
    address = ("127.0.0.1" if host is None else host.address, port)
    command = [*(host.prefix if host else []), sys.executable, "-m", module]
    command += [option.format(host=address[0], port=port) for option in options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment | {"LEDGER_URL": url, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,  # its workers are stopped with it, whatever happens
        )
        try:
            wait_for(lambda: process.poll() is not None or _answers(address))
            assert process.poll() is None, "the server did not start"
            yield address
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT)
        except BaseException as error:
            log.seek(0)
            error.add_note(f"{server} said: {log.read().decode(errors='replace')[-4000:]}")
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
        return True
    return False


@dataclass
class Load:
    """What wrk sent, and what came back."""

    requests: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)


def load(
    address: tuple[str, int], paths: Sequence[str], *, name: str = "", seconds: int = 2, connections: int = 16
) -> Load:
    """POST to all paths, in turns, on many connections at once, for a while; the ids have the load's name in them."""
    program = shutil.which("wrk")
    if program is None:
        needs.missing("wrk is not installed (Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        script = ROOT / "tests" / "servers" / "load.lua"
        command = [program, "--threads=2", f"--connections={connections}", f"--duration={seconds}s", "--timeout=30s"]
        done = subprocess.run(
            [*command, f"--script={script}", "http://{}:{}".format(*address), "--", ",".join(paths), str(saved), name],
            capture_output=True,
            text=True,
            check=True,
        )
        found = Load(saved={id for file in Path(folder).iterdir() for id in file.read_text().split()})
    for line in done.stdout.splitlines():
        if line.startswith("answered"):
            for status, times in re.findall(r"(\d+)=(\d+)", line):
                found.statuses[int(status)] = found.statuses.get(int(status), 0) + int(times)
        elif line.startswith("requests"):
            found.requests = int(line.split()[1])
        elif line.startswith("connect="):
            found.errors = {name: int(times) for name, times in re.findall(r"(\w+)=(\d+)", line)}
    return found
