"""Objects that are read too late, or where nobody can wait: statement 35, FAILURES 16, 17."""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ForeignKey, select
from sqlalchemy.exc import MissingGreenlet, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.orm.exc import DetachedInstanceError

from dbscope import closings, guards, scope
from dbscope.guards.policy import Found
from tests.support import needs
from tests.support.kits import AsyncKit, Kit, Payment, SyncKit, twice

HERE = Path(__file__).name


@pytest.fixture
def cursors() -> Iterator[None]:
    """SQLAlchemy does not close the coroutine that it could not await: collect it here, and not in another test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
        gc.collect()


def sync(session: Any) -> Any:
    """The sync session."""
    return getattr(session, "sync_session", session)


async def left(kit: Kit, spoil: Callable[[Any, Any], Any], **options: Any) -> Payment:
    """An object whose scope, 'shop', has ended after something was done to it."""
    async with kit.transaction() as session:
        session.add(Payment(id=1))
    async with kit.scope("shop"):
        session = kit.session()
        payment = await kit.done(session.get(Payment, 1))
        for awaitable in spoil(session, payment):
            await kit.done(awaitable)
    return payment  # type: ignore[no-any-return]


async def note_of(kit: Kit, read: Callable[[], Any], error: Any = DetachedInstanceError) -> str:
    """The note that the error has when it has crossed a scope."""
    with pytest.raises(error) as caught:
        async with kit.scope("reader"):
            read()
    (note,) = caught.value.__notes__
    return str(note)


@twice
async def test_failures_16_expired_by_rollback_then_closed(kit: Kit, found: list[Found]) -> None:
    """Be `expire_on_commit` False: attribute, scope, where it was closed, what expired it."""
    payment = await left(kit, lambda s, p: [s.rollback()])
    note = await note_of(kit, lambda: payment.amount)
    for part in (
        f"Payment.amount was read at tests/guards/{HERE}:",
        f"it was expired by the rollback at tests/guards/{HERE}:",
        "its session is closed: scope 'shop' (opened at tests/",
        " ended at tests/",
        "a rollback expires nevertheless",
    ):
        assert part in note
    assert [(fact.guard, fact.message) for fact in found] == [("detached_read", note)]


@twice
async def test_failures_16_expired_by_commit_then_closed(kit: Kit) -> None:
    """The commit of the user's, and that of a block, which is named by where it began."""
    kit.database(expire_on_commit=True)
    payment = await left(kit, lambda s, p: [s.commit()])
    assert f"it was expired by the commit at tests/guards/{HERE}:" in await note_of(kit, lambda: payment.amount)
    async with kit.transaction() as session:
        session.add(payment := Payment())
    note = await note_of(kit, lambda: payment.amount)
    assert "it was expired by the commit of the transaction begun at tests/" in note
    assert "its session is closed: the scope opened at tests/" in note


@twice
async def test_failures_16_expired_by_hand(kit: Kit) -> None:
    """The last that expired it counts, alone or with all others."""

    def spoil(session: Any, payment: Any) -> Iterator[Any]:
        yield session.rollback()
        yield session.refresh(payment)
        session.expire(payment)

    payment = await left(kit, spoil)
    assert "expired by session.expire() at " in await note_of(kit, lambda: payment.amount)
    async with kit.scope():
        session = kit.session()
        payment = await kit.done(session.get(Payment, 1))
        session.expire(payment, ["amount"])
        session.expire_all()
    assert "expired by session.expire_all() at " in await note_of(kit, lambda: payment.amount)


@twice
async def test_statement_35_closed_by_its_user(kit: Kit) -> None:
    """`session.close()` ends the objects before the scope ends; in a block it is the block that closes."""
    async with kit.scope("shop"):
        session = kit.session()
        session.add(payment := Payment())
        await kit.done(session.flush())
        await kit.done(session.rollback())
        session.add(payment := Payment(id=2))
        await kit.done(session.commit())
        session.expire(payment)
        await kit.done(session.close())
        note = await note_of(kit, lambda: payment.amount)
        assert "its session, of scope 'shop' (opened at tests/" in note
        assert f"was closed at tests/guards/{HERE}:" in note


@twice
async def test_statement_35_closed_in_a_block_which_closes_at_its_end(kit: Kit) -> None:
    """The scope goes on; it is not said to have ended."""
    kit.database(expire_on_commit=True)
    async with kit.scope("shop"):
        kit.session()
        async with kit.transaction() as session:
            session.add(payment := Payment())
            await kit.done(session.flush())
            await kit.done(session.close())
        note = await note_of(kit, lambda: payment.amount)
    assert "expired by the commit of the transaction begun at " in note
    assert "its session, of scope 'shop' (opened at " in note
    assert f"was closed at tests/guards/{HERE}:" in note


