"""Ask the processes of this user what they hold."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from dbscope.monitor.server import VERSION, is_ours, nobody_listens, sockets, uid_of_peer
from dbscope.monitor.snapshot import Holding, PoolState

__all__ = ["Answer", "ask", "ask_all"]

T = TypeVar("T")
PATIENCE = 3.0  # seconds for a process to answer
LONGEST = 16 * 2**20  # bytes of an answer
SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class Answer:
    """What a process holds, as it says itself.

    Attributes:
        process: its number; in a container of its own, as it is known in there.
        program: what runs there, such as `gunicorn`.
        since: when it began, in seconds since 1970.
        pools: its pools.
        holdings: what its sessions hold, the longest first.
        problem: why it did not say, if it did not: then there is nothing else.
    """

    process: int
    program: str
    since: float
    pools: tuple[PoolState, ...] = ()
    holdings: tuple[Holding, ...] = ()
    problem: str | None = None


def ask_all(paths: Iterable[Path] | None = None) -> list[Answer]:
    """Ask all processes of this user at the same time. Sockets that nobody listens to are removed."""
    found = list(sockets() if paths is None else paths)
    if not found:
        return []
    with ThreadPoolExecutor(min(SIDE_BY_SIDE, len(found))) as threads:
        answers = threads.map(ask, found)
    return sorted((answer for answer in answers if answer is not None), key=lambda answer: answer.process)


def ask(path: Path) -> Answer | None:
    """Ask the process of a socket.

    Returns:
        what it holds, or why it does not say; None if it is gone, and its socket with it.
    """
    number = path.name.partition("-")[0]
    process = int(number) if number.isdecimal() else 0
    try:
        if not is_ours(path.parent) or path.lstat().st_uid != os.geteuid():
            return Answer(process, "", 0.0, problem=f"{path} is another user's, or others may enter its folder")
        said = _exchange(path, {"ask": "holdings"})
    except FileNotFoundError:
        return None
    except ConnectionRefusedError:
        if nobody_listens(path):
            with contextlib.suppress(OSError):
                path.unlink()
        return None
    except TimeoutError:
        return Answer(process, "", 0.0, problem=f"no answer in {PATIENCE:g} s: it is stopped, or very busy")
    except OSError as error:
        return Answer(process, "", 0.0, problem=error.strerror or str(error))
    return _understood(process, said)


def _exchange(path: Path, request: dict[str, Any]) -> bytes:
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(PATIENCE)
        asked.connect(str(path))
        peer = uid_of_peer(asked)
        if peer is not None and peer[1] != os.geteuid():
            raise PermissionError(0, f"{path} is served by user {peer[1]}")
        asked.sendall(json.dumps(request).encode() + b"\n")
        parts, size = [], 0
        while part := asked.recv(65536):
            parts.append(part)
            size += len(part)
            asked.settimeout(max(0.001, deadline - time.monotonic()))
            if size > LONGEST:
                raise OSError(f"{path} answers more than {LONGEST} bytes")
    return b"".join(parts)


def _understood(process: int, said: bytes) -> Answer:
    """The answer, in dataclasses; what a newer dbscope has added is left out."""
    try:
        told = json.loads(said)
        if told.get("error"):
            return Answer(process, "", 0.0, problem=str(told["error"]))
        if told["version"] != VERSION:
            return Answer(process, "", 0.0, problem=f"it has another version of dbscope (answers: {told['version']})")
        return Answer(
            process=int(told["process"]),
            program=str(told["program"]),
            since=float(told["since"]),
            pools=tuple(_as(PoolState, each) for each in told["pools"]),
            holdings=tuple(_as(Holding, each) for each in told["holdings"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return Answer(process, "", 0.0, problem="its answer makes no sense to this version of dbscope")


def _as(kind: type[T], told: dict[str, Any]) -> T:
    """One of these, if each value is what its name says.

    Raises:
        TypeError: one is not.
    """
    for name, wanted in get_type_hints(kind).items():
        value = told[name]
        if get_origin(wanted) is Literal:
            wanted = str  # or one that a newer dbscope knows
        elif wanted is float:
            wanted = int | float
        if not isinstance(value, wanted) or (isinstance(value, float) and not isfinite(value)):
            raise TypeError(f"{name} is {value!r}")
    return kind(**{each.name: told[each.name] for each in fields(kind)})  # type: ignore[arg-type]
