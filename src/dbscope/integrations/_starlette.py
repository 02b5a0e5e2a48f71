"""What can be wrong with a Starlette or FastAPI application, found when it starts. Imports neither of them."""

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

from dbscope.database import BaseDatabase
from dbscope.errors import ConfigurationError
from dbscope.integrations._requests import twice
from dbscope.where import spell

# The oldest ones that the middleware and `Depends(db.session)` were tried with.
OLDEST = {"fastapi": (0, 100), "starlette": (0, 27)}


def refuse(app: object, middleware: type) -> None:
    """Look at the application that a middleware serves; one of another framework is not looked at.

    Raises:
        ConfigurationError: the middleware is in it twice, a sync endpoint asks for a session that it cannot await, or
            the framework is too old.
    """
    for name in {cls.__module__.partition(".")[0] for cls in type(app).__mro__} & OLDEST.keys():
        version, oldest = metadata.version(name), OLDEST[name]
        if tuple(map(int, version.split(".")[:2])) < oldest:
            wanted = ".".join(map(str, oldest))
            raise ConfigurationError(
                f"dbscope needs {name} {wanted} or newer, and this is {version}: pip install -U {name}"
            )
    added = [each.cls for each in getattr(app, "user_middleware", ())]  # classes, and functions that make one
    if sum(isinstance(each, type) and issubclass(each, middleware) for each in added) > 1:
        raise twice(app)
    for route in _routes(getattr(app, "routes", ())):
        _refuse_async_in_sync(route)


def _routes(routes: Iterable[Any]) -> Iterator[Any]:
    """All routes, those of routers and of mounted applications included."""
    for route in routes or ():
        yield route
        inner = getattr(route, "original_router", route)  # how FastAPI keeps what was included
        yield from _routes(getattr(inner, "routes", ()))


def _refuse_async_in_sync(route: Any) -> None:
    """Raise if a plain function, which cannot await, is given an async session."""
    asked = getattr(route, "dependant", None)  # what FastAPI has found out about the endpoint
    if asked is None or _is_async(asked.call):
        return
    for given in asked.dependencies:
        database = getattr(given.call, "_source", None)
        if isinstance(database, BaseDatabase) and database.is_async:
            code = getattr(inspect.unwrap(asked.call), "__code__", None)
            place = f" ({spell((code, 0))})" if code is not None else ""
            raise ConfigurationError(
                f"{route.path} is served by {getattr(asked.call, '__name__', asked.call)}{place}, a plain function, "
                f"which is given a session of the async {database.name} that it cannot await.\n"
                "Make it an `async def`, or use a Database there."
            )


def _is_async(endpoint: Any) -> bool:
    while isinstance(endpoint, partial):
        endpoint = endpoint.func
    endpoint = inspect.unwrap(endpoint)
    call = endpoint if inspect.isroutine(endpoint) else getattr(endpoint, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)
