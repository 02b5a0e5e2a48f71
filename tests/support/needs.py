"""The one gate for tests that need what a machine may not have.

Locally such a test is skipped, and the closing lines of pytest say why. Where `CI` is set it fails instead, because a
suite that skips there protects nothing. `DBSCOPE_NO_EXTRAS` is set by scripts/matrix.py for the environment without
dbscope's extras: there a missing extra is the point, in CI as well.
"""

import importlib
import os
import warnings
from types import ModuleType
from typing import NoReturn

import pytest

NO_EXTRAS = os.environ.get("DBSCOPE_NO_EXTRAS") == "1"


def missing(reason: str) -> NoReturn:
    """Skip the running test (or the module being imported) for `reason`; fail instead where `CI` is set."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (tests are not skipped where CI is set)", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def missing_extra(extra: str) -> NoReturn:
    """Skip for want of one of dbscope's extras; allowed in CI only in the environment that has none on purpose."""
    reason = f"needs the extra dbscope[{extra}]"
    if NO_EXTRAS:
        pytest.skip(reason, allow_module_level=True)
    missing(reason)


def spare(reason: str) -> NoReturn:
    """Skip for want of what no machine has to have, in CI either: other tests protect the same promise without it."""
    pytest.skip(reason, allow_module_level=True)


def module(name: str, *, extra: str) -> ModuleType:
    """Import a module that comes with one of dbscope's extras, or skip naming the extra.

    Call it at the head of a test module, in a fixture or in a test:

        psycopg = needs.module("psycopg", extra="postgresql")
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
    missing_extra(extra)


def package(name: str) -> ModuleType:
    """Import a package of the development environment's, which is none of dbscope's extras, or skip naming it.

    What the package's own imports are warned of is not ours to mend.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise
    if NO_EXTRAS:
        pytest.skip(f"needs {name}", allow_module_level=True)
    missing(f"needs {name}")
