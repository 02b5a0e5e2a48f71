"""Bad input: one clear error each, that says what is wrong, where, and what to do."""

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, select
from sqlalchemy.engine import default
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import sessionmaker

import dbscope
from dbscope import ConfigurationError, Database, NoScopeError, ScopeMisuseError, begin_scope, end_scope, scope
from tests.support import needs
from tests.support.kits import Base, Kit, Payment, SyncKit, make_kit, twice
from tests.support.lines import marked

COLOURS = pytest.mark.parametrize("colour", ["sync", "async"])


def database(colour: str) -> Any:
    """The class of a colour."""
    if colour == "sync":
        return Database
    needs.module("greenlet", extra="async")
    return dbscope.AsyncDatabase


# -- URLs and drivers --------------------------------------------------------------------------------------------------


@COLOURS
@pytest.mark.parametrize(
    "url",
    [
        "payments.db",
        "",
        "postgres//me:s3cret@host/x",
        "://me:s3cret@host",
        "s3cret@host",
        "postgresql://me@host:s3cret/x",
    ],
)
def test_bad_input_a_url_that_cannot_be_parsed(colour: str, url: str) -> None:
    """What is no URL is refused with an example of one; the text, which may hold a password, is not shown."""
    with pytest.raises(ConfigurationError, match=r"not a database URL; it should look like 'sqlite:///") as caught:
        database(colour)(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@COLOURS
def test_bad_input_an_unknown_dialect(colour: str) -> None:
    """A dialect that SQLAlchemy does not know is named."""
    with pytest.raises(ConfigurationError, match=r"knows no database 'paygres'\. Check the part"):
        database(colour)("paygres://me:s3cret@host/x")


@COLOURS
@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("postgres://me:s3cret@host/x", "Write 'postgresql'"),
        ("postgresql://me:hal@f-s3cret@host/x", "as '%40'"),
        ("sqlite://s3cret.db", "'sqlite:///payments.db'"),
    ],
)
def test_bad_input_a_url_as_people_write_it_by_mistake(colour: str, url: str, remedy: str) -> None:
    """The remedy is told, and nothing of the password."""
    with pytest.raises(ConfigurationError) as caught:
        database(colour)(url)
    assert remedy in str(caught.value)
    assert "s3cret" not in str(caught.value)


@COLOURS
@pytest.mark.parametrize("target", [None, 42, b"sqlite://", object()])
def test_bad_input_what_is_no_target_at_all(colour: str, target: Any) -> None:
    """Something else than a URL, an engine or a session maker is refused, saying what is taken."""
    with pytest.raises(ConfigurationError, match="takes a URL, an engine or a configured session maker, not"):
        database(colour)(target)


