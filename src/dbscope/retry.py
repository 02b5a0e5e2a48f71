"""Retry: the whole unit of work again after a conflict, in a fresh session, and when not.

What decides stands in `Retry`, `Course` and `make_way`, once; the two wrappers below hold the calls and the awaits.
"""

import asyncio
import functools
import inspect
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

from dbscope.conflicts import Conflict, conflict_of, leaves_open, saved_a_part
from dbscope.errors import ConfigurationError, TransactionInProgress
from dbscope.events import Fact, emit
from dbscope.hooks import title
from dbscope.implicit import home_of
from dbscope.lifecycle import Lifecycle, Owner, life_of
from dbscope.plan import OnSession, Plan, arun, run
from dbscope.scope import Scope, open_scopes_of_this_context
from dbscope.where import here, spell

__all__ = ["AttemptFailed", "Clock", "Retry", "aretrying", "policy_of", "retrying"]

log = logging.getLogger("dbscope")

Wanted: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] | None


class Clock:
    """What a retry asks of the world. Tests give it one of their own, and need not wait."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""
        return time.monotonic()

    def random(self) -> float:
        """A number from 0 to 1."""
        return random.random()

    def sleep(self, seconds: float) -> None:
        """Wait in this thread."""
        time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Wait on this loop; a cancel ends it."""
        await asyncio.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class AttemptFailed(Fact):
    """An attempt met a conflict and was rolled back; the next one begins after a pause.

    Attributes:
        work: the function's name.
        attempt: which attempt it was, counted from 1.
        conflict: what it met.
        error: what came out of it.
        pause: the seconds until the next attempt begins.
        elapsed: the seconds since the first attempt began.
    """

    work: str
    attempt: int
    conflict: Conflict
    error: Exception
    pause: float
    elapsed: float


