"""Scopes for a Flask application: each request, each command and each application context has one."""

import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from importlib import metadata
from typing import Any, cast
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from dbscope.errors import ConfigurationError
from dbscope.events import WorkFailed, tell_failed
from dbscope.integrations._requests import KEY, Policy, RequestScope, Veto
from dbscope.integrations.wsgi import ScopeMiddleware
from dbscope.scope import Commit, PlacedScope, Scope
from dbscope.scope import _current as _current_scope
from dbscope.where import Place

try:
    import click
    from flask import Flask, request
    from flask.globals import app_ctx
    from flask.signals import appcontext_pushed, got_request_exception
except ImportError as error:
    raise ImportError(
        'scopes for Flask need Flask 3.0 or newer: pip install "dbscope[flask]"', name=error.name
    ) from error

__all__ = ["Scopes"]

# The scope of the request that has arrived, until its application context is pushed.
_arrived: ContextVar[RequestScope | None] = ContextVar("dbscope.flask.arrived", default=None)


class Scopes:
    """An extension that runs each request, command and application context of a Flask application in a scope.

    A request's scope is named by its method and its route's rule. With `commit="on-success"` it is committed after
    the last `after_request` function, so that a failed commit is an error like another, and a 500. Its sessions are
    released before the first byte leaves; what runs later (a stream) opens a scope of its own. The scope of a command,
    or of an application context that is pushed by hand, ends with the context, and commits nothing by itself.

    Args:
        app: the application; or give it to `init_app` later.
        commit: None, and the application commits by itself; `"on-success"`, and each request is one managed
            transaction for each database that it uses: committed if nothing was raised and the status is below 400.
        veto: with `"on-success"`, called with the status instead of comparing it with 400; true rolls back.

    Raises:
        ConfigurationError: an option is not one of these; or as from `init_app`.

    >>> from flask import Flask
    >>> app = Flask("shop")
    >>> scopes = Scopes(app, commit="on-success")
    """

    def __init__(self, app: Flask | None = None, *, commit: Commit = None, veto: Veto | None = None) -> None:
        Policy(self.init_app, commit, veto)  # complains where the mistake is, before there is an application
        self.commit = commit
        self.veto = veto
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Install it in an application, for the application's lifetime. One `Scopes` may serve several.

        Raises:
            ConfigurationError: this is no Flask application, has scopes already, or Flask is older than 3.0.
        """
        _check(app)
        app.extensions["dbscope"] = self  # which keeps the receiver of the signal, too
        # These are documented as what to wrap, or override.
        app.wsgi_app = ScopeMiddleware(_arriving(app.wsgi_app), self.commit, veto=self.veto)  # type: ignore[method-assign]
        # Around the whole, and not one more function in Flask's lists: the commit comes after the cookie of the session
        # is written, which may fail, and the release although somebody else's teardown function fails.
        if self.commit is not None:
            app.process_response = _then_commit(app.process_response)  # type: ignore[method-assign]
        app.do_teardown_appcontext = _then_end(app.do_teardown_appcontext)  # type: ignore[method-assign]
        # Not by the signal that a request has started, which costs several times what the naming does.
        app.preprocess_request = _named_first(app.preprocess_request)  # type: ignore[method-assign]
        appcontext_pushed.connect(self._enter, app)
        got_request_exception.connect(_failed, app)

    def _enter(self, app: Flask, **_: Any) -> None:
        """Open the scope of the application context that was pushed, unless it works in one."""
        context = _context()
        known: Scope | None = context.get(KEY)
        current = _current_scope.get()
        if known is not None and (not known.ended or known is current):
            return  # pushed again, by the work itself; or by its stream, which is told if it forgets its own scope
        context[KEY] = _arrived.get() or _ContextScope(app.name).__enter__()
        _arrived.set(None)


class _ContextScope(PlacedScope):
    """The scope of an application context without a request of its own: a command's, a thread's, a test's."""

    __slots__ = ("_app", "_renamed")

    def __init__(self, app: str) -> None:
        self._app = app
        self._renamed: str | None = None
        super().__init__("", None)

    @property
    def name(self) -> str | None:
        """The work, as errors name it: the command is known only after its context was pushed."""
        command = click.get_current_context(silent=True)
        return self._renamed or (f"{self._app}'s application context" if command is None else command.command_path)

    @name.setter
    def name(self, name: str | None) -> None:
        self._renamed = name

    @property
    def tag(self) -> tuple[str | None, Place | None]:
        """The application's name, which is there."""
        return self._renamed or self._app, self.place


