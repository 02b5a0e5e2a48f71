"""Tests in a process of their own, whose threads gevent has turned into greenlets before anything else was imported.

    @in_gevent
    def test_each_greenlet_has_its_own(kit): ...

The body runs in that process, with a kit over the test's own PostgreSQL database; what it raises fails the test.
"""

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support import needs
from tests.support.kits import LIMIT, SyncKit

ROOT = Path(__file__).parent.parent.parent


def in_gevent(test: Callable[[SyncKit], None]) -> Callable[..., None]:
    """Run a test in a process under gevent."""

    @functools.wraps(test)
    def run(sync_server_kit: SyncKit) -> None:
        needs.package("gevent")
        url = sync_server_kit.url.render_as_string(hide_password=False)
        program = "from gevent import monkey; monkey.patch_all(); from tests.support import gevented; gevented.main()"
        python(program, test.__module__, test.__name__, url)

    vars(run)["body"] = test
    del vars(run)["__wrapped__"]  # the kit of the test's own parameter is made in the process
    return run


def python(program: str, *arguments: str) -> str:
    """What a program prints; it fails the test if it fails, or says anything on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT * 2,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def main() -> None:
    """In the process: run the body of one test."""
    module, name, url = sys.argv[1:]
    kit = SyncKit(url)
    vars(importlib.import_module(module))[name].body(kit)
    kit.close()