def test_statement_35_removed_from_its_registry(sync_kit: SyncKit) -> None:
    """`db.session.remove()` ends the session, and not the scope."""
    with sync_kit.db.transaction() as session:
        session.add(Payment(id=1))
    with pytest.raises(DetachedInstanceError) as caught, scope("shop"):
        payment = sync_kit.db.session.get(Payment, 1)
        sync_kit.db.session.rollback()
        sync_kit.db.session.remove()
        _ = payment.amount
    assert f"was closed at tests/guards/{HERE}:" in caught.value.__notes__[0]


class Base(DeclarativeBase):
    """With a relationship."""


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list["Book"]] = relationship()


class Book(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))


async def author_of(kit: Kit) -> Author:
    """An author that a reader has given, whose books were not loaded."""
    Base.metadata.create_all(kit.outside)
    async with kit.transaction() as session:
        session.add(Author(id=1))
    async with kit.reader() as session:
        return await kit.done(session.get(Author, 1))  # type: ignore[no-any-return]


@twice
async def test_statement_35_a_relationship_that_was_never_loaded(kit: Kit) -> None:
    """Nothing expired it; the note says how to load it."""
    author = await author_of(kit)
    note = await note_of(kit, lambda: author.books)
    assert "Author.books was read at " in note
    assert "it was never loaded, and its session is closed: the scope opened at " in note
    assert "selectinload()" in note


@twice
async def test_failures_16_an_error_behind_the_error(kit: Kit) -> None:
    """What an application makes of it, and a group, are looked into."""
    author = await author_of(kit)

    async def crossing(wrap: Callable[[BaseException], BaseException]) -> BaseException:
        try:
            async with kit.scope():
                try:
                    _ = author.books
                except DetachedInstanceError as error:
                    raise wrap(error) from error
        except Exception as error:
            return error
        raise AssertionError

    late = await crossing(lambda error: ValueError("no books"))
    assert "never loaded" in late.__cause__.__notes__[0]  # type: ignore[union-attr]
    group: Any = await crossing(lambda error: ExceptionGroup("all", [error]))
    assert len(group.exceptions[0].__notes__) == 1


@twice
async def test_failures_16_a_transaction_is_crossed_and_it_is_told_once(kit: Kit) -> None:
    """However many scopes and blocks are around."""
    author = await author_of(kit)
    with pytest.raises(DetachedInstanceError) as caught:
        async with kit.scope(), kit.transaction() as session:
            await kit.done(session.scalar(select(Payment.id)))
            async with kit.transaction():
                _ = author.books
    assert len(caught.value.__notes__) == 1


