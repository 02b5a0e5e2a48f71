"""Memory, in processes of their own: what an idle scope holds, and what a million cycles leave behind.

`python -m benchmarks.memory WHAT COUNT` prints one JSON object, for the table.
"""

import gc
import json
import subprocess
import sys
import tracemalloc
from contextvars import copy_context
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dbscope import Database, scope

PAGE = 4096


def resident() -> int:
    """The bytes of memory that this process has resident now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        import resource  # not Linux: the peak, which a leak raises too

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def idle_scope(count: int) -> dict[str, float]:
    """Bytes for each scope that is open and uses no session, in a context of its own as a request has one."""
    return {"bytes": traced(count, scope)}


def idle_session(count: int) -> dict[str, float]:
    """Bytes for each plain session that does nothing: what a registry holds for each piece of work at least."""
    engine = create_engine("sqlite://")
    return {"bytes": traced(count, lambda: Session(engine))}


def traced(count: int, make: Any) -> float:
    contexts = [copy_context() for _ in range(count)]
    kept: list[Any] = [None] * count
    make().__enter__().__exit__(None, None, None)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number, context in enumerate(contexts):
        kept[number] = context.run(lambda: make().__enter__())
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / count


def growth(count: int, cycle: Any) -> dict[str, float]:
    """Bytes, and objects of Python's, that each cycle leaves behind; after a twentieth of them to warm up."""
    for _ in range(count // 20):
        cycle()
    gc.collect()
    memory, blocks = resident(), sys.getallocatedblocks()
    for _ in range(count):
        cycle()
    gc.collect()
    return {"bytes": (resident() - memory) / count, "blocks": (sys.getallocatedblocks() - blocks) / count}


def closed(count: int) -> dict[str, float]:
    """Scopes that use `db.session` and end."""
    db = Database("sqlite://")

    def cycle() -> None:
        with scope():
            db.session()

    return growth(count, cycle)


def forgotten(count: int) -> dict[str, float]:
    """Scopes that use `db.session` and are never ended: their context goes, as a request's does."""
    db = Database("sqlite://")

    def enter() -> None:
        scope().__enter__()
        db.session()

    return growth(count, lambda: copy_context().run(enter))


def forgotten_keys(count: int) -> dict[str, float]:
    """The same with a `scoped_session` keyed by the request's id, and never removed."""
    ids = iter(range(10 * count))
    registry = scoped_session(sessionmaker(create_engine("sqlite://")), scopefunc=lambda: next(ids))
    return growth(count, registry)


WHAT = {function.__name__: function for function in (idle_scope, idle_session, closed, forgotten, forgotten_keys)}


def ask(what: str, count: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", what, str(count)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](int(sys.argv[2]))))
