"""The bank: what its endpoints, its job handler and its worker pool share."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from dbscope.cli.demo.doors import Doors
from dbscope.cli.demo.log import ServerLog
from dbscope.cli.demo.watch import Watch
from dbscope.cli.demo.work import JobHandler, ReceiptPool

__all__ = ["Bank"]


class Bank:
    """What its endpoints, its job handler and its worker pool share."""

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.db = doors.db
        self.adb = doors.adb
        self.narrow = doors.narrow
        self.dry = doors.dry
        self.scope = doors.scope
        self.log = ServerLog()
        self.watch = Watch(doors)
        self.receipts = ReceiptPool(self)
        self.jobs = JobHandler(self)
        self.left_behind: set[asyncio.Task[None]] = set()

    def after_response(self, id: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something when the response to a request is through; what it raises goes into the log."""

        async def later() -> None:
            await self.log.answers[id].over.wait()
            try:
                await work
            except Exception as error:
                self.log.failed(id, error)

        task = asyncio.create_task(later(), name=f"left behind by {id}")
        self.left_behind.add(task)
        task.add_done_callback(self.left_behind.discard)
