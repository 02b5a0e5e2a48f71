"""FAILURES 29: several event loops in one process. Connections belong to the loop that opened them."""

import asyncio
import gc
import threading

import pytest
from sqlalchemy import NullPool, select, text

from dbscope import ScopeMisuseError, scope
from tests.support import needs
from tests.support.kits import LIMIT, Payment, make_kit

DRIVERS = ["asyncpg", "psycopg"]


@pytest.fixture(params=DRIVERS)
def server(request, postgres_url):
    """A kit over PostgreSQL, by way of each async driver; each test runs its own loops."""
    kit = make_kit("async", postgres_url)
    needs.module(request.param, extra={"psycopg": "postgresql"}.get(request.param, request.param))
    kit.drivers = {"postgresql": f"postgresql+{request.param}"}
    return kit


async def backend(kit):
    """The process of the server's that serves a new scope."""
    async with scope("look"):
        return await kit.db.session.scalar(text("SELECT pg_backend_pid()"))


async def pay(kit, amount):
    """One unit of work."""
    async with kit.db.transaction() as session:
        session.add(Payment(amount=amount))


def lost(coroutine):
    """Run what loses connections: their loop is gone, and nothing but the collector can close them."""
    asyncio.run(coroutine)
    gc.collect()


class Elsewhere:
    """A loop that runs in another thread."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="other loop")
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(LIMIT)
        self.loop.close()

    def run(self, coroutine):
        """What a coroutine gives, or raises, on this loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LIMIT)


@pytest.mark.postgres
def test_failures_29_one_loop_after_the_other(postgres_url, caplog):
    """Where the driver's connections cannot outlive their loop the second `asyncio.run()` is told so: the error names
    both loops, both lines and what to do; disposing of the database even now makes it work."""
    kit = make_kit("async", postgres_url)
    loops = []

    async def main():
        loops.append(asyncio.get_running_loop())
        await backend(kit)

    asyncio.run(main())
    with pytest.raises(ScopeMisuseError) as caught:
        asyncio.run(main())
    told = str(caught.value)
    assert f"on the running _UnixSelectorEventLoop at {id(loops[1]):#x}" in told
    assert f"connections of the closed _UnixSelectorEventLoop at {id(loops[0]):#x}" in told
    assert told.count("test_loops.py:") == 2
    assert "await db.dispose()" in told
    del caught
    loops.clear()

    async def recover():
        await kit.aclose()
        await pay(kit, 1)
        await kit.aclose()

    with pytest.warns(ResourceWarning, match="unclosed"):
        lost(recover())
    assert not caplog.records  # no traceback of connections that could not be closed
    assert kit.amounts() == [1]


@pytest.mark.postgres
def test_failures_29_disposed_of_in_between(server):
    """Two `asyncio.run()` with one database work, if each disposes of it at its end."""

    async def main(amount):
        await pay(server, amount)
        await server.db.dispose()

    asyncio.run(main(1))
    asyncio.run(main(2))
    assert server.amounts() == [1, 2]


@pytest.mark.postgres
def test_failures_29_loops_side_by_side(server):
    """Two loops that run at the same time do not share a pool, whichever the driver: the second is told."""

    async def main():
        await backend(server)
        with Elsewhere() as other:
            with pytest.raises(ScopeMisuseError, match="has connections of") as caught:
                await asyncio.to_thread(other.run, backend(server))
            for loop in (asyncio.get_running_loop(), other.loop):
                assert f"the running _UnixSelectorEventLoop at {id(loop):#x}" in str(caught.value)
            assert "an AsyncDatabase each" in str(caught.value)
        assert isinstance(await backend(server), int)
        await server.aclose()

    asyncio.run(main())


@pytest.mark.postgres
def test_failures_29_disposed_of_from_another_loop(server):
    """A database whose loop runs in another thread is disposed of on that one, wherever that is asked for."""

    async def main():
        with Elsewhere() as other:
            await asyncio.to_thread(other.run, backend(server))
            await server.aclose()
        assert isinstance(await backend(server), int)
        await server.aclose()

    asyncio.run(main())


@pytest.mark.postgres
def test_failures_29_without_a_pool(server):
    """A database with `NullPool` is refused on no loop: no connection goes from one to another."""
    server.database(poolclass=NullPool)

    async def main():
        await backend(server)  # two loops that make an engine's first connection wait for each other in SQLAlchemy
        with Elsewhere() as other:
            await asyncio.gather(backend(server), asyncio.to_thread(other.run, backend(server)))

    asyncio.run(main())
    asyncio.run(main())
    asyncio.run(server.aclose())


@pytest.mark.postgres
def test_failures_29_a_pool_of_readers_counts(postgres_url):
    """The pool of `reader(autocommit=True)` is one of the database's, too."""
    kit = make_kit("async", postgres_url)

    async def main():
        async with kit.db.reader(autocommit=True) as session:
            await session.scalars(select(Payment))

    asyncio.run(main())
    with pytest.raises(ScopeMisuseError, match="has connections of"):
        asyncio.run(main())
    with pytest.warns(ResourceWarning, match="unclosed"):
        lost(kit.aclose())


@pytest.mark.parametrize("driver", ["aiosqlite", pytest.param("psycopg", marks=pytest.mark.postgres)])
def test_failures_29_drivers_that_do_not_care(driver, request, tmp_path):
    """Where idle connections can go on on another loop once their own is over, nobody has to dispose."""
    needs.module(driver, extra={"psycopg": "postgresql"}.get(driver, driver))
    server = driver == "psycopg"
    kit = make_kit("async", request.getfixturevalue("postgres_url") if server else f"sqlite:///{tmp_path / 'test.db'}")
    kit.drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
    for amount in (1, 2, 3):
        asyncio.run(pay(kit, amount))
    assert kit.amounts() == [1, 2, 3]
    asyncio.run(kit.aclose())
