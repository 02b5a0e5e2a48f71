"""The view that goes on: one thread looks again and again, another shows it and listens to the keys."""

import argparse
import threading
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live

from dbscope.cli.top.command import Sources
from dbscope.cli.top.keys import View, keyboard, press
from dbscope.cli.top.rows import Picture, arranged
from dbscope.cli.top.screen import live

__all__ = ["run"]

BEAT = 0.1  # seconds until a new picture, or a new size of the terminal, is seen


@dataclass
class _Looking:
    """Looks in a thread, for a slow server must not keep the keys waiting."""

    sources: Sources
    interval: float
    latest: Picture | None = None
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dbscope-top", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.latest = self.sources.look()
            except BaseException as error:
                self.failure = error
                return
            self._over.wait(self.interval)

    def end(self) -> None:
        """Look no more; a look that is under way is not waited for long."""
        self._over.set()
        self._thread.join(1)


def run(options: argparse.Namespace, sources: Sources) -> int:
    """Show it until the user ends it."""
    console = Console(highlight=False)
    looking = _Looking(sources, options.interval)
    view = View(sort=options.sort, match=options.match, others=not options.mine)
    shown: Picture | None = None
    drawn: object = None
    try:
        with keyboard() as read, Live(console=console, screen=True, auto_refresh=False) as display:
            while not view.ended:
                if looking.failure is not None:
                    raise looking.failure
                if not view.paused or shown is None:
                    shown = looking.latest
                rows = (
                    [] if shown is None else arranged(shown.rows, sort=view.sort, match=view.match, others=view.others)
                )
                now = (id(shown), view, console.size)
                if now != drawn:
                    drawn = now
                    display.update(live(shown, rows, view, *console.size), refresh=True)
                for key in read(BEAT):
                    view = press(view, key, rows)
    finally:
        looking.end()
    return 0
