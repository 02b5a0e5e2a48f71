"""Fan-out: parts of one piece of work, each in its own scope, no more than the pool can serve (DESIGN, Scopes 6)."""

import asyncio
import contextvars
import os
import threading

import pytest
from sqlalchemy import text

from dbscope import ConfigurationError, FanOutError, current_scope
from tests.support.kits import LIMIT, Payment, twice


def fanning(kit, function, items, db=None, **options):
    """`db.fan_out` of a coroutine function, which in sync is driven in the part's thread."""
    from tests.support.kits import drive

    db = db or kit.db
    if kit.colour == "async":
        return db.fan_out(function, items, **options)
    return kit.done(db.fan_out(lambda item: drive(function(item)), items, **options))


def small(kit, size=1, overflow=0):
    """The kit's database, with a pool in which nobody ever waits: who finds it empty fails at once."""
    return kit.database(pool_size=size, max_overflow=overflow, pool_timeout=0)


async def others_had_their_turn(kit, db, running):
    """Return when whoever else could start has started, or is known to wait for a slot."""
    if kit.colour == "async":
        for _ in range(20):
            await asyncio.sleep(0)
    else:
        while not db.slots.waiting and len(running) < 2:
            os.sched_yield()


@twice
async def test_scopes_6_each_part_has_its_own_scope(kit):
    """The parts have scopes and sessions of their own, named after the function; results come in the items' order."""
    seen = []

    async def double(item):
        work = current_scope()
        seen.append((work, kit.session()))
        assert "double" in work.name or "lambda" in work.name
        return await kit.done(kit.session().scalar(text("SELECT :n * 2"), {"n": item}))

    async with kit.scope("caller") as caller:
        assert await fanning(kit, double, range(5)) == [0, 2, 4, 6, 8]
        assert current_scope() is caller
    assert len({id(work) for work, _ in seen}) == len({id(session) for _, session in seen}) == 5
    assert all(work.ended for work, _ in seen)
    assert kit.checked_out() == 0


@twice
async def test_scopes_6_each_part_has_its_callers_context(kit):
    """What the caller keeps in context variables, a request's id for one, is there in the parts."""
    request = contextvars.ContextVar("request", default=None)
    request.set("GET /")

    async def part(_):
        return request.get()

    assert await fanning(kit, part, range(2)) == ["GET /"] * 2


@twice
async def test_scopes_6_forty_one_parts_on_a_pool_of_one(kit):
    """FAILURES 1, 21: 41 parts that write share one connection, one after the other, and none waits in the pool."""
    db = small(kit)

    async def write(item):
        async with kit.transaction() as session:
            session.add(Payment(amount=item))

    await fanning(kit, write, range(41))
    assert kit.amounts() == list(range(41))
    assert kit.checked_out(db) == 0


@twice
async def test_scopes_6_overflow_counts(kit):
    """A pool of one with an overflow of two serves three parts at once, and no fourth."""
    db = small(kit, 1, 2)
    running, most = [], []
    three = kit.event()

    async def part(item):
        await kit.done(kit.session().scalar(text("SELECT 1")))
        running.append(item)
        most.append(len(running))
        if len(running) == 3:
            three.set()
        await three.wait()
        if kit.colour == "async":
            await others_had_their_turn(kit, db, running)
        running.remove(item)

    await fanning(kit, part, range(6))
    assert max(most) == 3


@twice
async def test_scopes_6_the_callers_own_connection_counts(kit):
    """A caller that holds one of two connections leaves one to its parts, which run one at a time."""
    db = small(kit, 2)
    running, most = [], []

    async def part(item):
        await kit.done(kit.session().scalar(text("SELECT 1")))
        running.append(item)
        most.append(len(running))
        if item == 0:
            await others_had_their_turn(kit, db, running)
        running.remove(item)

    async with kit.scope():
        await kit.done(kit.session().scalar(text("SELECT 1")))
        await fanning(kit, part, range(4))
        assert kit.checked_out() == 1
        assert (db.slots.used, db.slots.reserved, db.slots.stuck) == (0, 0, 0)  # it waits no more
    assert max(most) == 1


async def test_scopes_6_several_fan_outs_of_one_caller_count_its_connection_once(async_kit):
    """Side by side, on a pool of two, of which the caller holds one: none is refused, and all run."""
    kit = async_kit
    db = small(kit, 2)

    async def part(item):
        await kit.session().scalar(text("SELECT 1"))
        return item

    async with kit.scope():
        await kit.session().scalar(text("SELECT 1"))
        found = await asyncio.gather(db.fan_out(part, [1, 2]), db.fan_out(part, [3]))
        assert (db.slots.used, db.slots.reserved, db.slots.stuck, db.slots.callers) == (0, 0, 0, {})
    assert found == [[1, 2], [3]]


