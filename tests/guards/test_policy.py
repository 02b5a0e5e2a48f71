"""What is done about what a guard finds: the levels, for all databases or for one."""

import logging
import warnings
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from dbscope import ConfigurationError, GuardError, GuardWarning, guards
from dbscope.events import HookRun
from dbscope.guards import policy
from tests.support.kits import SyncKit


class Suspicious(policy.Guard):
    """Finds something in every hook."""

    name = "suspicious"
    default: policy.Level = "off"
    kinds = (HookRun,)

    def look(self, fact: Any) -> None:
        """Find something."""
        self.found(f"{fact.name} was run", database=fact.name if isinstance(fact.name, SyncKit) else None)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Suspicious:
    """A guard of the test's own."""
    for name in ("_guards", "_levels", "_watching"):
        value = getattr(policy, name)
        monkeypatch.setattr(policy, name, value.copy())
    made = Suspicious()
    policy.register(made)
    yield made
    made.stop()


def run_hook() -> None:
    """Tell what the guard looks at, as the core does."""
    for observer in HookRun.observers:
        observer(HookRun(name="hook", outcome="commit"))


def test_a_guard_that_is_off_observes_nothing(guard: Suspicious) -> None:
    """Until somebody wants it, for all databases or one; and no longer than that."""
    assert not HookRun.observers
    guards.configure(suspicious="log")
    assert HookRun.observers
    guards.configure(suspicious="off")
    assert not HookRun.observers


def test_log_warn_and_raise(guard: Suspicious, caplog: pytest.LogCaptureFixture, found: list[Any]) -> None:
    """Each does what its name says; what is found is told at every level but "off"."""
    guards.configure(suspicious="log")
    with caplog.at_level(logging.WARNING, "dbscope.guards"):
        run_hook()
    assert "suspicious: hook was run" in caplog.text
    guards.configure(suspicious="warn")
    with pytest.warns(GuardWarning, match="hook was run"):
        run_hook()
    guards.configure(suspicious="raise")
    with pytest.raises(GuardError, match=r'hook was run\n.*set to "raise"'):
        run_hook()
    assert [(fact.guard, fact.message) for fact in found] == [("suspicious", "hook was run")] * 3


def test_where_warnings_are_errors_a_warning_is_a_guard_s_error(guard: Suspicious) -> None:
    """So that it comes out where others would be taken for a failure of the observer's."""
    guards.configure(suspicious="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GuardError):
            run_hook()


def test_a_database_may_have_levels_of_its_own(guard: Suspicious, sync_kit: SyncKit) -> None:
    """They count for what is about it, and the others' for the rest."""
    guards.configure(sync_kit.db, suspicious="raise")
    assert policy.level_of("suspicious", sync_kit.db) == "raise"
    assert policy.level_of("suspicious") == "off"
    assert HookRun.observers
    guards.configure(sync_kit.db, suspicious="off")
    assert not HookRun.observers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typo": "log"}, "no guard 'typo'. There are: .*pool_exhausted"),
        ({"long_scope": "loud"}, '"off", "log", "warn" or "raise", not \'loud\''),
        ({"long_scope": None}, "not None"),
        ({"budget": 0}, "positive number of seconds, not 0"),
        ({"budget": "5"}, "not '5'"),
        ({"budget": True}, "not True"),
    ],
)
def test_bad_levels(options: Any, message: str) -> None:
    """The error names what there is, and nothing is changed."""
    with pytest.raises(ConfigurationError, match=message):
        guards.configure(**options)


@pytest.mark.parametrize("database", ["shop", create_engine("sqlite://"), sessionmaker()])
def test_levels_of_what_is_no_database(database: Any) -> None:
    """An engine's would count for nothing: the error says what has levels."""
    with pytest.raises(ConfigurationError, match=r"for a Database, .* or what watch\(engine\) gave, not for a "):
        guards.configure(database, long_scope="off")


def test_the_same_warning_is_shown_once(guard: Suspicious) -> None:
    """For a line, as Python shows others."""
    guards.configure(suspicious="warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            run_hook()
    assert len(told) == 1
