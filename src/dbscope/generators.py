"""Which generator may open a scope: entered in a plain one's frame, it would become the scope of whoever iterates.

And which function can be decorated to run in one.
"""

import contextlib
import inspect
from functools import partial
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType
from typing import Any

from dbscope.errors import ConfigurationError, ScopeMisuseError
from dbscope.hooks import title
from dbscope.where import spell

__all__ = ["CONTEXTLIB", "IN_GENERATOR", "refuse_generator", "refuse_undecoratable"]

CONTEXTLIB = contextlib.__file__
IN_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR

# Who resumes a generator that is no loop: the block between its halves is then somebody's `with`, and always closed.
_DRIVERS = frozenset({"contextlib", "_pytest.fixtures", "pytest_asyncio.plugin"})
# These run functions in a copy of the context: a scope entered by one is current for nobody.
_COPIES = frozenset({"anyio._backends._asyncio", "concurrent.futures.thread", "threading"})


def refuse_generator(frame: FrameType) -> FrameType:
    """The user's frame behind `frame`; raise if a scope that is entered in it would leak out of a generator."""
    while frame.f_code.co_filename == CONTEXTLIB and frame.f_back is not None:  # ExitStack.enter_context
        frame = frame.f_back
    flags = frame.f_code.co_flags
    if not flags & IN_GENERATOR:
        return frame
    driver = frame.f_back
    module = "" if driver is None else driver.f_globals.get("__name__", "")
    where = spell((frame.f_code, frame.f_lasti))
    if module in _DRIVERS:
        above = None if driver is None else driver.f_back
        if flags & CO_GENERATOR and above is not None and above.f_globals.get("__name__", "") in _COPIES:
            raise ScopeMisuseError(
                f"a scope was opened at {where}, in a sync generator whose halves are run by worker threads, each in a "
                "context of its own: no endpoint would ever see it.\nLet the application open a scope for each "
                "request (dbscope.integrations.asgi.ScopeMiddleware), or make the generator an `async def`."
            )
        return frame
    if flags & CO_ASYNC_GENERATOR and module in _COPIES:
        return frame  # AnyIO's own runner of async fixtures
    raise ScopeMisuseError(
        f"a scope was opened at {where}, in the frame of generator {frame.f_code.co_name}(): it would become the "
        "scope of whoever iterates, and a `break` would leave it open.\nOpen the scope around the loop, or decorate "
        f"{frame.f_code.co_name} with @contextmanager (or @asynccontextmanager) and use it in a `with`. "
        "A stream that a server iterates fetches each part in a function that opens a scope of its own."
    )


def refuse_undecoratable(function: Any, decorator: str, what: str, block: str) -> bool:
    """Raise if a block around a function's call would not be one around its work.

    Args:
        function: what is decorated.
        decorator: by which decorator.
        what: the block.
        block: what to write inside of it instead.

    Returns:
        whether it is a coroutine function.
    """
    if isinstance(function, staticmethod | classmethod | property):
        kind = type(function).__name__
        raise ConfigurationError(f"{decorator} was put on a {kind}. Put it below @{kind}, next to the function.")
    if not callable(function):
        raise ConfigurationError(f"{decorator} decorates functions, not {function!r}.")
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    call = inner if inspect.isroutine(inner) else type(inner).__call__
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise ConfigurationError(
            f"{title(function)} is a generator: calling it runs nothing yet, so the {what} would be over before "
            f"its first line. Use `{block}` inside of it, under @contextmanager, or return a list."
        )
    return inspect.iscoroutinefunction(call)
