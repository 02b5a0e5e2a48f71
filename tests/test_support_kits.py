"""The kits that the other tests rely on."""

import pytest

from dbscope.where import running_loop
from tests.support.kits import Payment, twice


@twice
async def test_a_kit_runs_a_test_in_its_own_colour(kit):
    """The sync kit runs a test outside of every loop, the async one on a loop; both see what was committed."""
    assert (running_loop() is None) is (kit.colour == "sync")
    async with kit.scope("booking"):
        session = kit.session()
        session.add(Payment(amount=300))
        await kit.done(session.flush())
        assert kit.count() == 0
        assert kit.checked_out() == 1
        await kit.done(session.commit())
    assert kit.amounts() == [300]
    assert kit.checked_out() == 0


@twice
async def test_a_kit_runs_parts_side_by_side(kit):
    """Parts that wait for each other are through, and one's failure is given back beside the other's result."""
    ready = kit.event()

    async def waits():
        await ready.wait()
        return 1

    async def wakes():
        ready.set()
        raise KeyError

    first, second = await kit.together(waits, wakes)
    assert first == 1
    assert isinstance(second, KeyError)


@pytest.mark.parametrize("held", [False, True])
def test_a_kit_fails_a_test_that_leaves_a_connection(tmp_path, held):
    """A test that leaves a connection checked out fails at its end."""
    from dbscope import ScopeWarning
    from tests.support.kits import SyncKit

    kit = SyncKit(f"sqlite:///{tmp_path / 'left.db'}")
    session = kit.db.new_session()

    async def test():
        session.connection()
        if not held:
            session.close()

    if held:
        with pytest.raises(ScopeWarning, match="outside of every scope"):
            kit.run(test())
        session.close()
        kit.close()
    else:
        kit.run(test())


@twice
async def test_a_kit_over_postgresql(server_kit):
    """The kit over PostgreSQL has the tables, too, and sees what was committed."""
    async with server_kit.transaction() as session:
        session.add(Payment())
    assert server_kit.count() == 1
