"""dbscope with one of its protections off, to see that the audit does not pass without it.

This reaches into the library, and is meant for nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from dbscope import scope
from dbscope.lifecycle import Lifecycle
from dbscope.scope import Commit

__all__ = ["PROTECTIONS", "Protection"]


@dataclass(frozen=True)
class Protection:
    """What can be turned off."""

    what: str
    off: Callable[[], AbstractContextManager[Any]] = nullcontext  # around the whole demo
    doors: dict[str, Any] = field(default_factory=dict)  # for `open_doors`


class LateWSGI:
    """Ends the request's scope when the response is through, as a dependency does, and commits as late."""

    def __init__(self, app: Any, commit: Commit) -> None:
        self.app = app
        self.commit = commit

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        """The request, whole."""
        with _request(self.commit):
            yield from self.app(environ, start_response)


@contextmanager
def _request(commit: Commit) -> Iterator[None]:
    with scope("request", commit=commit):
        yield


class LateASGI:
    """The same for ASGI."""

    def __init__(self, app: Any, commit: Commit) -> None:
        self.app = app
        self.commit = commit

    async def __call__(self, message: dict[str, Any], receive: Any, send: Any) -> None:
        """The request, whole."""
        async with scope("request", commit=self.commit):
            await self.app(message, receive, send)


class NoTurn:
    """Stands for the lock by which a session knows that it is in use."""

    def acquire(self, blocking: bool = True) -> bool:
        """Everybody may, at the same time."""
        return True

    def release(self) -> None:
        """Nothing was taken."""

    def locked(self) -> bool:
        """As if somebody used the session."""
        return True


@contextmanager
def _no_overlap() -> Iterator[None]:
    init = Lifecycle.__init__

    def without_turn(life: Lifecycle, *arguments: Any) -> None:
        init(life, *arguments)
        life.turn = NoTurn()  # type: ignore[assignment]  # as good as a lock here

    with patch.object(Lifecycle, "__init__", without_turn), _nothing("refuse_sibling"), _nothing("undone_by_sibling"):
        yield


def _nothing(method: str) -> AbstractContextManager[Any]:
    return patch.object(Lifecycle, method, lambda *_: None)


PROTECTIONS = {
    "early-finish": Protection(
        "a request's scope ends when its response starts", doors={"wsgi": LateWSGI, "asgi": LateASGI}
    ),
    "ownership": Protection("only its owner ends a transaction", lambda: _nothing("refuse_stranger")),
    "overlap": Protection("one thread or task at a time uses a session", _no_overlap),
    "ended-sessions": Protection("the session of a scope that is over is dead", lambda: _nothing("refuse_ended")),
    "uncommitted": Protection("writes that nobody committed are reported", doors={"uncommitted": "off"}),
}
