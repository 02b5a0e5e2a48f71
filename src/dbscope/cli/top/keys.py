"""What a key does to what is shown, a pure function; and where keys come from: the terminal, one by one."""

import contextlib
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbscope.cli.top.rows import SORTS, Row

__all__ = ["KEYS", "View", "keyboard", "keys_of", "place_of", "press"]

ORDER = tuple(SORTS)
PAGE = 10

KEYS = (
    ("up, down, j, k", "choose a connection"),
    ("Enter", "show all about it; again, or Esc: back"),
    ("s", f"sort by the next of: {', '.join(ORDER)}"),
    ("/", "filter: words that all have to be found; Enter keeps it, Esc drops it"),
    ("o", "hide the connections of others, or show them"),
    ("space", "stop the picture, or let it go on"),
    ("q", "end"),
)


@dataclass(frozen=True)
class View:
    """What is shown of a picture, and how.

    Attributes:
        chosen: the key of the row that is chosen; None for the first.
        typing: the filter as it is typed, while it is.
    """

    sort: str = "held"
    match: str = ""
    others: bool = True
    paused: bool = False
    chosen: tuple[Any, ...] | None = None
    detail: bool = False
    typing: str | None = None
    help: bool = False
    ended: bool = False


def press(view: View, key: str, rows: Sequence[Row]) -> View:
    """What is shown after a key.

    Args:
        view: what is shown.
        key: a character, or one of `"up"`, `"down"`, `"pageup"`, `"pagedown"`, `"home"`, `"end"`, `"enter"`, `"esc"`,
            `"backspace"`.
        rows: the rows that are shown, in their order.
    """
    if view.typing is not None:
        return _typed(view, view.typing, key)
    if view.help:
        return replace(view, help=False)
    at = place_of(view, rows)
    if key in _MOVES and rows:
        to = min(max(_MOVES[key](at, len(rows)), 0), len(rows) - 1)
        return replace(view, chosen=rows[to].key)
    match key:
        case "q":
            return replace(view, ended=True)
        case "enter":
            return replace(view, detail=not view.detail, chosen=rows[at].key) if rows else replace(view, detail=False)
        case "esc":
            return replace(view, detail=False) if view.detail else replace(view, match="")
        case "s":
            return replace(view, sort=ORDER[(ORDER.index(view.sort) + 1) % len(ORDER)])
        case "o":
            return replace(view, others=not view.others)
        case " ":
            return replace(view, paused=not view.paused)
        case "/":
            return replace(view, typing=view.match, detail=False)
        case "?" | "h":
            return replace(view, help=True)
    return view


_MOVES: dict[str, Callable[[int, int], int]] = {
    "up": lambda at, _: at - 1,
    "k": lambda at, _: at - 1,
    "down": lambda at, _: at + 1,
    "j": lambda at, _: at + 1,
    "pageup": lambda at, _: at - PAGE,
    "pagedown": lambda at, _: at + PAGE,
    "home": lambda _, __: 0,
    "end": lambda _, count: count - 1,
}


def _typed(view: View, typed: str, key: str) -> View:
    if key == "enter":
        return replace(view, typing=None, match=typed.strip())
    if key == "esc":
        return replace(view, typing=None, match="")
    if key == "backspace":
        typed = typed[:-1]
    elif len(key) == 1 and key.isprintable():
        typed += key
    return replace(view, typing=typed, match=typed.strip())


def place_of(view: View, rows: Sequence[Row]) -> int:
    """Which row is chosen; the first, where the one that was is gone."""
    return next((number for number, row in enumerate(rows) if row.key == view.chosen), 0)


_ESCAPES = {
    "[A": "up",
    "[B": "down",
    "OA": "up",
    "OB": "down",
    "[5~": "pageup",
    "[6~": "pagedown",
    "[H": "home",
    "[F": "end",
    "OH": "home",
    "OF": "end",
    "[1~": "home",
    "[4~": "end",
}
_KEY = re.compile(r"\x1b([\[O][0-9;]*[A-Za-z~])|(.)", re.DOTALL)
_NAMES = {"\r": "enter", "\n": "enter", "\x1b": "esc", "\x7f": "backspace", "\x08": "backspace", "\x04": "q"}


def keys_of(typed: str) -> list[str]:
    """The keys of what a terminal sends; those that it has names of its own for and nobody needs are left out."""
    found = []
    for match in _KEY.finditer(typed):
        if match[1] is None:
            found.append(_NAMES.get(match[2], match[2]))
        elif match[1] in _ESCAPES:
            found.append(_ESCAPES[match[1]])
    return found


@contextlib.contextmanager
def keyboard() -> Iterator[Callable[[float], list[str]]]:
    """The terminal's keys, one by one and not shown; it is as before when the block ends.

    Gives a function that waits so many seconds for keys; `["q"]` when there will be no more.
    """
    import termios
    import tty

    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)

    def read(seconds: float) -> list[str]:
        if not select.select([source], [], [], seconds)[0]:
            return []
        typed = os.read(source, 1024)
        return keys_of(typed.decode(errors="replace")) if typed else ["q"]

    try:
        tty.setcbreak(source)
        yield read
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
