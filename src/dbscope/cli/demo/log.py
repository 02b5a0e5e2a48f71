"""What the server says: one answer for each request, with the errors that came up, by name."""

import asyncio
import os
import re
import threading
import traceback
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Answer", "ServerLog", "line_of", "name_of", "named_lines", "text_of"]

HANDLERS = "misbehaviour.py"


def name_of(error: BaseException) -> str:
    """An error's name; of a task group's, that of the one it holds."""
    return type(_inner(error)).__name__


def text_of(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(_inner(error)).partition("\n")[0]


def line_of(error: BaseException) -> str:
    """The line of the handler that an error came from, or else the one it names; empty where it is in neither."""
    frames = traceback.extract_tb(_inner(error).__traceback__)
    found = [f"{HANDLERS}:{frame.lineno}" for frame in frames if frame.filename.endswith(f"demo{os.sep}{HANDLERS}")]
    return (found or named_lines(str(_inner(error))) or [""])[-1]


def named_lines(message: str) -> list[str]:
    """The lines of the handlers that a message names."""
    return re.findall(rf"\b{re.escape(HANDLERS)}:\d+", message)


def _inner(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@dataclass
class Answer:
    """What the server has to say about one request."""

    id: str
    door: str
    status: int | None = None  # until the response starts
    errors: list[str] = field(default_factory=list)  # those from after the start of the response included
    message: str = ""  # what the first of them says
    line: str = ""  # where it came from
    ended: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)  # set, on the loop, when the response is through


class ServerLog:
    """Every request that a server has seen."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.running: Counter[str] = Counter()  # by door
        self.statuses: Counter[tuple[str, int]] = Counter()  # by door and status, of the requests that are through
        self.errors: Counter[str] = Counter()
        self._lock = threading.Lock()

    def began(self, id: str, door: str) -> Answer:
        """A request has arrived."""
        with self._lock:
            answer = self.answers[id] = Answer(id, door)
            self.running[door] += 1
            return answer

    def failed(self, id: str, error: BaseException) -> None:
        """An error left the application, or work that the request left behind."""
        with self._lock:
            answer = self.answers[id]
            answer.errors.append(name_of(error))
            answer.message = answer.message or text_of(error)
            answer.line = answer.line or line_of(error)
            self.errors[name_of(error)] += 1

    def ended(self, answer: Answer) -> None:
        """The response is through, or the client is gone."""
        with self._lock:
            answer.ended = True
            self.running[answer.door] -= 1
            self.statuses[answer.door, answer.status or 0] += 1