@pytest.mark.parametrize(
    ("colour", "driver", "how"),
    [
        ("sync", "postgresql+psycopg", 'pip install "dbscope[postgresql]"'),
        ("async", "postgresql+asyncpg", 'pip install "dbscope[asyncpg]"'),
        ("async", "sqlite+aiosqlite", 'pip install "dbscope[aiosqlite]"'),
        ("sync", "mysql+pymysql", "pip install pymysql"),
        ("sync", "mysql+mysqldb", "pip install mysqlclient"),
    ],
)
def test_bad_input_a_driver_that_is_not_installed(
    colour: str, driver: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is missing is named, with the line that installs it, and without the password."""
    kind = database(colour)
    module = driver.partition("+")[2]
    monkeypatch.setitem(__import__("sys").modules, {"mysqldb": "MySQLdb"}.get(module, module), None)
    url = f"{driver}:///x.db" if "sqlite" in driver else f"{driver}://me:s3cret@host/x"
    with pytest.raises(ConfigurationError, match="which is not installed") as caught:
        kind(url)
    assert how in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_bad_input_a_url_of_the_other_colour() -> None:
    """An async URL given to `Database`, and the reverse, name the class to use and a URL of the right kind."""
    with pytest.raises(ConfigurationError, match=r"an async driver: use AsyncDatabase.* such as sqlite://"):
        Database("sqlite+aiosqlite:///x.db")
    needs.module("greenlet", extra="async")
    with pytest.raises(ConfigurationError, match=r"a sync driver: use Database.* such as sqlite\+aiosqlite://"):
        dbscope.AsyncDatabase("sqlite:///x.db")


def test_bad_input_an_engine_or_maker_of_the_other_colour() -> None:
    """So do engines and session makers of the other colour, and connections."""
    needs.module("aiosqlite", extra="aiosqlite")
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    engine, async_engine = create_engine("sqlite://"), create_async_engine("sqlite+aiosqlite://")
    for target in (async_engine, async_sessionmaker(async_engine)):
        with pytest.raises(ConfigurationError, match="is async: give it to AsyncDatabase"):
            Database(target)  # type: ignore[call-overload]
    for sync_target in (engine, sessionmaker(engine)):
        with pytest.raises(ConfigurationError, match="is sync: give it to Database"):
            dbscope.AsyncDatabase(sync_target)  # type: ignore[call-overload]
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="takes a URL, an engine"):
        Database(connection)  # type: ignore[call-overload]
    engine.dispose()  # its pool would keep the connection open


@COLOURS
def test_bad_input_a_session_maker_without_an_engine(colour: str) -> None:
    """A session maker that was not given its engine says so."""
    if colour == "sync":
        maker: Any = sessionmaker()
    else:
        needs.module("greenlet", extra="async")
        from sqlalchemy.ext.asyncio import async_sessionmaker

        maker = async_sessionmaker()
    with pytest.raises(ConfigurationError, match=r"has no .*Engine as its bind, but None"):
        database(colour)(maker)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "meant"), [("pool_sise", "pool_size"), ("autoflsh", "autoflush"), ("max_overlow", "max_overflow")]
)
@twice
async def test_bad_input_an_unknown_option(kit: Kit, option: str, meant: str) -> None:
    """An option that neither the session nor the engine knows is named, and the one that was meant."""
    with pytest.raises(ConfigurationError, match=f"'{option}': did you mean '{meant}'"):
        kit.database(**{option: 1})


@twice
async def test_bad_input_an_option_like_no_other(kit: Kit) -> None:
    """One that is like no other is named, too."""
    with pytest.raises(ConfigurationError, match="neither Session nor create_engine knows: 'colour'"):
        kit.database(colour="green")


def test_bad_input_options_of_what_is_configured_already() -> None:
    """Options that come too late, for an engine or a session maker of the user's, say where to set them."""
    engine = create_engine("sqlite://")
    with pytest.raises(ConfigurationError, match=r"an Engine is configured already.*'pool_size': set it there"):
        Database(engine, pool_size=3)
    with pytest.raises(ConfigurationError, match=r"a sessionmaker is configured already.*'autoflush': set it there"):
        Database(sessionmaker(engine), autoflush=False)  # type: ignore[call-overload]


@twice
async def test_bad_input_a_failed_database_leaves_its_url_free(kit: Kit) -> None:
    """After an error in its options, the same URL can be used for a database."""
    with pytest.raises(ConfigurationError):
        kit.database(colour="green")
    with pytest.raises(ConfigurationError):
        kit.database(uncommitted="shout")
    assert kit.database()


@pytest.mark.parametrize("value", ["shout", None, True, "RAISE"])
@twice
async def test_bad_input_uncommitted(kit: Kit, value: Any) -> None:
    """`uncommitted=` takes three words, and lists them."""
    with pytest.raises(ConfigurationError, match='uncommitted is "warn", "raise" or "off", not'):
        kit.database(uncommitted=value)


@twice
async def test_bad_input_two_databases_of_one_url(kit: Kit) -> None:
    """A second database for a URL, which would double the connections, names the first one's line, and the ways out."""
    first = kit.database()
    with pytest.raises(ConfigurationError, match=r"there is a database for .* already") as caught:
        kit.database()
    assert re.search(r"made at .*\.py:\d+", str(caught.value))
    assert "an engine of your own" in str(caught.value)
    await kit.done(first.dispose())
    kit.databases.remove(first)
    second = kit.database()
    async with kit.transaction(second) as session:
        session.add(Payment(amount=1))
    assert kit.amounts() == [1]


def test_bad_input_the_first_database_of_a_url_is_named_by_its_line(sync_kit: SyncKit) -> None:
    """The error names the line on which the first database was made."""
    first = Database(sync_kit.url)  # the first
    with pytest.raises(ConfigurationError) as caught:
        Database(str(sync_kit.url))
    assert marked("the first") in str(caught.value)
    first.dispose()


def test_bad_input_the_same_url_in_both_colours(sync_kit: SyncKit) -> None:
    """A sync and an async database of the same file are no mistake."""
    both = make_kit("async", sync_kit.url)
    assert sync_kit.db is not both.db


# -- a database that is down -------------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port that is bound, and on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@COLOURS
def test_bad_input_a_database_that_is_down_at_its_first_use(colour: str, nobody: int) -> None:
    """Where the server does not answer, the error notes the address without the password; the next use tries again."""
    needs.module("psycopg", extra="postgresql")
    kit = make_kit(colour, f"postgresql+psycopg://me:s3cret@127.0.0.1:{nobody}/x")
    kit.run(_down(kit))


async def _down(kit: Kit) -> None:
    """What the test above does."""
    db = kit.database(f"{kit.drivers['postgresql']}://me:s3cret@127.0.0.1:{kit.url.port}/x")  # connects to nobody yet
    for _ in range(2):
        for block in (kit.transaction, kit.reader):
            with pytest.raises((DBAPIError, OSError)) as caught:
                async with block(db) as session:
                    await kit.done(session.execute(select(1)))
            notes = "".join(getattr(caught.value, "__notes__", []))
            assert "No connection could be made to" in notes
            assert "me:***@127.0.0.1" in notes
            assert "Is the server up" in notes
            assert "s3cret" not in notes + str(caught.value)
    assert dbscope.current_scope() is None


def test_bad_input_a_sqlite_file_that_cannot_be(sync_kit: SyncKit, tmp_path: Any) -> None:
    """A SQLite file in a folder that is not there says so at its first use.

    In sync only: aiosqlite's thread reports a failed connect once more after its loop may have been closed.
    """
    db = sync_kit.database(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    with pytest.raises(OperationalError, match="unable to open database file") as caught:
        with db.transaction() as session:
            session.execute(select(1))
    assert "folder.db" in "".join(caught.value.__notes__)


# -- scopes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [42, b"x", object(), ["a"]])
def test_bad_input_a_name_that_is_no_string(name: Any) -> None:
    """A scope's name is a string, and the error shows how to make one."""
    with pytest.raises(ConfigurationError, match=r"a scope's name is a string, not .*Try scope\("):
        scope(name)


@pytest.mark.parametrize("commit", [True, "always", "on_success", 1])
def test_bad_input_commit(commit: Any) -> None:
    """`commit=` is None or "on-success", and says so."""
    with pytest.raises(ConfigurationError, match='commit is None or "on-success", not'):
        scope(commit=commit)


def test_bad_input_an_id_that_cannot_be_hashed() -> None:
    """An id for `begin_scope()` has to be hashable, and the error says so; ending one that never began is harmless."""
    with pytest.raises(ConfigurationError, match=r"has to be hashable, and list is not.*Use a string or a number"):
        begin_scope(["request"])
    end_scope(["request"])
    assert dbscope.current_scope() is None


@twice
async def test_bad_input_a_scope_entered_twice(kit: Kit) -> None:
    """A scope that is entered again, inside or after, is refused, naming the lines."""
    work = dbscope.scope("work")
    async with kit.block(work):
        with pytest.raises(ScopeMisuseError, match=r"scope 'work' .*was entered again at .*\n.*Make a new one"):
            await kit.block(work).__aenter__()
        assert dbscope.current_scope() is work
    with pytest.raises(ScopeMisuseError, match="entered again"):
        await kit.block(work).__aenter__()
    assert dbscope.current_scope() is None


@twice
async def test_bad_input_a_scope_ended_twice(kit: Kit) -> None:
    """Ending a scope again, by `finish()` or by leaving it, does nothing, and restores nothing wrong."""
    async with kit.scope("outer") as outer:
        inner = dbscope.scope("inner")
        block = kit.block(inner)
        await block.__aenter__()
        await block.__aexit__(None, None, None)
        assert dbscope.current_scope() is outer
        await block.__aexit__(None, None, None)
        await kit.done(inner.finish() if kit.colour == "sync" else inner.afinish())
        assert dbscope.current_scope() is outer
    assert dbscope.current_scope() is None


@twice
async def test_bad_input_a_generator_decorated(kit: Kit) -> None:
    """A generator under `@db.transactional` is refused when it is decorated, and told what to do."""

    def rows() -> Iterator[int]:
        yield 1

    with pytest.raises(ConfigurationError, match=r"rows is a generator: calling it runs nothing yet.*@contextmanager"):
        kit.db.transactional(rows)


def test_bad_input_an_async_session_in_a_sync_scope(sync_kit: SyncKit) -> None:
    """`with scope()` in which an async session is asked for says at once that it needs `async with`."""
    db = make_kit("async", sync_kit.url).db
    with scope("work"):
        with pytest.raises(NoScopeError, match="async with scope"):
            db.session()
        with pytest.raises(NoScopeError, match="async with scope"):
            _ = db.session.identity_map


def test_bad_input_a_session_of_somebody_elses_in_the_registry(sync_kit: SyncKit) -> None:
    """A session that the database did not make cannot be put into its registry."""
    Base.metadata.create_all(sync_kit.outside)
    stranger = sessionmaker(sync_kit.outside)()
    with scope():
        with pytest.raises(ConfigurationError, match=r"was not made by .*db.new_session\(\)"):
            sync_kit.db.session.registry.set(stranger)


def test_bad_input_the_url_of_a_password_is_never_in_an_error(sync_kit: SyncKit) -> None:
    """Errors about a URL with a password hide it."""
    needs.module("psycopg", extra="postgresql")
    url = make_url("postgresql+psycopg://me:s3cret@127.0.0.1:1/x")
    assert issubclass(url.get_dialect(), default.DefaultDialect)
    first = Database(url)
    for options in ({}, {"colour": "green"}, {"uncommitted": "shout"}):
        with pytest.raises(ConfigurationError) as caught:
            Database(url, **options)  # type: ignore[arg-type]
        assert "s3cret" not in str(caught.value)
    first.dispose()
