"""Committing managed transactions: one, or those of an on-success scope in the order of first use."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from sqlalchemy.orm import Session

from dbscope.errors import CommitOutcomeUnknown, PartialCommit
from dbscope.hooks import Hook
from dbscope.lifecycle import Home, Lifecycle, Owner, life_of
from dbscope.plan import Call, OnSession, Plan

__all__ = ["before_commit", "commit_all", "commit_owned"]


def before_commit(sessions: Callable[[], list[Any]]) -> Plan[None]:
    """Call the hooks that come before the commit of these sessions, in their order, and those that they give."""
    again = True
    while again:
        again = False
        for session in sessions():
            life = life_of(session)
            while life.doom is None and (hook := _first_of(life)) is not None:
                again = True
                yield Call(hook.function, blocking=hook.blocking)


def _first_of(life: Lifecycle) -> Hook | None:
    for hook in life.hooks:
        if hook.outcome == "before commit":
            life.hooks = tuple(other for other in life.hooks if other is not hook)
            return hook
    return None


def commit_all(sessions: list[Any], committed: list[Any], home: Home) -> Plan[None]:
    """Commit the sessions of an on-success scope, in the order of first use, after all of them have flushed."""
    for session in sessions:
        life = life_of(session)
        if life.doom is not None:
            raise life.rollback_only(life.doom)
    if len(sessions) > 1:
        for session in sessions:
            if session.in_transaction():
                yield OnSession(session, Session.flush)
    for session in sessions:
        life = life_of(session)
        if session.in_transaction():
            try:
                yield OnSession(session, commit_owned)
            except Exception as problem:
                if len(sessions) == 1:
                    raise
                unknown = (session,) if isinstance(problem, CommitOutcomeUnknown) else ()
                rest = [s for s in sessions if s not in committed and s not in unknown]
                if committed:
                    raise _partial(home, committed, rest, unknown, problem) from problem
                if unknown:
                    problem.add_note(
                        f"{_names(rest)} did not come to it, and {'is' if len(rest) == 1 else 'are'} rolled back"
                    )
                raise
        else:
            cast("Owner", life.owner).committed = True  # there was nothing to send, and its hooks run all the same
        committed.append(session)


def _partial(
    home: Home, committed: Sequence[Any], rest: Sequence[Any], unknown: Sequence[Any], problem: Exception
) -> PartialCommit:
    failed = f"the commit of {_names([*unknown, *rest])} failed: {problem}"
    advice = "What is committed stays; repeat or compensate the rest."
    if unknown:
        failed = f"the outcome of the next one is unknown: {problem}"
        advice = f"What is committed stays{f'; {_names(rest)} did not come to it, and is rolled back' if rest else ''}."
    sources = [tuple(life_of(s).source for s in some) for some in (committed, rest, unknown)]
    return PartialCommit(f"{home.describe()} committed {_names(committed)}, and then {failed}.\n{advice}", *sources)


def _names(sessions: Sequence[Any]) -> str:
    return ", ".join(source.name for s in sessions if (source := life_of(s).source) is not None)


def commit_owned(session: Session) -> None:
    """Commit as the owner of the managed transaction.

    Raises:
        RollbackOnlyError: somebody rolled back inside of it meanwhile (a flush may call the user's listeners).
    """
    life = life_of(session)
    owner = cast("Owner", life.owner)
    life.acting = True
    try:
        session.commit()
        owner.committed = True
    finally:
        life.acting = False