@twice
async def test_scopes_6_other_fan_outs_count(kit):
    """Two fan-outs at the same time share the pool's one connection."""
    db = small(kit)
    running, most = [], []

    async def part(item):
        await kit.done(kit.session().scalar(text("SELECT 1")))
        running.append(item)
        most.append(len(running))
        await others_had_their_turn(kit, db, running) if item == 0 else None
        running.remove(item)
        return item

    async def first():
        return await fanning(kit, part, range(3))

    async def second():
        return await fanning(kit, part, range(3))

    assert await kit.together(first, second) == [[0, 1, 2], [0, 1, 2]]
    assert max(most) == 1


@twice
async def test_scopes_6_the_limit_counts(kit):
    """With `limit=1` no two parts run at once, although the pool has room."""
    running, most = [], []

    async def part(item):
        running.append(item)
        most.append(len(running))
        if kit.colour == "async":
            await others_had_their_turn(kit, kit.db, running)
        else:
            for _ in range(2000):
                os.sched_yield()
        running.remove(item)

    await fanning(kit, part, range(5), limit=1)
    assert max(most) == 1


def test_scopes_6_threads_are_limited_over_a_pool_without_a_limit(sync_kit):
    """A pool that gives out any number of connections has 32 parts run in threads at once, and not one for each."""
    db = sync_kit.database(pool_size=0)
    running, most = [], []
    full = threading.Event()

    def part(item):
        running.append(item)
        most.append(len(running))
        if len(running) == 32:
            full.set()
        assert full.wait(LIMIT)
        for _ in range(2000):
            os.sched_yield()
        running.remove(item)

    db.fan_out(part, range(40))
    assert max(most) == 32


@twice
async def test_scopes_6_nested_fan_out_on_a_pool_of_one(kit):
    """Parts that hold no connection may fan out again on a pool of one, twice over: nobody starves."""
    small(kit)

    async def leaf(item):
        return await kit.done(kit.session().scalar(text("SELECT :n"), {"n": item}))

    async def branch(item):
        return sum(await fanning(kit, leaf, [item, item]))

    async def tree(item):
        return sum(await fanning(kit, branch, [item, item]))

    assert await fanning(kit, tree, [1, 2, 3]) == [4, 8, 12]


@twice
async def test_scopes_6_a_part_that_holds_its_connection_does_not_lend_it(kit):
    """A part that is in a transaction when it fans out again keeps its slot: its own parts share what is left."""
    db = small(kit, 2)
    running, done = [], []

    async def inner(item):
        running.append(item)
        await kit.done(kit.session().execute(text("SELECT 1")))
        if item == 0:
            await others_had_their_turn(kit, db, running)
        assert running == [item]
        running.remove(item)
        done.append(item)

    async def outer(_):
        await kit.done(kit.session().execute(text("SELECT 1")))
        await fanning(kit, inner, range(3))

    await fanning(kit, outer, [0])
    assert done == [0, 1, 2]
    assert kit.checked_out(db) == 0


@twice
async def test_scopes_6_an_impossible_fan_out_is_refused(kit):
    """A caller that holds the only connection is told at once that its parts could never begin."""
    db = small(kit)

    async def part(item):
        pytest.fail("it ran")

    async with kit.scope():
        await kit.done(kit.session().scalar(text("SELECT 1")))
        with pytest.raises(FanOutError, match=r"test_fanout.py:\d+ could never begin: .* 1 connection,") as caught:
            await fanning(kit, part, [1])
        assert "Fan out before the transaction" in str(caught.value)
    assert (db.slots.used, db.slots.reserved, db.slots.stuck, len(db.slots.waiting)) == (0, 0, 0, 0)
    assert await fanning(kit, _one, [1]) == [1]


async def _one(item):
    return item


@twice
async def test_scopes_6_two_callers_that_hold_everything_are_refused(kit):
    """Two callers hold both connections and fan out: one is refused, and the other goes on when that one has ended."""
    kit.database(pool_size=2, max_overflow=0, pool_timeout=LIMIT)  # the refused one gives back in its own time
    both = [kit.event(), kit.event()]

    async def caller(number):
        async with kit.scope():
            await kit.done(kit.session().scalar(text("SELECT 1")))
            both[number].set()
            await both[1 - number].wait()
            return await fanning(kit, _reads(kit), [number])

    results = await kit.together(lambda: caller(0), lambda: caller(1))
    refused = [result for result in results if isinstance(result, FanOutError)]
    assert len(refused) == 1
    assert [result for result in results if result not in refused] in ([[0]], [[1]])


def _reads(kit):
    async def part(item):
        return await kit.done(kit.session().scalar(text("SELECT :n"), {"n": item}))

    return part


