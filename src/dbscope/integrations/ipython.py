"""A scope for each cell of IPython and Jupyter: `%load_ext dbscope.integrations.ipython`."""

import asyncio
from typing import Any

from dbscope.integrations._commands import refuse_old
from dbscope.scope import Colour, PlacedScope

__all__ = ["load_ipython_extension", "unload_ipython_extension"]


def load_ipython_extension(shell: Any) -> None:
    """Run each cell in a scope of its own, called `In [3]`, from the next cell on; IPython calls this.

    What a cell leaves broken, or open, ends with it, and the next one is served by new sessions. What it has read, or
    committed, stays readable in the next ones, as far as it was loaded.

    Raises:
        ConfigurationError: IPython is older than 8.12.
    """
    refuse_old("ipython", "8.12")
    shell._dbscope = Cells(shell)


def unload_ipython_extension(shell: Any) -> None:
    """End the running cell's scope, and open no more of them; IPython calls this."""
    shell._dbscope.stop()
    del shell._dbscope


class CellScope(PlacedScope):
    """The scope of one cell, whose objects outlive it."""

    __slots__ = ()

    def open(self, source: Any, options: dict[str, Any] | None = None) -> Any:
        """As `Scope.open`; a commit leaves objects as they are, for in the next cell nothing could refresh them."""
        return super().open(source, {"expire_on_commit": False, **(options or {})})


class Cells:
    """The scopes of the cells of one shell: several where a cell runs another."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self._open: list[tuple[Any, CellScope]] = []
        self._ending: set[asyncio.Task[None]] = set()  # a loop keeps tasks weakly
        shell.events.register("pre_run_cell", self.begin)
        shell.events.register("post_run_cell", self.end)

    def begin(self, info: Any) -> None:
        """A cell is about to run."""
        number = self.shell.execution_count
        if info.store_history and number > len(self.shell.history_manager.input_hist_parsed):
            number -= 1  # newer versions have counted this one already
        work = CellScope(f"In [{number}]", None)
        work.enter(Colour.BY_ID)  # it serves both colours: who ends it can wait for a loop
        self._open.append((info, work))

    def end(self, result: Any) -> None:
        """A cell is through; the one that loads this had no scope yet, and an empty one never has."""
        infos = [info for info, _ in self._open]
        error = result.error_before_exec or result.error_in_exec
        if result.info in infos:
            while infos and infos.pop() is not result.info:
                self._end(error)
            self._end(error)
        elif error is not None and infos:  # what came out of its loop: its result is another one
            self._end(error)

    def stop(self) -> None:
        """End what is open, and listen no more."""
        self.shell.events.unregister("pre_run_cell", self.begin)
        self.shell.events.unregister("post_run_cell", self.end)
        while self._open:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        _, work = self._open.pop()
        kind = type(error) if error is not None else None
        loop = getattr(work, "_loop", None)
        if loop is None:
            work.__exit__(kind, error, None)
            return
        work.suspend()  # what ends it does so in a context of its own
        if loop.is_running():  # Jupyter's, which runs this as well
            task = loop.create_task(work.__aexit__(kind, error, None))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        else:
            loop.run_until_complete(work.__aexit__(kind, error, None))
