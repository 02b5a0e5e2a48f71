"""Hooks: functions to call when the transaction they were given in has ended, after the connection is back.

Each is called in a scope of its own, so that it may use the database; a failing one stops no other.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dbscope.events import HookRun, emit
from dbscope.plan import Call, Plan, finish

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

__all__ = ["Hook", "settle", "title"]

Outcome = Literal["before commit", "commit", "rollback"]
log = logging.getLogger("dbscope")


def title(function: Callable[..., Any]) -> str:
    """A function as errors name it."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or repr(function))


class Hook:
    """A function to call when the transaction it was given in has ended."""

    __slots__ = ("blocking", "due", "function", "name", "outcome", "savepoint")

    def __init__(
        self,
        function: Callable[[], Any],
        outcome: Outcome,
        savepoint: "SessionTransaction | None",
        *,
        name: str,
        blocking: bool,
    ) -> None:
        self.function = function
        self.name = f"hook {name}"
        self.outcome = outcome
        self.blocking = blocking  # it belongs to a sync database, and must not run on a loop
        self.savepoint = savepoint
        self.due = False  # its savepoint rolled back: an on_rollback hook runs even if the rest commits


def robust(call: Callable[[], Any], name: str) -> Callable[[], Any]:
    """A call whose error is logged and not raised: what follows from a commit, but is not worth an error."""

    def failed() -> None:
        log.exception("the robust hook %s failed; the transaction stands", name)

    if asyncio.iscoroutinefunction(call):

        async def awaited() -> None:
            try:
                await call()
            except Exception:
                failed()

        return awaited

    def called() -> None:
        try:
            call()
        except Exception:
            failed()

    return called


def settle(hooks: Sequence[Hook], error: BaseException | None) -> Plan[None]:
    """Call the hooks in their order; then raise what failed, unless the work itself is failing with `error`.

    Raises:
        Exception: the one hook's error, with a note that says that the transaction stands.
        ExceptionGroup: several hooks' errors.
    """
    failures: list[Exception] = []
    cancelled: asyncio.CancelledError | None = None
    for hook in hooks:
        failed: BaseException | None = None
        try:
            yield Call(hook.function, blocking=hook.blocking)
        except asyncio.CancelledError as cancel:
            failed = cancelled = cancel  # the one hook's; what was to follow does not depend on when it arrived
        except Exception as failure:
            failed = failure
            failure.add_note(f"raised by the on_{hook.outcome} {hook.name}; the {hook.outcome} stands")
            failures.append(failure)
        if HookRun.observers:
            emit(HookRun(name=hook.name, outcome=hook.outcome, error=failed))
    first = error or cancelled
    if first is not None:
        for each in failures:
            log.error("a hook failed after the work had failed", exc_info=each)
            first.add_note(f"and {each!r} was {each.__notes__[-1]}")
        if cancelled is not None:
            raise cancelled
    elif len(failures) == 1:
        raise failures[0]
    elif failures:
        raise ExceptionGroup(f"{len(failures)} hooks failed; the transaction stands", failures)


async def asettle(hooks: Sequence[Hook], error: BaseException | None, cancelled: BaseException | None) -> None:
    """Async version of `settle`. A cancel of this task ends the hook that is running, and no other.

    The transaction has ended: what was to follow from that must not depend on when a cancel arrives. Where it has
    arrived before (`cancelled`), it ends none.
    """
    _, late = await finish(settle(hooks, error or cancelled), forward=cancelled is None)
    if late is not None:
        raise late
