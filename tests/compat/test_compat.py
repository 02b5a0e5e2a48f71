"""What `dbscope.compat` offers."""

import subprocess
import sys

import pytest

from dbscope import compat
from tests.support import needs

# The public names, sorted. A name that goes from here breaks the applications that were moved to it.
PUBLIC = [
    "ManagedSession",
    "RequestSessions",
    "async_scoped_session",
    "check_database_connection",
    "init_engine",
    "init_session_factory",
    "scoped_session",
]


def test_public_names_are_listed():
    """A public name comes or goes only on purpose."""
    assert compat.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """Every public name says what the caller gets."""
    if name.startswith("async"):
        needs.module("greenlet", extra="async")
    assert getattr(compat, name).__doc__


def test_import_without_greenlet():
    """`import dbscope.compat` works where greenlet is not installed; the async name says what to install."""
    code = """
import sys
sys.modules["greenlet"] = None
import dbscope.compat
dbscope.compat.scoped_session
try:
    dbscope.compat.async_scoped_session
except ImportError as error:
    assert 'pip install "dbscope[async]"' in str(error), error
else:
    raise AssertionError("no error")
try:
    dbscope.compat.nothing
except AttributeError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
