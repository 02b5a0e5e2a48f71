"""A scope for each request of a WSGI application, whichever framework it is written with."""

from collections.abc import Callable, Iterable, Iterator
from io import IOBase
from types import TracebackType
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from dbscope.integrations._requests import KEY, Policy, RequestScope, Veto, refuse_other, refuse_twice
from dbscope.scope import Colour, Commit

__all__ = ["ScopeMiddleware"]

_SYNC = Colour.SYNC  # bound once: reading a member through its Enum is not free


class ScopeMiddleware:
    """A WSGI application that runs each request of `app` in a scope of its own.

    The scope ends when the response starts, before its first byte leaves: sessions are released, and with
    `commit="on-success"` the request is committed first, so that a failed commit is raised to the server and becomes a
    500. The response starts when `app` has called `start_response` and returned, or produced its first chunk. What
    runs later (a stream) opens a scope of its own.

    Args:
        app: the application. Where one of these is hidden in it, the inner one does nothing.
        commit: None, and the application commits by itself; `"on-success"`, and each request is one managed
            transaction for each database that it uses: committed if nothing was raised and the status is below 400.
        veto: with `"on-success"`, called with the status instead of comparing it with 400; true rolls back.

    Raises:
        ConfigurationError: an option is not one of these, `app` is wrapped already, or is none of WSGI's.

    >>> def app(environ, start_response): ...
    >>> app = ScopeMiddleware(app, commit="on-success")
    """

    def __init__(self, app: WSGIApplication, commit: Commit = None, *, veto: Veto | None = None) -> None:
        self.policy = Policy(app, commit, veto)
        refuse_twice(app, ScopeMiddleware)
        refuse_other(app, "WSGI")
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        known = environ.get(KEY)
        if known is not None and not known.ended:
            return self.app(environ, start_response)
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        work = environ[KEY] = RequestScope(environ.get("REQUEST_METHOD", ""), path, None, self.policy)
        response = _Response(work, start_response)
        body: Iterable[bytes] = ()
        work.enter(_SYNC)
        try:
            body = self.app(environ, response.start)
            response.go()
        except BaseException as error:
            work.__exit__(type(error), error, None)
            _close(body, error)  # the server will never see it
            raise
        work.suspend()
        if response.started and (type(body) is list or _is_plain(body, environ)):
            return body
        return _Body(body, response)


class _Response:
    """What the application says of its response, held back until the request's work is known to have succeeded.

    As a context manager, one more step of the application: the request's scope is current in it, an error ends it.
    """

    __slots__ = ("_start", "_told", "_write", "started", "work")

    def __init__(self, work: RequestScope, start_response: StartResponse) -> None:
        self.work = work
        self._start = start_response
        self._told: tuple[Any, ...] | None = None  # what `start_response` was called with, until the server is told
        self.started = False  # the server has been told

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The application's `start_response`."""
        if self.started:
            return self._start(status, headers, exc_info)  # which raises, if the headers have left
        if self._told is not None and exc_info is None:
            raise AssertionError("start_response() was called a second time, without exc_info")
        self._told = (status, headers) if exc_info is None else (status, headers, exc_info)
        return self.write

    def write(self, data: bytes) -> None:
        """The application's `write()`."""
        self.go()
        if not self.started:
            raise AssertionError("write() was called, and there is no response to write: start_response() comes first")
        self._write(data)

    def go(self) -> None:
        """Where the application has begun its response: finish the request's work, then tell the server."""
        told = self._told
        if told is not None:
            self._told = None  # a response whose work could not be committed is never sent
            veto = self.work.starts(told[0])
            if veto is not None:
                self.work.finish(veto=veto)
            self._write = self._start(*told)
            self.started = True

    def __enter__(self) -> None:
        self.work.resume()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.work.suspend()
        else:
            self.work.__exit__(kind, error, tb)


class _Body:
    """A body that is made while it is sent: each chunk goes out as soon as it is there."""

    def __init__(self, body: Iterable[bytes], response: _Response) -> None:
        self._body = body
        self._response = response
        self._chunks: Iterator[bytes] | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        # One step of the application, as by `with self._response`, whose two calls cost as much as all else here.
        response = self._response
        work = response.work
        work.resume()
        try:
            if self._chunks is None:
                self._chunks = iter(self._body)
            chunk = next(self._chunks, None)
            response.go()
        except BaseException as error:
            work.__exit__(type(error), error, None)
            raise
        work.suspend()
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """End the request, whether or not its response was wanted to the end."""
        if self._closed:
            return
        self._closed = True
        with self._response:
            try:
                _close(self._body)
            finally:
                work = self._response.work
                work.finish(veto=work.commit is not None)  # there never was a response


def _close(body: object, error: BaseException | None = None) -> None:
    close = getattr(body, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception as problem:
        if error is None:
            raise
        error.add_note(f"and closing the response failed: {problem!r}")


def _is_plain(body: object, environ: WSGIEnvironment) -> bool:
    """Whether iterating runs no code of the application's: servers look at the length of a list, and send files."""
    if isinstance(body, list | tuple | IOBase):
        return True
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(body, wrapper)