@twice
async def test_failures_16_off_and_log(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """Off leaves the error as it is, and records nothing; "log" says it besides."""
    guards.configure(detached_read="off")
    assert not closings.kept
    author = await author_of(kit)
    with pytest.raises(DetachedInstanceError) as caught:
        async with kit.scope():
            _ = author.books
    assert not getattr(caught.value, "__notes__", [])
    guards.configure(detached_read="log")
    author = await author_of_again(kit)
    with caplog.at_level(logging.WARNING, "dbscope.guards"):
        await note_of(kit, lambda: author.books)
    assert "detached_read: Author.books" in caplog.text


async def author_of_again(kit: Kit) -> Author:
    """The same, once it is there."""
    async with kit.reader() as session:
        return await kit.done(session.get(Author, 1))  # type: ignore[no-any-return]


@twice
async def test_failures_16_nothing_is_kept_alive(kit: Kit) -> None:
    """What is recorded has no scope, no session and no object in it, and is bounded."""
    for _ in range(closings.MOST + 10 if kit.colour == "sync" else 1):
        await author_of_again(kit) if kit.databases else await author_of(kit)
    (recorded,) = closings.kept
    assert len(recorded) <= closings.MOST
    assert recorded[-1].objects() is None


def test_failures_17_missing_greenlet_says_what_expired_it(async_kit: AsyncKit, cursors: None) -> None:
    """Which attribute and line, the rollback's line, and whose session would have to wait."""
    kit = async_kit

    async def work() -> None:
        async with kit.transaction() as session:
            session.add(Payment(id=1))
        with pytest.raises((MissingGreenlet, StatementError)) as caught:
            async with kit.scope("shop"):
                session = kit.session()
                payment = await session.get(Payment, 1)
                await session.rollback()
                _ = payment.amount
        note = "".join(caught.value.__notes__)
        for part in (
            f"Payment.amount was read at tests/guards/{HERE}:",
            f"it was expired by the rollback at tests/guards/{HERE}:",
            "The session is that of scope 'shop' (opened at ",
            "await session.refresh(payment, ['amount'])",
        ):
            assert part in note

    kit.run(work())


def test_failures_17_missing_greenlet_of_a_commit(async_kit: AsyncKit, cursors: None) -> None:
    """Get, commit, read: keeps what is loaded, unless the database was told otherwise; then the commit is named."""
    kit = async_kit

    async def work() -> None:
        keeping = kit.db
        async with keeping.transaction() as session:
            session.add(Payment(id=1))
        async with kit.scope():
            payment = await keeping.session().get(Payment, 1)
            await keeping.session().commit()
            assert payment.amount == 500
        expiring = kit.database(keeping.engine, expire_on_commit=True)
        with pytest.raises((MissingGreenlet, StatementError)) as caught:
            async with kit.scope():
                payment = await expiring.session().get(Payment, 1)
                await expiring.session().commit()
                _ = payment.amount
        assert f"expired by the commit at tests/guards/{HERE}:" in "".join(caught.value.__notes__)

    kit.run(work())


def test_failures_16_a_middleware_is_crossed(sync_kit: SyncKit) -> None:
    """A WSGI application whose error reaches the server."""
    from dbscope.integrations.wsgi import ScopeMiddleware

    with sync_kit.db.transaction() as session:
        session.add(payment := Payment())

    def app(environ: Any, start_response: Any) -> list[bytes]:
        return [str(payment.amount).encode()]

    with pytest.raises(DetachedInstanceError) as caught:
        ScopeMiddleware(app)({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *_: None)
    assert "the commit of the transaction begun at " in caught.value.__notes__[0]


def test_failures_16_expired_by_the_commit_of_a_request(sync_kit: SyncKit) -> None:
    """A middleware's commit is told by the name of its request: it has no line of the user's."""
    from dbscope.integrations.wsgi import ScopeMiddleware

    kept = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        kept.append(payment := Payment())
        sync_kit.session().add(payment)
        start_response("201 Created", [])
        return []

    ScopeMiddleware(app, "on-success")({"REQUEST_METHOD": "POST", "PATH_INFO": "/pay"}, lambda *_: None)
    with pytest.raises(DetachedInstanceError) as caught:
        with scope():
            _ = kept[0].amount
    assert "expired by the commit of the transaction of scope 'POST /pay', and" in caught.value.__notes__[0]


def test_failures_16_an_asgi_middleware_is_crossed(async_kit: AsyncKit) -> None:
    """An ASGI application's, too, which reads after the response has begun, and so after its scope."""
    from dbscope.integrations.asgi import ScopeMiddleware

    async def app(scope: Any, receive: Any, send: Any) -> None:
        payment = await async_kit.db.session.get(Payment, 1)
        async_kit.db.session.expire(payment)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(payment.amount).encode()})

    async def send(message: Any) -> None: ...

    async def work() -> None:
        async with async_kit.transaction() as session:
            session.add(Payment(id=1))
        with pytest.raises(DetachedInstanceError) as caught:
            await ScopeMiddleware(app)({"type": "http", "method": "GET", "path": "/", "headers": []}, None, send)
        (note,) = caught.value.__notes__
        assert "session.expire() at " in note
        assert "GET /" in note

    async_kit.run(work())


def test_failures_16_a_test_is_crossed(pytester: pytest.Pytester) -> None:
    """The plugin adds the note where no scope is around; pytest prints it."""
    pytester.makepyfile(
        """
        from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
        from dbscope import Database

        class Base(DeclarativeBase): ...

        class Payment(Base):
            __tablename__ = "payments"
            id: Mapped[int] = mapped_column(primary_key=True)

        def test_late():
            db = Database("sqlite://")
            Base.metadata.create_all(db.engine)
            with db.transaction() as session:
                session.add(payment := Payment())
            assert payment.id == 1
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:hypothesispytest")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Payment.id was read at *:15: it was expired by the commit of the transaction*"])


def test_failures_16_a_session_of_somebody_else_s_is_said_to_be_unknown(sync_kit: SyncKit) -> None:
    """No guess is made of where it was closed."""
    from sqlalchemy.orm import Session

    with sync_kit.db.transaction() as session:
        session.add(Payment(id=1))
    with Session(sync_kit.outside) as session:
        payment = session.get(Payment, 1)
        session.commit()
    with pytest.raises(DetachedInstanceError) as caught, scope():
        _ = payment.amount
    assert "it was expired, and it is in no session" in caught.value.__notes__[0]


def test_failures_16_flask_logs_it_with_the_note(sync_kit: SyncKit, caplog: pytest.LogCaptureFixture) -> None:
    """Flask makes a 500 of it before any middleware sees it."""
    needs.module("flask", extra="flask")
    from flask import Flask

    from dbscope.integrations.flask import Scopes

    app = Flask("shop")
    Scopes(app)
    with sync_kit.db.transaction() as session:
        session.add(payment := Payment())
    app.route("/")(lambda: str(payment.amount))
    assert app.test_client().get("/").status_code == 500
    assert "expired by the commit of the transaction begun at " in caplog.text
