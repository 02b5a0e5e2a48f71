"""The page on threads and processes: its programs that need a process of their own run in one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.kits import LIMIT

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "threads-and-processes.md"
PROGRAMS = re.findall(r"^```py\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("program", "output"), PROGRAMS, ids=["jobs", "gunicorn", "gevent"])
def test_programs_run(program, output, tmp_path):
    """Each program of the page runs, and prints what the page says it prints."""
    if "gevent" in program:
        needs.package("gevent")
    (tmp_path / "jobs.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "jobs.py"], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", output)
