"""A clock for retries that nobody has to wait for."""

from collections.abc import Callable

from dbscope.retry import Clock


class FakeClock(Clock):
    """A clock that a pause turns forward, and that remembers the pauses; `during` is called in each."""

    def __init__(self, chance: float = 1.0, during: Callable[[], object] | None = None) -> None:
        self.time = 1000.0
        self.chance = chance
        self.during = during
        self.pauses: list[float] = []

    def now(self) -> float:
        return self.time

    def random(self) -> float:
        return self.chance

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds
        if self.during is not None:
            self.during()

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)