@dataclass(frozen=True)
class Retry:
    """How often, and with which pauses, a unit of work is repeated after a conflict.

    Conflicts are serialization failures, deadlocks, locks that are not available and busy databases, by the server's
    own codes: see `Conflict`. Any other error comes out of the first attempt that meets it.

    The n-th pause lasts a random part of `first * 2 ** (n - 1)` seconds, and of `ceiling` at most: work that collided
    once would collide again if all of it waited equally long.

    Args:
        times: how many attempts may follow the first one.
        first: the longest that the first pause may last, in seconds; 0 for no pauses at all.
        ceiling: the longest that any pause may last, in seconds.
        budget: no attempt begins later than this many seconds after the first one. It interrupts none.
        stale_data: repeat after SQLAlchemy's `StaleDataError`, too.
        idempotent: repeat even where nobody knows whether the COMMIT succeeded: doing the work twice does no harm.
        on: further errors to repeat after: an exception class, several, or a function that is asked.
        on_retry: called with an `AttemptFailed` before each pause, outside of every transaction.
        clock: the time, chance and sleep, for tests.

    Raises:
        ConfigurationError: a number is out of range, or `on_retry` is a coroutine function.

    >>> from dbscope import Database, Retry
    >>> with Database("sqlite://") as db:
    ...     db.run(max, 3, 4, retry=Retry(5, budget=2.0))
    4
    """

    times: int = 3
    _: KW_ONLY
    first: float = 0.02
    ceiling: float = 1.0
    budget: float = 10.0
    stale_data: bool = False
    idempotent: bool = False
    on: Wanted = None
    on_retry: Callable[[AttemptFailed], object] | None = None
    clock: Clock = field(default_factory=Clock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_count(self.times):
            raise ConfigurationError(f"a retry's times is how often to repeat, from 0 up, not {self.times!r}.")
        for name in ("first", "ceiling", "budget"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value >= 0):
                raise ConfigurationError(f"a retry's {name} is a number of seconds from 0 up, not {value!r}.")
        if not (callable(self.on) or self.on is None or isinstance(self.on, tuple)):
            raise ConfigurationError(
                f"a retry's on is an exception class, a tuple of them, or a function that is asked, not {self.on!r}."
            )
        if self.on_retry is not None and not callable(self.on_retry):
            raise ConfigurationError(f"on_retry is a function that takes an AttemptFailed, not {self.on_retry!r}.")
        if inspect.iscoroutinefunction(self.on_retry):
            raise ConfigurationError(
                f"on_retry is called, not awaited, and {title(self.on_retry)} is a coroutine function. "
                "Give it a plain function, such as one that counts."
            )

    def longest(self, attempt: int) -> float:
        """The longest that the pause after the n-th attempt may last."""
        return min(self.ceiling, self.first * 2.0 ** min(attempt - 1, 64))

    def conflict(self, error: Exception) -> Conflict | None:
        """Why the work is to be repeated after an error; None if it is not."""
        found = conflict_of(error, stale_data=self.stale_data)
        if found is None and self.on is not None:
            asked = isinstance(error, self.on) if isinstance(self.on, type | tuple) else self.on(error)
            return Conflict.ASKED_FOR if asked else None
        return found


def policy_of(retry: "Retry | int") -> Retry:
    """The policy that a user's `retry=` stands for.

    Raises:
        ConfigurationError: it is neither a policy nor a number of repetitions.
    """
    if isinstance(retry, Retry):
        return retry
    if not _is_count(retry):
        raise ConfigurationError(f"retry is how often to repeat, from 0 up, or a Retry(...), not {retry!r}.")
    return Retry(retry)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Course:
    """One call of a function: the attempts that it took so far."""

    def __init__(self, policy: Retry, work: str) -> None:
        self.policy = policy
        self.work = work
        self.failed = 0
        self.began = policy.clock.now()
        self.owner: Owner | None = None  # of the attempt's transaction

    def attempt(self, session: Any) -> None:
        """An attempt has begun, in a session of its own."""
        self.owner = life_of(session).owner

    def pause_after(self, error: Exception) -> float | None:
        """An attempt is over, by an error: the seconds to wait before the next; None if none follows."""
        self.failed += 1
        owner, self.owner = self.owner, None
        conflict = self._conflict(error, owner)
        if conflict is None:
            return None
        policy = self.policy
        elapsed = policy.clock.now() - self.began
        pause = policy.longest(self.failed) * policy.clock.random()
        why = None
        if self.failed > policy.times:
            why = f"retry allows {policy.times} more after the first"
        elif elapsed + pause > policy.budget:
            why = f"the next would begin after the budget of {policy.budget:g} s"
        if why is not None:
            error.add_note(
                f"{self.work} met a conflict ({conflict.value}) in the last of {self.failed} "
                f"attempt{'s' if self.failed > 1 else ''}, {elapsed:.2f} s after the first began: {why}."
            )
            return None
        self._tell(
            AttemptFailed(
                work=self.work, attempt=self.failed, conflict=conflict, error=error, pause=pause, elapsed=elapsed
            )
        )
        return pause

    def _conflict(self, error: Exception, owner: Owner | None) -> Conflict | None:
        if saved_a_part(error) or (owner is not None and owner.committed):
            return None  # where all of it is saved, a hook failed
        if leaves_open(error):
            return Conflict.UNKNOWN_OUTCOME if self.policy.idempotent else None
        return self.policy.conflict(error)

    def _tell(self, fact: AttemptFailed) -> None:
        if AttemptFailed.observers:
            emit(fact)
        log.info(
            "attempt %d of %s met a conflict (%s); the next begins in %.3f s",
            *(fact.attempt, fact.work, fact.conflict.value, fact.pause),
        )
        listener = self.policy.on_retry
        if listener is None:
            return
        try:
            listener(fact)
        except Exception:
            log.exception("on_retry %s failed; the retry goes on", title(listener))


# -- before the first attempt ------------------------------------------------------------------------------------


def make_way(source: Any, work: str) -> Plan[None]:
    """Refuse where the work is a part of something greater; give back what the scope's session has merely read in.

    Raises:
        TransactionInProgress: inside a managed transaction, or the scope's session has writes that nobody owns.
    """
    home = home_of(source)
    if home is None:
        return
    if home.commit is not None:
        raise _not_outermost(work, f'{home.describe()}, whose commit="on-success" makes it one transaction')
    for life in _lives_around(home):
        if life.owner is not None and (not life.owner.reader or life.source is source):
            raise _not_outermost(work, str(life.owner))
    if not home.has(source):
        return
    session = home.open(source)
    sync = getattr(session, "sync_session", session)
    if sync.in_nested_transaction():
        raise TransactionInProgress(
            f"{work} was called at {spell(here())}, and found a savepoint open that nobody owns "
            "(`session.begin_nested()`).\nEnd its transaction first: each attempt has a session of its own."
        )
    place = life_of(session).uncommitted(sync)
    if place is not None:
        raise TransactionInProgress(
            f"{work} was called at {spell(here())}, and found work that nobody has committed "
            f"({f'written at {spell(place)}' if isinstance(place, tuple) else place}).\n"
            "Commit it or roll it back first, or move it into the function: each attempt has a session of its own, "
            "and would not see it."
        )
    if sync.in_transaction():
        # A second connection for one piece of work is how pools run dry, and its snapshot would be old.
        yield OnSession(session, lambda found: found.commit())


def _lives_around(home: Scope) -> list[Lifecycle]:
    """The lives of the sessions that this work holds: those of its scope, and those that wait for its end."""
    mine = [life_of(session) for session in home._all()]
    sources = {life_of(session).source for scope in open_scopes_of_this_context() for session in scope._all()}
    return mine + [life for source in sources for life in home.outer_lives(source)]


def _not_outermost(work: str, inside: str) -> TransactionInProgress:
    return TransactionInProgress(
        f"{work} was called at {spell(here())}, to be repeated after a conflict, inside {inside}.\n"
        "Only the whole unit of work can be repeated: the server may have undone the outer part as well, and it would "
        "hold its locks in the pauses.\n"
        "Put `retry=` where the outermost transaction begins (`db.run(function, retry=...)` for a block), and leave it "
        "off here."
    )


# -- the two colours ---------------------------------------------------------------------------------------------


def retrying(
    source: Any,
    function: Callable[..., Any],
    policy: Retry,
    block: Callable[[], AbstractContextManager[Any]],
) -> Callable[..., Any]:
    """`function`, each call of which is repeated after conflicts, every attempt in a new `block()` of its own."""
    work = f"{title(function)}()"

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        run(make_way(source, work))
        course = Course(policy, work)
        while True:
            try:
                with block() as session:
                    course.attempt(session)
                    return function(*args, **kwargs)
            except Exception as error:
                pause = course.pause_after(error)
                if pause is None:
                    raise
            policy.clock.sleep(pause)  # out of the handler: nothing of the failed attempt is kept meanwhile

    return called


def aretrying(
    source: Any,
    function: Callable[..., Awaitable[Any]],
    policy: Retry,
    block: Callable[[], AbstractAsyncContextManager[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Async version of `retrying`."""
    work = f"{title(function)}()"

    @functools.wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        await arun(make_way(source, work))
        course = Course(policy, work)
        while True:
            try:
                async with block() as session:
                    course.attempt(session)
                    return await function(*args, **kwargs)
            except Exception as error:
                pause = course.pause_after(error)
                if pause is None:
                    raise
            await policy.clock.asleep(pause)

    return awaited
