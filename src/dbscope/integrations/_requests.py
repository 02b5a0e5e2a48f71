"""What the middlewares share: the scope of a request, its name, and whether it is committed."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dbscope.errors import ConfigurationError
from dbscope.scope import _NEW, _NO_SESSIONS, _OPEN, Commit, PlacedScope

# Where a request's scope is kept, in its `environ` (WSGI) or connection scope (ASGI): a second middleware looks there.
KEY = "dbscope.scope"

# They write nothing, so they need not queue for SQLite's one write lock.
SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

Veto = Callable[[int], bool]


class Policy:
    """The options of a middleware, checked when the application starts.

    Raises:
        ConfigurationError: the application is none, an option is unknown, or a veto has nothing to say no to.
    """

    def __init__(self, app: object, commit: Commit, veto: Veto | None) -> None:
        if not callable(app):
            raise ConfigurationError(f"a middleware is given the application that it wraps, not {app!r}.")
        if commit is not None and commit != "on-success":
            raise ConfigurationError(f'commit is None or "on-success", not {commit!r}.')
        if veto is not None and not callable(veto):
            raise ConfigurationError(f"a veto is a function of the response's status, not {veto!r}.")
        if veto is not None and commit is None:
            raise ConfigurationError('a veto needs commit="on-success": without it no request is committed for you.')
        self.commit = commit
        self.veto = veto or _failed


def refuse_twice(app: Any, middleware: type) -> None:
    """Raise if the application that a middleware is given has one, as far as that can be seen.

    Where it cannot (behind a function, in an application that is mounted), the inner one does nothing.
    """
    for _ in range(100):  # an object that has every attribute would never end
        added = [getattr(each, "cls", None) for each in getattr(app, "user_middleware", ())]  # Starlette's
        if isinstance(app, middleware) or middleware in added:
            raise twice(app)
        app = getattr(app, "app", None)
        if app is None:
            return


def twice(app: object) -> ConfigurationError:
    """The error for an application that has scopes already."""
    whose = "the application" if type(app).__module__.startswith("dbscope.") else repr(app)
    return ConfigurationError(f"{whose} has scopes already. Install one ScopeMiddleware, around the whole application.")


_CALLED = {"WSGI": ("environ", "start_response"), "ASGI": ("scope", "receive", "send")}


def refuse_other(app: Any, kind: str) -> None:
    """Raise if an application is called as those of the other kind are, for which there is a middleware of its own.

    Both are called ScopeMiddleware, and an editor imports whichever it finds first. What is neither is not judged here.
    """
    other = "ASGI" if kind == "WSGI" else "WSGI"
    if _takes(app, _CALLED[other]) and not _takes(app, _CALLED[kind]):
        raise ConfigurationError(
            f"{app!r} is no {kind} application: it is not called with ({', '.join(_CALLED[kind])}).\n"
            f"Use dbscope.integrations.{other.lower()}.ScopeMiddleware if it is one of {other}'s."
        )


def _takes(app: Any, parameters: tuple[str, ...]) -> bool:
    try:
        inspect.signature(app, follow_wrapped=False).bind(*parameters)
    except TypeError:
        return False
    except ValueError:  # something that does not tell how it is called
        pass
    return True


def _failed(status: int) -> bool:
    return status >= 400


class RequestScope(PlacedScope):
    """The scope of one request, which ends when the response starts.

    Its name is `"GET /orders/7"`, or the route instead of the path once the framework has told it
    (`"GET /orders/{id}"`): put together when somebody asks, which is seldom. It may be set.

    Args:
        method: the request's.
        path: as the client sent it, decoded.
        told: where the framework will tell the route; see `route_of`.
        policy: the middleware's options.
    """

    __slots__ = ("_method", "_path", "_policy", "_renamed", "_started", "_told")

    def __init__(self, method: str, path: str, told: Mapping[str, Any] | None, policy: Policy) -> None:
        # All that the classes above would set, without their checks, which are half of what this costs.
        self._method = method
        self._path = path
        self._told = told
        self._policy = policy
        self._renamed: str | None = None
        self._started = False
        self._given = None
        self._sessions = _NO_SESSIONS
        self._state = _NEW
        self.commit = policy.commit
        self.writes = method not in SAFE

    @property
    def name(self) -> str:
        """The request, as errors name it."""
        route = None if self._told is None else route_of(self._told)
        return self._renamed or f"{self._method} {route or self._path}"

    @name.setter
    def name(self, name: str | None) -> None:
        self._renamed = name

    @property
    def tag(self) -> tuple[str | None, None]:
        """The path, if it was not named: putting the name together takes longer than what else is done with it."""
        return self._renamed or self._path, None

    @property
    def ending(self) -> str:
        """What its end came with, as errors say it."""
        return " with the start of its response" if self._started else ""

    def starts(self, status: int | str) -> bool | None:
        """Note that the response is about to start, with this status (or status line).

        Returns:
            the `veto` to finish the work with; None if there is nothing to finish, now or any more.

        Raises:
            Exception: what the user's veto raised.
        """
        if self._state is not _OPEN:
            return None
        if not self._sessions:
            self._started = True
            self._end_empty()  # as `finish` would, for most requests of some applications
            return None
        veto = self.commit is not None and self._policy.veto(int(status[:3] if isinstance(status, str) else status))
        self._started = True
        return veto

    def forget_request(self) -> None:
        """Keep the name alone: who keeps an ended scope (a background task) is not to keep the whole request."""
        told, self._told = self._told, None
        if told is not None and "route" in told:
            self._path = route_of(told) or self._path


def route_of(told: Mapping[str, Any]) -> str | None:
    """The route of a request, as in `/orders/{id}`: Starlette and FastAPI put it into the ASGI scope once they know."""
    path = getattr(told.get("route"), "path", None)
    return f"{told.get('root_path', '')}{path}" if isinstance(path, str) else None
