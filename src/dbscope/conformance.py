"""For your own integration: a pytest class whose tests every integration has to pass.

Subclass it in a test module, say how an application is built from handlers, and how work is sent to it:

    from dbscope.conformance import Conformance, Outcome

    class TestOurs(Conformance):
        scope_name = "call {}"                       # what the integration calls the work of the handler {}

        @contextmanager
        def serve(self, handlers, *, commit, veto):
            app = OurFramework()
            OurScopes(app, commit=commit, veto=veto)
            for name, handler in handlers.items():   # functions without arguments, that give a `Reply`
                app.register(name, handler)

            def send(name):                          # called from several threads at once
                try:
                    reply = app.call(name)
                except Exception as error:
                    return Outcome(ok=False, error=error)
                return Outcome(ok=reply.status < 400, status=reply.status, body=b"".join(reply.body))

            yield send

Handlers are coroutine functions where `handlers = "async"`, and use an `AsyncDatabase` where `database = "async"`.
An application that needs an event loop finds one in `LoopThread`.
What the framework does not have is declared, and shown by pytest as a skipped test with its reason:

    not_applicable = {"veto": "a task has no status", "streams": "a task has no response"}
"""

import asyncio
import contextlib
import functools
import inspect
import sqlite3
import threading
import time
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import dbscope
from dbscope.errors import ConfigurationError
from dbscope.scope import Commit, Scope, current_scope, scope

try:
    import pytest
except ImportError as error:
    raise ImportError('the conformance kit needs pytest: pip install "dbscope[test]"', name=error.name) from error

__all__ = ["FEATURES", "Boom", "Conformance", "Handler", "LoopThread", "Outcome", "Reply", "Send"]

T = TypeVar("T")
Part = Callable[[], Coroutine[Any, Any, Any]]

#: What a framework may lack, and so may be declared in `Conformance.not_applicable`.
FEATURES: Mapping[str, str] = {
    "veto": "what a handler replies (a status) may undo its work",
    "streams": "a reply may be made while it is sent",
    "together": "several handlers may be at work at the same time",
}


class Base(DeclarativeBase):
    """What the handlers write."""


class Note(Base):
    """A row. A second one with the same body cannot be committed."""

    __tablename__ = "dbscope_conformance"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(unique=True)


class Boom(Exception):
    """What a handler fails with."""


@dataclass
class Reply:
    """What a handler gives: to be turned into the framework's response, or to be thrown away where there is none.

    Attributes:
        body: bytes; or, in the tests of streams alone, an iterable that makes them while they are sent, which is
            an async one from async handlers.
        status: as of HTTP.
    """

    body: bytes | Iterable[bytes] | AsyncIterable[bytes] = b"done"
    status: int = 200


@dataclass
class Outcome:
    """What became of the work, as the one who sent it learns it.

    Attributes:
        ok: it was told that the work succeeded: a status below 400, a task that has not failed.
        status: the response's, where there is one.
        body: the response's, where there is one.
        error: what the work failed with, where the framework shows it to anybody: raised to the caller, given to its
            error handlers, kept with the task's result. It may be a copy.
    """

    ok: bool
    status: int | None = None
    body: bytes = b""
    error: BaseException | None = None


Handler = Callable[[], Any]
Send = Callable[[str], Outcome]