@twice
async def test_scopes_6_an_error_stops_further_parts(kit):
    """The first error comes out as it was raised; no further part is begun, and everything is given back."""
    db = small(kit)
    begun = []

    async def part(item):
        begun.append(item)
        await kit.done(kit.session().scalar(text("SELECT 1")))
        if item == 1:
            raise KeyError("part 1")

    with pytest.raises(KeyError, match="part 1"):
        await fanning(kit, part, range(10))
    assert begun == [0, 1]
    assert kit.checked_out() == 0
    assert (db.slots.used, db.slots.reserved, db.slots.stuck, len(db.slots.waiting)) == (0, 0, 0, 0)


async def test_scopes_6_an_error_cancels_the_tasks(async_kit):
    """In async the parts that are running are cancelled by another's error, and have released when it comes out."""
    cancelled, holding = [], asyncio.Event()

    async def part(item):
        await async_kit.session().scalar(text("SELECT 1"))
        if item == 0:
            holding.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(item)
                raise
        await holding.wait()
        raise KeyError

    with pytest.raises(KeyError):
        await async_kit.db.fan_out(part, [0, 1])
    assert cancelled == [0]
    assert async_kit.checked_out() == 0


@pytest.mark.parametrize("times", [1, 3])
async def test_scopes_6_cancelling_the_caller_cancels_the_parts(async_kit, times):
    """A cancelled caller has its parts cancelled, waits until all have released, however often it is cancelled."""
    db = small(async_kit, 2)
    holding, ended = [], []
    both = asyncio.Event()

    async def part(item):
        await async_kit.session().scalar(text("SELECT 1"))
        holding.append(item)
        if len(holding) == 2:
            both.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.append(item)

    caller = asyncio.create_task(db.fan_out(part, range(5)))
    await both.wait()
    for _ in range(times):
        caller.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert sorted(ended) == [0, 1]
    assert async_kit.checked_out() == 0
    assert (db.slots.used, db.slots.reserved, db.slots.stuck, len(db.slots.waiting)) == (0, 0, 0, 0)
    assert await db.fan_out(_reads(async_kit), [1, 2, 3]) == [1, 2, 3]


@twice
async def test_scopes_6_no_items(kit):
    """A fan-out over nothing gives nothing, to a caller that holds the only connection, too."""
    small(kit)
    async with kit.scope():
        await kit.done(kit.session().scalar(text("SELECT 1")))
        assert await fanning(kit, _one, []) == []


@pytest.mark.parametrize("limit", [0, -1])
@twice
async def test_scopes_6_a_limit_below_one_is_refused(kit, limit):
    """A limit that no part could pass is a mistake, and said so."""
    with pytest.raises(ConfigurationError, match="from 1 up"):
        await fanning(kit, _one, [1], limit=limit)


@twice
async def test_scopes_6_the_callers_session_is_not_the_parts_to_use(kit):
    """A part that reaches for the caller's session while the caller's other part does overlaps; its own is free."""
    async with kit.scope():
        caller = kit.session()

        async def part(item):
            assert kit.session() is not caller
            return await kit.done(kit.session().scalar(text("SELECT :n"), {"n": item}))

        assert await fanning(kit, part, range(4)) == [0, 1, 2, 3]
        assert not caller.in_transaction()


def test_scopes_6_sync_parts_run_in_threads_of_their_own(sync_kit):
    """Sync parts run side by side, in threads, in a copy of the caller's context."""
    together = threading.Barrier(3)

    def part(item):
        together.wait(30)
        return threading.get_ident()

    assert len(set(sync_kit.db.fan_out(part, range(3)))) == 3
    assert threading.get_ident() not in sync_kit.db.fan_out(lambda _: threading.get_ident(), range(3))


def test_scopes_6_an_interrupt_waits_for_the_parts(sync_kit):
    """What interrupts the caller (a KeyboardInterrupt) comes out when the running parts have released."""
    items = [1]

    def part(item):
        sync_kit.session().scalar(text("SELECT 1"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sync_kit.db.fan_out(part, items)
    assert sync_kit.checked_out() == 0
    assert sync_kit.db.slots.used == 0


@pytest.mark.parametrize("call", ["fan_out", "run"])
@twice
async def test_what_is_no_function_is_told_by_the_call_that_was_given_it(kit, call):
    """As `fan_out(work(1), ...)` gives it: the error names the call."""
    with pytest.raises(ConfigurationError, match=rf"^{call}\(\) is given a function, .*; this is None\."):
        await kit.done(getattr(kit.db, call)(None, [1]))


def test_a_coroutine_function_is_not_fanned_out_in_threads(sync_kit):
    """Nobody would await what it gives."""

    async def part(item): ...

    with pytest.raises(ConfigurationError, match=r"part is a coroutine function, and .* a sync database"):
        sync_kit.db.fan_out(part, [1])
