"""Runs steps that are coroutines one by one, so that what a step sets in its context is there for the next one.

`hand_over` runs a part of a step as other work of the same scope does: in another thread with a copy of the context, as
`asyncio.to_thread` does, or in a child task.
"""

import asyncio
import contextvars
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tests.support.kits import AsyncKit, Kit, drive

T = TypeVar("T")
Step = Coroutine[Any, Any, T]


class Steps:
    """Steps in this thread, and the hand-over to one other thread."""

    def __init__(self) -> None:
        self._other = ThreadPoolExecutor(1, thread_name_prefix="other")
        self.fresh()

    def fresh(self) -> None:
        """Begin with an empty context."""
        self._context = contextvars.Context()

    def do(self, step: Step[T]) -> T:
        """Run a step."""
        return self._context.run(drive, step)  # type: ignore[no-any-return]  # drive() returns what the step does

    async def hand_over(self, step: Step[T]) -> T:
        """Run a part of the running step elsewhere, to its end."""
        return self._other.submit(contextvars.copy_context().run, drive, step).result()  # type: ignore[no-any-return]  # as above

    def close(self) -> None:
        """No more steps."""
        self._other.shutdown()


class AsyncSteps(Steps):
    """Steps in one long task, and the hand-over to child tasks."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self.fresh()

    def fresh(self) -> None:
        self._end_task()
        self._queue: asyncio.Queue[tuple[Step[Any], asyncio.Future[Any]] | None] = asyncio.Queue()
        self._task = self._loop.create_task(self._serve(), context=contextvars.Context())

    async def _serve(self) -> None:
        while (job := await self._queue.get()) is not None:
            step, result = job
            try:
                result.set_result(await step)
            except Exception as error:
                result.set_exception(error)

    def do(self, step: Step[T]) -> T:
        result = self._loop.create_future()
        self._queue.put_nowait((step, result))
        return self._loop.run_until_complete(result)  # type: ignore[no-any-return]  # a future of the step's T

    async def hand_over(self, step: Step[T]) -> T:
        return await asyncio.create_task(step)

    def _end_task(self) -> None:
        if self._task is not None:
            self._queue.put_nowait(None)
            self._loop.run_until_complete(self._task)

    def close(self) -> None:
        self._end_task()
        self._loop.close()


def steps_for(kit: Kit) -> Steps:
    """The runner of a kit's colour."""
    return AsyncSteps() if isinstance(kit, AsyncKit) else Steps()
