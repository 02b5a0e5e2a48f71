"""Facts for the screen: a frozen snapshot of what the clients, the servers and the database are doing."""

from collections.abc import Mapping
from dataclasses import dataclass

from dbscope.cli.demo.bank import Bank
from dbscope.cli.demo.load import DOORS, Load

__all__ = ["DoorFacts", "Snapshot", "snapshot"]

TITLES = {"async": "ASGI, on the loop", "sync": "ASGI, in threads", "wsgi": "WSGI, in threads"}


@dataclass(frozen=True)
class DoorFacts:
    """The requests through one door."""

    title: str
    running: int
    answered: int  # with a status below 400
    refused: int  # 409: no money
    failed: int  # 500


@dataclass(frozen=True)
class Snapshot:
    """What the screen shows."""

    title: str
    done: float  # from 0 to 1
    elapsed: float  # seconds
    seconds: float  # for which the load is meant to run
    sent: int
    hung_up: int  # of these, by their clients
    doors: tuple[DoorFacts, ...]
    jobs: int
    receipts: int
    scopes: int
    scopes_seen: int
    sessions: int
    connections: int
    commits: int
    rollbacks: int
    errors: Mapping[str, int]  # by name, the most frequent first


def snapshot(title: str, bank: Bank, load: Load) -> Snapshot:
    """What goes on now."""
    log, watch = bank.log, bank.watch
    return Snapshot(
        title=title,
        done=load.done,
        elapsed=min(load.elapsed, load.seconds),
        seconds=load.seconds,
        sent=len(load.sent),
        hung_up=sum(sent.hangs_up for sent in [*load.sent]),
        doors=tuple(_door(bank, door) for door in DOORS),
        jobs=bank.jobs.seen(),
        receipts=bank.receipts.done,
        scopes=len(watch.open()),
        scopes_seen=watch.scopes_seen,
        sessions=watch.sessions(),
        connections=sum(watch.connections().values()),
        commits=watch.commits,
        rollbacks=watch.rollbacks,
        errors=dict((log.errors.copy() + watch.failures.copy()).most_common()),
    )


def _door(bank: Bank, door: str) -> DoorFacts:
    statuses = {status: count for (where, status), count in [*bank.log.statuses.items()] if where == door}
    return DoorFacts(
        title=TITLES[door],
        running=bank.log.running[door],
        answered=sum(count for status, count in statuses.items() if 0 < status < 400),
        refused=statuses.get(409, 0),
        failed=sum(count for status, count in statuses.items() if status >= 500),
    )
