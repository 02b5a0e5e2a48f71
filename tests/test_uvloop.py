"""On uvloop, which has handles and transports of its own: the tests of other modules that may depend on the loop."""

import asyncio
import functools
import sys

import pytest
from sqlalchemy import text

from dbscope import scope
from dbscope.where import spell
from tests import test_fanout, test_hooks, test_interruption, test_lifecycle, test_scope
from tests.support import needs
from tests.support.kits import make_kit

uvloop = needs.package("uvloop")

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="event loop policies are deprecated")

async_url = test_interruption.async_url


@pytest.fixture(autouse=True)
def uvloops():
    """Every loop that a test makes is one of uvloop's."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield
    asyncio.set_event_loop_policy(before)


@pytest.fixture
def kit(tmp_path):
    """An async kit over a SQLite file."""
    return make_kit("async", f"sqlite:///{tmp_path / 'test.db'}")


@pytest.fixture
def async_kit(kit):
    """The same, for tests that are run by `on_a_loop`."""
    return kit


@pytest.fixture
def server_kit(postgres_url):
    """An async kit over PostgreSQL."""
    return make_kit("async", postgres_url)


def on_a_loop(test):
    """A test that pytest would run on a loop, on one of the kit's own."""

    @functools.wraps(test)
    def run(async_kit, **fixtures):
        async_kit.run(test(async_kit=async_kit, **fixtures))

    return run


def test_it_is_uvloop(kit):
    """The tests of this module run where they say they do, and a line is the task's, not one of the loop's caller."""

    async def main():
        assert type(asyncio.get_running_loop()) is uvloop.Loop
        async with scope("work"):
            await kit.session().execute(text("INSERT INTO payments (amount) VALUES (1)"))
            [write] = kit.session()._dbscope.writes
            assert spell(write.place).startswith("tests/test_uvloop.py:")
            await kit.session().rollback()

    kit.db  # noqa: B018  # makes the tables
    kit.run(main())


test_cancelled_at_every_await = test_interruption.test_transactions_9_cancelled_at_every_await
test_the_running_statement = test_interruption.test_transactions_9_the_running_statement_is_cancelled
test_cancel_of_a_commit = on_a_loop(test_hooks.test_transactions_9_a_cancel_ends_a_commit_that_waits)

test_on_success_commits = test_lifecycle.test_scopes_7_on_success_commits_what_was_done
test_on_success_rolls_back = test_lifecycle.test_scopes_7_on_success_rolls_back_on_error
test_a_failing_commit = test_lifecycle.test_scopes_7_a_failing_commit_raises_and_releases
test_async_hooks = on_a_loop(test_hooks.test_transactions_8_async_hooks_are_awaited)

test_fan_out = test_fanout.test_scopes_6_each_part_has_its_own_scope
test_fan_out_on_a_pool_of_one = test_fanout.test_scopes_6_forty_one_parts_on_a_pool_of_one
test_nested_fan_out = test_fanout.test_scopes_6_nested_fan_out_on_a_pool_of_one
test_an_error_in_a_fan_out = on_a_loop(test_fanout.test_scopes_6_an_error_cancels_the_tasks)
test_a_cancelled_fan_out = on_a_loop(test_fanout.test_scopes_6_cancelling_the_caller_cancels_the_parts)

test_a_dead_scope = test_scope.test_scopes_4_work_that_inherited_the_scope_is_told
test_overlap = test_scope.test_scopes_5_overlap_raises_naming_both
test_siblings = on_a_loop(test_scope.test_scopes_5_a_sibling_cannot_end_what_another_wrote)
test_a_cold_pool = on_a_loop(test_scope.test_scopes_5_overlap_of_tasks_while_a_cold_pool_connects)