def _failed(app: Flask, *, exception: BaseException, **_: Any) -> None:
    """Flask answers with a 500, and logs the error: it will not cross the middleware."""
    if WorkFailed.observers:
        tell_failed(exception)


def _context() -> dict[str, Any]:
    """The attributes of the current application context: its scope is kept where it goes with it."""
    return cast("dict[str, Any]", vars(cast("Any", app_ctx)._get_current_object()))


def _arriving(app: WSGIApplication) -> WSGIApplication:
    """The application, told which scope the middleware around it has opened for the request."""

    def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        _arrived.set(environ[KEY])
        try:
            return app(environ, start_response)
        finally:
            _arrived.set(None)

    return wsgi_app


def _named_first(preprocess_request: Callable[..., Any]) -> Callable[..., Any]:
    """`Flask.preprocess_request`, which comes when the route is known; the request's scope is named by it before."""

    def name_and_preprocess_request(*args: Any) -> Any:
        _arrived.set(None)  # in a test, its application context may have been there before
        found = cast("Any", request)._get_current_object()
        work, rule = found.environ.get(KEY), found.url_rule
        if rule is not None and isinstance(work, RequestScope):
            work.name = f"{found.method} {found.script_root}{rule.rule}"
        return preprocess_request(*args)

    return name_and_preprocess_request


def _then_commit(process_response: Callable[..., Any]) -> Callable[..., Any]:
    """`Flask.process_response`, which calls the `after_request` functions; and then finish the request's work."""

    def process_response_and_commit(*args: Any) -> Any:
        response = process_response(*args)
        work = request.environ.get(KEY)
        if isinstance(work, RequestScope) and work.commit is not None:
            veto = work.starts(response.status_code)
            if veto is not None:
                work.finish(veto=veto)
        return response

    return process_response_and_commit


def _then_end(do_teardown: Callable[..., None]) -> Callable[..., None]:
    """`Flask.do_teardown_appcontext`; and then end the scope that was opened for the context, whatever happened."""

    def do_teardown_and_end(*args: Any) -> None:
        work = _context().get(KEY)
        if not isinstance(work, _ContextScope):
            do_teardown(*args)  # the request's, which ends with the start of its response
            return
        try:
            do_teardown(*args)
        except BaseException as error:
            work.__exit__(type(error), error, None)
            raise
        failed = sys.exc_info()[1]  # what a command failed with, which click tells nobody
        if isinstance(failed, click.exceptions.Exit) and not failed.exit_code:
            failed = None
        work.__exit__(type(failed) if failed else None, failed, None)

    return do_teardown_and_end


def _check(app: Any) -> None:
    """Raise where the scopes could not work, while the application is put together."""
    version = metadata.version("flask")
    if int(version.partition(".")[0]) < 3:
        raise ConfigurationError(
            f"scopes for Flask need Flask 3.0 or newer, and this is {version}: pip install -U flask"
        )
    if not isinstance(app, Flask):
        raise ConfigurationError(f"the scopes of a Flask application are given the application, not {app!r}.")
    if "dbscope" in app.extensions or isinstance(app.wsgi_app, ScopeMiddleware):
        raise ConfigurationError(
            f"{app!r} has scopes already. Install them once: by Scopes(app), by init_app(app), or the middleware."
        )