class LoopThread:
    """An event loop in a thread of its own, for applications that need one; a context manager.

    >>> async def work():
    ...     return "done"
    >>> with LoopThread() as loop:
    ...     loop.run(work())
    'done'
    """

    def __enter__(self) -> "LoopThread":
        self._runner = asyncio.Runner()
        self.loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, T], limit: float | None = 30.0) -> T:
        """What a coroutine returns; called from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(limit)


@dataclass
class Seen:
    """What a handler has seen of the work it runs in."""

    scopes: list[Scope] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    sessions: list[Any] = field(default_factory=list)


class Conformance:
    """The tests that an integration has to pass: subclass it, and say how an application is built and asked.

    Attributes:
        scope_name: what the integration calls the work of a handler, `{}` standing for the handler's name.
        database: `"async"`, and the handlers use an `AsyncDatabase`.
        handlers: `"async"`, and they are coroutine functions; the database's colour, if not said.
        not_applicable: of `FEATURES`, what the framework does not have, each with the reason.
        limit: for how many seconds a test waits before it fails.
    """

    scope_name: ClassVar[str] = ""
    database: ClassVar[Literal["sync", "async"]] = "sync"
    handlers: ClassVar[Literal["sync", "async"] | None] = None
    not_applicable: ClassVar[Mapping[str, str]] = {}
    limit: ClassVar[float] = 30.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for feature, reason in cls.not_applicable.items():
            if feature not in FEATURES:
                raise ConfigurationError(
                    f"{cls.__name__} cannot do without {feature!r}; what may not apply is {', '.join(FEATURES)}."
                )
            if not reason.strip():
                raise ConfigurationError(f"{cls.__name__} does not say why {feature!r} does not apply to it.")
        if cls.database == "async" and cls.handlers == "sync":
            raise ConfigurationError(f"{cls.__name__}: a handler that cannot await has no use for an async database.")

    def serve(
        self, handlers: Mapping[str, Handler], *, commit: Commit, veto: Callable[[int], bool] | None
    ) -> AbstractContextManager[Send]:
        """An application that serves each handler under its name, with the integration installed, and runs.

        Args:
            handlers: by their names, which are identifiers; functions without arguments that return a `Reply`.
            commit: for the integration.
            veto: for the integration; always None where that does not apply.

        Returns:
            a context manager that yields a function: called with a handler's name, from whichever thread, it has the
            application do that work, waits, and tells what became of it. Leaving it stops what was started.
        """
        raise NotImplementedError("say how an application is built from handlers: see dbscope.conformance")

    def make_database(self, url: str) -> Any:
        """The database that the handlers use: on a SQLite file, with a connection of its own for each transaction."""
        make = dbscope.AsyncDatabase if self.database == "async" else dbscope.Database
        return make(url, poolclass=NullPool, uncommitted="off")

    # -- what the tests build on -------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _database(self, tmp_path: Path) -> Iterator[None]:
        self._file = tmp_path / "conformance.db"
        engine = create_engine(f"sqlite:///{self._file}", poolclass=NullPool)
        Base.metadata.create_all(engine)
        driver = "sqlite+aiosqlite" if self.database == "async" else "sqlite"
        self.db = self.make_database(f"{driver}:///{self._file}")
        self._out = 0
        pool = getattr(self.db.engine, "sync_engine", self.db.engine).pool
        counting = threading.Lock()

        def count(by: int, *_: Any) -> None:
            with counting:
                self._out += by

        event.listen(pool, "checkout", functools.partial(count, 1))
        event.listen(pool, "checkin", functools.partial(count, -1))
        yield
        # Nothing is in the pool; what is still out has failed a test already, and is for the garbage collector.
        if self._out == 0 and self.database == "async":
            asyncio.run(self.db.dispose())
        elif self._out == 0:
            self.db.dispose()

    @contextlib.contextmanager
    def serving(
        self,
        *parts: Part,
        commit: Commit = "on-success",
        veto: Callable[[int], bool] | None = None,
        feature: str | None = None,
    ) -> Iterator[Send]:
        """An application with these handlers, each under its function's name; a skipped test without the feature."""
        if feature is not None and feature in self.not_applicable:
            pytest.skip(f"{type(self).__name__}: {feature} does not apply: {self.not_applicable[feature]}")
        handlers = {part.__name__: self._handler(part) for part in parts}
        with self.serve(handlers, commit=commit, veto=veto) as send:
            yield send

    def _handler(self, part: Part) -> Handler:
        """What a test wrote as a coroutine function, in the colour of the handlers."""
        if (self.handlers or self.database) == "async":
            return part

        def handler() -> Any:
            return _drive(part())

        handler.__name__ = handler.__qualname__ = part.__name__
        return handler

    def _block(self, manager: Any) -> AbstractAsyncContextManager[Any]:
        return manager if (self.handlers or self.database) == "async" else _Block(manager)

    async def _look(self, seen: Seen) -> Any:
        """Note what a handler sees, and give its session."""
        work = current_scope()
        assert work is not None, "the handler runs outside of every scope"
        session = self.db.session()
        seen.scopes.append(work)
        seen.names.append(work.name)
        seen.sessions.append(session)
        return session

    async def _write(self, session: Any, body: str) -> None:
        session.add(Note(body=body))
        await _done(session.flush())

    def _committed(self) -> list[str]:
        """The bodies of what is committed, as an independent connection sees it."""
        with contextlib.closing(sqlite3.connect(self._file)) as connection:
            return [body for (body,) in connection.execute("SELECT body FROM dbscope_conformance ORDER BY body")]

    def _at_rest(self, seen: Seen) -> None:
        """Nothing of the work is left behind, now or as soon as the framework has noticed that it is over."""
        deadline = time.monotonic() + self.limit
        while self._out or not all(work.ended for work in seen.scopes):
            assert time.monotonic() < deadline, (
                f"{self._out} connections are still checked out, and of {seen.scopes} some have not ended"
            )
            threading.Event().wait(0.005)
        assert current_scope() is None, "a scope is current where the work was sent from"

    # -- a scope for each piece of work ------------------------------------------------------------------------

    def test_the_work_has_a_scope_with_its_name(self) -> None:
        """It is open, has the session that the handler finds, and errors will name the work."""
        seen = Seen()

        async def look() -> Reply:
            await self._look(seen)
            assert self.db.session() is seen.sessions[0]
            return Reply()

        with self.serving(look) as send:
            assert send("look").ok
        assert seen.names == [self.scope_name.format("look")]
        self._at_rest(seen)

    def test_each_piece_of_work_has_its_own(self) -> None:
        """Also of the same handler, one after the other: no scope and no session comes back."""
        seen = Seen()

        async def look() -> Reply:
            session = await self._look(seen)
            await _done(session.execute(text("SELECT 1")))
            return Reply()

        with self.serving(look) as send:
            for number in range(1, 4):
                assert send("look").ok
                assert len(seen.scopes) == number
                self._at_rest(seen)
        assert len({id(work) for work in seen.scopes}) == 3
        assert len({id(session) for session in seen.sessions}) == 3

    # -- who commits -------------------------------------------------------------------------------------------

    def test_on_success_the_work_is_committed_before_it_is_called_done(self) -> None:
        """Whoever hears that it succeeded finds the row."""
        seen = Seen()

        async def write() -> Reply:
            await self._write(await self._look(seen), "kept")
            return Reply()

        with self.serving(write) as send:
            assert send("write").ok
            assert self._committed() == ["kept"]
            self._at_rest(seen)

    def test_by_default_the_handler_commits(self) -> None:
        """A scope never does: what the handler has not committed is rolled back."""
        seen = Seen()

        async def commit() -> Reply:
            session = await self._look(seen)
            await self._write(session, "committed")
            await _done(session.commit())
            return Reply()

        async def forget() -> Reply:
            await self._write(await self._look(seen), "forgotten")
            return Reply()

        with self.serving(commit, forget, commit=None) as send:
            assert send("commit").ok
            assert send("forget").ok
            self._at_rest(seen)
        assert self._committed() == ["committed"]

    def test_an_error_rolls_back_and_is_kept(self) -> None:
        """What the handler raised is what the framework sees, and not what came of cleaning up after it."""
        seen = Seen()

        async def fail() -> Reply:
            await self._write(await self._look(seen), "lost")
            raise Boom("as it was raised")

        with self.serving(fail) as send:
            outcome = send("fail")
            self._at_rest(seen)
        assert not outcome.ok
        assert (type(outcome.error), getattr(outcome.error, "args", None)) == (Boom, ("as it was raised",))
        assert self._committed() == []

    def test_a_failing_commit_is_visible(self) -> None:
        """Nobody is told that the work succeeded, and nothing of it is saved."""
        seen = Seen()

        async def clash() -> Reply:
            session = await self._look(seen)
            session.add_all([Note(body="same"), Note(body="same")])
            return Reply(b"saved")

        with self.serving(clash) as send:
            outcome = send("clash")
            self._at_rest(seen)
        assert not outcome.ok
        assert outcome.body != b"saved"
        assert self._committed() == []

    @pytest.mark.parametrize(("veto", "kept"), [(None, ["200"]), (lambda status: status >= 500, ["200", "409"])])
    def test_the_reply_may_veto_the_commit(self, veto: Callable[[int], bool] | None, kept: list[str]) -> None:
        """By default from the status 400 on; the reply reaches the client all the same."""
        seen = Seen()

        async def good() -> Reply:
            await self._write(await self._look(seen), "200")
            return Reply(b"good", 200)

        async def refused() -> Reply:
            await self._write(await self._look(seen), "409")
            return Reply(b"refused", 409)

        async def broken() -> Reply:
            await self._write(await self._look(seen), "500")
            return Reply(b"broken", 500)

        with self.serving(good, refused, broken, veto=veto, feature="veto") as send:
            outcomes = [send(name) for name in ("good", "refused", "broken")]
            self._at_rest(seen)
        assert [(outcome.ok, outcome.status, outcome.body) for outcome in outcomes] == [
            (True, 200, b"good"),
            (False, 409, b"refused"),
            (False, 500, b"broken"),
        ]
        assert self._committed() == kept

    # -- when it ends ------------------------------------------------------------------------------------------

    def test_the_work_is_over_before_its_stream(self) -> None:
        """While a reply is made and sent nothing is held, what was written is there, and a new scope may be opened."""
        seen = Seen()
        held: list[int] = []
        found: list[int] = []

        async def count() -> Any:
            async with self._block(scope("the stream's")):
                return await _done(self.db.session.scalar(text("SELECT count(*) FROM dbscope_conformance")))

        def parts() -> Iterator[bytes]:
            for number in (b"1", b"2"):
                held.append(self._out)
                found.append(_drive(count()))
                yield number

        async def aparts() -> AsyncIterator[bytes]:
            for number in (b"1", b"2"):
                held.append(self._out)
                found.append(await count())
                yield number

        async def stream() -> Reply:
            await self._write(await self._look(seen), "kept")
            return Reply(aparts() if (self.handlers or self.database) == "async" else parts())

        with self.serving(stream, feature="streams") as send:
            outcome = send("stream")
            self._at_rest(seen)
        assert (outcome.ok, outcome.body) == (True, b"12")
        assert (held, found) == ([0, 0], [1, 1])

    def test_nothing_is_left_behind(self) -> None:
        """Whatever happened: the next work on the same worker, connection or loop is new, and succeeds."""
        seen = Seen()

        async def fail() -> Reply:
            await self._write(await self._look(seen), "lost")
            raise Boom

        async def clash() -> Reply:
            (await self._look(seen)).add_all([Note(body="same"), Note(body="same")])
            return Reply()

        async def write() -> Reply:
            await self._write(await self._look(seen), str(len(seen.scopes)))
            return Reply()

        with self.serving(fail, clash, write) as send:
            for name, ok in {"write": True, "fail": False, "clash": False}.items():
                assert send(name).ok is ok
                self._at_rest(seen)
                assert send("write").ok
                self._at_rest(seen)
        assert len({id(work) for work in seen.scopes}) == len(seen.scopes) == 6
        assert self._committed() == ["1", "2", "4", "6"]

    # -- apart -------------------------------------------------------------------------------------------------

    def test_nested_work_is_apart(self) -> None:
        """A scope inside the handler has its own session, ends by itself, and the handler's goes on."""
        seen, inner = Seen(), Seen()

        async def nest() -> Reply:
            session = await self._look(seen)
            async with self._block(scope("inner", commit="on-success")):
                await self._write(await self._look(inner), "inner")
            assert current_scope() is seen.scopes[0]
            assert self.db.session() is session
            await self._write(session, "outer")
            raise Boom

        with self.serving(nest) as send:
            assert not send("nest").ok
            self._at_rest(seen)
        assert inner.scopes[0] is not seen.scopes[0]
        assert inner.sessions[0] is not seen.sessions[0]
        assert self._committed() == ["inner"]

    def test_work_at_the_same_time_is_apart(self) -> None:
        """Two handlers that are both open have two scopes and two sessions; what one saves the other cannot undo."""
        first, second = Seen(), Seen()
        both = threading.Barrier(2)
        over = threading.Event()

        async def wait(waiting: Callable[[float], Any]) -> None:
            if (self.handlers or self.database) == "async":
                await asyncio.to_thread(waiting, self.limit)
            else:
                waiting(self.limit)

        async def save() -> Reply:
            session = await self._look(first)
            await wait(both.wait)
            await self._write(session, "saved")
            return Reply()

        async def undo() -> Reply:
            session = await self._look(second)
            await wait(both.wait)
            await wait(over.wait)
            assert first.scopes[0].ended
            assert self.db.session() is session
            await self._write(session, "undone")
            raise Boom

        with self.serving(save, undo, feature="together") as send:
            saving, undoing = _in_thread(send, "save"), _in_thread(send, "undo")
            try:
                assert saving.result(self.limit).ok
                self._at_rest(first)
            finally:
                over.set()
            outcome = undoing.result(self.limit)
            assert (outcome.ok, type(outcome.error)) == (False, Boom)
            self._at_rest(second)
        assert first.scopes[0] is not second.scopes[0]
        assert first.sessions[0] is not second.sessions[0]
        assert self._committed() == ["saved"]


def _drive(coroutine: Any) -> Any:
    """Run a coroutine that never waits, in this thread and outside of every loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a sync handler cannot wait")


def _done(value: Any) -> Awaitable[Any]:
    """What a call of a session gave, of either colour, for `await`."""
    return value if inspect.isawaitable(value) else _Now(value)


def _in_thread(send: Send, name: str) -> "Future[Outcome]":
    future: Future[Outcome] = Future()

    def run() -> None:
        try:
            future.set_result(send(name))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name).start()
    return future


class _Now:
    """An awaitable that has its value already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self.value


class _Block:
    """A sync context manager behind `async with`: it never waits."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    async def __aenter__(self) -> Any:
        return self.manager.__enter__()

    async def __aexit__(self, *error: Any) -> Any:
        return self.manager.__exit__(*error)
