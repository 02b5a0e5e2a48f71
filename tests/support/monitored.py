"""Processes that answer `dbscope top`, in a folder of the test's own."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ELSEWHERE = ("COLUMNS", "DATABASE_URL", "LINES", "NO_COLOR")  # a test says by itself what it wants
ROOT = Path(__file__).parent.parent.parent


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's: the system takes about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="dbs-", dir="/tmp") as folder:
        yield Path(folder)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a process that is to answer there, or to ask there."""
    kept = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    return kept | {"DBSCOPE_MONITOR": str(folder), "PYTHONPATH": str(ROOT)} | more


@contextlib.contextmanager
def process(program: str, folder: Path, **more: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has printed `ready`, and ends when its input does, as `sys.stdin.read()` tells it."""
    running = subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", program],
        env=environment(folder, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        said = running.stdout.readline()
        assert said == "ready\n", said
        yield running
        with contextlib.suppress(BrokenPipeError):
            running.stdin.close()
        assert running.wait(30) in (0, -9)
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            running.stdin.close()


def top(folder: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """`dbscope top`, in a pipe."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "dbscope", "top", *arguments],
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
